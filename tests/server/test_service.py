"""Models, tokens, health, metrics and the page."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import jaxengine
from jaxengine import AsyncLLM
from jaxengine.engine_client import EngineDeadError
from jaxengine.server.settings import ServerSettings
from tests.server.asgi import AsgiClient
from tests.server.conftest import NewClient

TEXT = "the quick brown fox"


def test_all_names_of_the_model_are_listed(served: AsyncLLM, client: AsgiClient) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["tiny", "also-tiny"]
    for card in models["data"]:
        assert card["object"] == "model"
        assert card["max_model_len"] == 256
        assert card["root"] == served.info.model
    assert client.get("/v1/models/also-tiny").json() == models["data"][1]
    assert client.get("/v1/models/huge").error["type"] == "NotFoundError"


def test_a_name_with_slashes_is_found(new_client: NewClient) -> None:
    client = new_client(served_model_name=["org/tiny"])
    assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_tokens_become_the_text_that_they_were(served: AsyncLLM, client: AsgiClient) -> None:
    tokenizer = served.frontend.require_tokenizer().hf_tokenizer
    cut = client.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
    assert cut["tokens"] == tokenizer.encode(TEXT)
    assert cut["token_strs"] == tokenizer.convert_ids_to_tokens(cut["tokens"])
    assert cut["count"] == len(cut["tokens"])
    assert cut["max_model_len"] == 256
    bare = client.post("/tokenize", {"prompt": TEXT, "add_special_tokens": False}).json()
    assert client.post("/detokenize", {"tokens": bare["tokens"]}).json() == {"prompt": TEXT}


def test_a_conversation_is_cut_as_the_model_reads_it(client: AsgiClient) -> None:
    messages = [{"role": "user", "content": "hello"}]
    cut = client.post("/tokenize", {"messages": messages}).json()
    asked = {"messages": messages, "max_tokens": 1}
    usage = client.post("/v1/chat/completions", asked).json()["usage"]
    assert cut["count"] == usage["prompt_tokens"]
    text = client.post("/detokenize", {"tokens": cut["tokens"]}).json()["prompt"]
    assert "hello" in text


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/tokenize", {}, "either a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user"}]}, "either"),
        ("/tokenize", {"messages": []}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"},
            "--trust-request-chat-template",
        ),
        ("/detokenize", {"tokens": [99999]}, "99999"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    client: AsgiClient, path: str, body: dict[str, Any], word: str
) -> None:
    answer = client.post(path, body)
    assert answer.status == 400
    assert word in answer.error["message"]


def test_health_is_an_empty_200_until_the_engine_dies(served: AsyncLLM, client: AsgiClient) -> None:
    for path in ("/health", "/ping"):
        answer = client.get(path)
        assert (answer.status, answer.body) == (200, b"")
    served.dead_error = EngineDeadError("it fell over")
    try:
        for path in ("/health", "/ping"):
            answer = client.get(path)
            assert answer.status == 503
            assert "it fell over" in answer.error["message"]
    finally:
        served.dead_error = None


def test_version_and_load(client: AsgiClient) -> None:
    assert client.get("/version").json() == {"version": jaxengine.__version__}
    assert client.get("/load").json() == {"server_load": 1}  # the one that asks


def metric(text: str, name: str) -> float:
    lines = [line for line in text.split("\n") if line.startswith(f"vllm:{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_metrics_count_what_has_passed(client: AsgiClient) -> None:
    before = client.get("/metrics")
    assert before.headers["content-type"].startswith("text/plain; version=0.0.4")
    body = {"prompt": TEXT, "max_tokens": 6, "ignore_eos": True, "seed": 0}
    usage = client.post("/v1/completions", body).json()["usage"]
    client.post("/v1/completions", {**body, "stream": True})
    text = client.get("/metrics").body.decode()
    assert 'model_name="tiny"' in text
    assert metric(text, "prompt_tokens_total") == 2 * usage["prompt_tokens"]
    assert metric(text, "generation_tokens_total") == 12
    assert metric(text, "request_success_total") == 2
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert metric(text, f"{name}_count") == 2
        assert metric(text, f"{name}_sum") > 0
    assert metric(text, "inter_token_latency_seconds_count") > 0
    assert metric(text, "cache_config_info") == 1


def test_the_page_and_the_docs_ask_nobody_else(client: AsgiClient) -> None:
    page = client.get("/")
    assert page.status == 200
    assert page.headers["content-type"].startswith("text/html")
    for name in ("page.js", "page.css", "api.js", "markdown.js", "engine.js"):
        file = client.get(f"/{name}")
        assert file.status == 200
        assert b"https://" not in file.body
    assert b"https://" not in page.body
    assert client.get("/docs").status == 200
    schema = client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/responses"} <= set(schema["paths"])


def test_everything_that_the_page_loads_is_there_and_open(new_client: NewClient) -> None:
    client = new_client(api_key=["secret"])
    page = client.get("/").body.decode()
    names = re.findall(r'(?:href|src)="([^"#:]+)"', page)
    assert len(names) == 2
    while names:
        answer = client.get(f"/{names.pop()}")
        assert answer.status == 200
        names += re.findall(r'^import .* from "\./(.+)";', answer.body.decode(), re.MULTILINE)


def test_the_docs_can_be_left_out(new_client: NewClient) -> None:
    client = new_client(disable_fastapi_docs=True)
    assert client.get("/docs").status == 404
    assert client.get("/openapi.json").status == 404


def test_development_routes_are_there_on_demand_only(new_client: NewClient) -> None:
    plain, dev = new_client(), new_client(server_dev_mode=True)
    assert plain.post("/reset_prefix_cache").status in (404, 405)
    assert dev.post("/reset_prefix_cache").status == 200
    assert dev.get("/server_info").json()["max_model_len"] == 256


def test_a_request_id_comes_back_if_wanted(new_client: NewClient) -> None:
    client = new_client(enable_request_id_headers=True)
    headers = {"x-request-id": "mine"}
    assert client.get("/version", headers=headers).headers["x-request-id"] == "mine"
    assert len(client.get("/version").headers["x-request-id"]) == 32
    answer = client.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
    assert answer.json()["id"] == "cmpl-mine"


def test_pages_of_other_origins_are_let_in_as_told(new_client: NewClient) -> None:
    client = new_client(allowed_origins=["http://a.example"])
    allowed = client.get("/version", headers={"origin": "http://a.example"})
    assert allowed.headers["access-control-allow-origin"] == "http://a.example"
    other = client.get("/version", headers={"origin": "http://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_preflight_needs_no_key(new_client: NewClient) -> None:
    client = new_client(api_key=["secret"])
    headers = {"origin": "http://a.example", "access-control-request-method": "POST"}
    answer = client.request("OPTIONS", "/v1/completions", headers=headers)
    assert answer.status == 200
    assert "POST" in answer.headers["access-control-allow-methods"]


def test_the_document_names_every_path_and_flag(new_client: NewClient) -> None:
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    schema = new_client(server_dev_mode=True).get("/openapi.json").json()
    assert [path for path in schema["paths"] if path not in text] == []
    flags = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(ServerSettings)]
    assert [flag for flag in flags if f"`{flag}" not in text] == []
