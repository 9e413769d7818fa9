"""Bad input: an error that names the value, the limit and the remedy; then the engine goes on."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from tests.helpers import (
    assert_idle,
    greedy,
    make_llm,
    output_ids,
    random_prompts,
    save_tiny_model,
    with_scheduler,
)

GOOD = random_prompts(5, 20)


@pytest.fixture
def serving(llm: LLM) -> Iterator[LLM]:
    """An engine that must give the same tokens after the test as before it."""
    expected = output_ids(llm.generate(GOOD, greedy(6), use_tqdm=False))
    yield llm
    assert_idle(llm)
    assert output_ids(llm.generate(GOOD, greedy(6), use_tqdm=False)) == expected


# Requests.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([10] * 256, r"256 tokens, .*max_model_len \(256\).*shorten the prompt$"),
        ([10] * 5000, r"5000 tokens"),
        ("x " * 300, "tokens, which leaves no room for output"),
        ([], "prompt is empty; give at least one token"),
        ("", "prompt is empty"),
        ([5, 160], r"token id 160 is not in the vocabulary of 160; tokenize with this model"),
        ([5, -1], "token id -1"),
        ([5, 2**40], f"token id {2**40}"),
    ],
    ids=lambda value: f"{len(value)} long" if not isinstance(value, str) else None,
)
def test_a_prompt_that_cannot_run_is_refused(serving: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serving.generate([prompt], greedy(3), use_tqdm=False)
    with pytest.raises(ValueError, match=message):
        next(serving.stream(prompt, greedy(3)))


@pytest.mark.parametrize("bad", [[10] * 300, [], [999]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_prompt_in_a_list_means_that_none_has_run(
    serving: LLM, bad: list[int], place: int
) -> None:
    prompts = [*GOOD[:place], bad, *GOOD[place:]]
    steps = serving.engine.scheduler._num_scheduled_steps
    with pytest.raises(ValueError, match=r"prompt (has 300|is empty|\d: token)"):
        serving.generate(prompts, greedy(3), use_tqdm=False)
    assert serving.engine.scheduler._num_scheduled_steps == steps
    assert not serving.engine.has_unfinished_requests


def test_a_bad_prompt_beside_several_outputs_leaves_none_of_them_behind(serving: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=3)
    with pytest.raises(ValueError, match="prompt is empty"):
        serving.generate([GOOD[0], []], params, use_tqdm=False)
    assert not serving.engine.has_unfinished_requests


def test_a_bad_prompt_does_not_disturb_a_stream(serving: LLM) -> None:
    expected = output_ids(serving.generate(GOOD[:1], greedy(6), use_tqdm=False))
    stream = serving.stream(GOOD[0], greedy(6))
    next(stream)
    with pytest.raises(ValueError, match="prompt is empty"):
        serving.generate([[]], greedy(3), use_tqdm=False)
    assert [list(stream)[-1].outputs[0].token_ids] == expected


def test_a_prompt_that_fills_the_model_but_for_one_token_runs(serving: LLM) -> None:
    (output,) = serving.generate([[10] * 255], greedy(5), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_a_prompt_larger_than_the_whole_cache_is_refused(chat_model: Path) -> None:
    llm = make_llm(chat_model, num_gpu_blocks_override=4)
    with pytest.raises(ValueError, match=r"49 tokens and needs 4 KV blocks .* only 3; raise --gpu"):
        llm.generate([[10] * 49], greedy(3), use_tqdm=False)
    (output,) = llm.generate([[10] * 48], greedy(3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1  # its K/V fill the cache


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 10**6}, r"n must be at most \d+, got 1000000"),
        ({"n": 1.5}, "n must be an integer, got 1.5"),
        ({"n": 2, "temperature": 0.0}, "n must be 1 when temperature is 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -5}, "max_tokens must be at least 1, got -5"),
        ({"max_tokens": "8"}, "max_tokens must be an integer, got '8'"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) must not be above max_tokens \(8"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
    ],
    ids=str,
)
def test_sampling_parameters_out_of_bounds_are_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logprobs": 21}, "logprobs 21 is more than max_logprobs 20.*--max-logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs 160 is more than max_logprobs 20"),
        ({"stop_token_ids": [160]}, "stop_token_ids holds 160, .*vocabulary of 160"),
        ({"logit_bias": {500: 1.0}}, "logit_bias holds 500"),
        ({"allowed_token_ids": [3, 161]}, "allowed_token_ids holds 161"),
        ({"logprob_token_ids": [160]}, "logprob_token_ids holds 160"),
    ],
    ids=str,
)
def test_sampling_parameters_that_this_model_cannot_serve_are_refused(
    serving: LLM, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        serving.generate(GOOD, SamplingParams(**fields), use_tqdm=False)


def test_max_tokens_beyond_the_model_ends_at_the_models_limit(serving: LLM) -> None:
    (output,) = serving.generate([[10] * 250], greedy(10**6), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_params": [greedy(3)]}, "1 sampling_params were given for 2 prompts"),
        ({"sampling_params": greedy(3), "priority": [1]}, "1 priorities were given for 2 prompts"),
    ],
)
def test_lists_of_another_length_than_the_prompts_are_refused(
    serving: LLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        serving.generate(GOOD, use_tqdm=False, **options)


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (
            [{"role": "user", "content": "a"}],
            {"continue_final_message": True},
            "exclude each other",
        ),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template": "{{ raise_exception('no') }}"},
            "no",
        ),
        ([{"role": "user", "content": "a"}], {"chat_template": "{% if %}"}, "refused"),
    ],
)
def test_messages_that_the_template_cannot_write_are_refused(
    serving: LLM, messages: list[dict], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        serving.chat(messages, greedy(3), use_tqdm=False, **options)


# Models.


@pytest.fixture
def broken_model(chat_model: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(chat_model, tmp_path / "model"))


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: v for name, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    "architecture",
    ["XLNetLMHeadModel", "PaliGemmaForConditionalGeneration", "ParlerTTSForConditionalGeneration"],
)
def test_an_unsupported_architecture_is_named_with_where_the_supported_ones_are_listed(
    broken_model: Path, architecture: str
) -> None:
    change_config(broken_model, architectures=[architecture])
    with pytest.raises(ValueError, match=architecture) as error:
        make_llm(broken_model)
    message = str(error.value)
    assert "docs/supported-models.md lists them all" in message
    assert ("out of scope" in message) == architecture.endswith("ForConditionalGeneration")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": None}, "config.json names no architecture"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: an integer between 1 and 4096"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 KV heads"),
        ({"hidden_act": "snake"}, "activation 'snake' is not supported: use one of .*silu"),
        ({"intermediate_size": 64}, r"mlp\.\w+.*(48|64)"),
        ({"num_hidden_layers": 4}, r"layers\.3\."),
        ({"num_hidden_layers": 2}, r"layers\.2\."),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    broken_model: Path, fields: dict[str, Any], message: str
) -> None:
    change_config(broken_model, **fields)
    with pytest.raises(ValueError, match=message):
        make_llm(broken_model)


def test_code_from_a_checkpoint_is_refused_with_the_reason(chat_model: Path) -> None:
    with pytest.raises(ValueError, match="refused: jaxengine never runs code from a checkpoint"):
        make_llm(chat_model, trust_remote_code=True)


@pytest.mark.parametrize("kept_bytes", [0, 4, 300, -1])
def test_a_truncated_checkpoint_is_refused(broken_model: Path, kept_bytes: int) -> None:
    file = broken_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        make_llm(broken_model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_corrupt_file_beside_the_weights_is_refused(broken_model: Path, name: str) -> None:
    (broken_model / name).write_text('{"cut off": [1, 2')
    with pytest.raises(ValueError, match=r"JSON|tokenizer") as error:
        make_llm(broken_model)
    assert name.split(".")[0].split("_")[0] in str(error.value)


def test_a_model_without_a_tokenizer_says_what_to_pass(broken_model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken_model / name).unlink()
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded .*Pass tokenizer="):
        make_llm(broken_model)


def test_a_gguf_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"model\.gguf"):
        make_llm(file)


def test_a_hub_that_cannot_be_reached_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no local path.*hub.*not be reached"):
        make_llm("nobody/nothing")


def test_a_path_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-model"):
        make_llm(tmp_path / "no-such-model")


# Engine arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int7"}, "dtype 'int7' is not supported: use one of auto, bfloat16"),
        ({"max_model_len": 257}, "max_model_len 257 is more than the 256 positions"),
        ({"max_num_seqs": 32}, "max_num_batched_tokens 16 is less than max_num_seqs 32"),
        ({"load_format": "gguf"}, "holds safetensors weights, not 'gguf'.*--load-format auto"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3"),
        ({"num_gpu_blocks_override": 1}, "at least 2 are needed"),
    ],
    ids=str,
)
def test_engine_arguments_that_cannot_be_met_are_refused(
    chat_model: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_llm(chat_model, **arguments)


def test_a_cache_larger_than_memory_says_what_was_needed_and_what_to_turn(
    chat_model: Path,
) -> None:
    with pytest.raises(ValueError, match=r"not enough memory: .* GiB do not fit into .* GiB.*--kv"):
        make_llm(
            chat_model,
            num_gpu_blocks_override=None,
            kv_cache_memory_bytes=1 << 50,
            max_num_seqs=16,
            hf_overrides={"max_position_embeddings": 1 << 28},
        )


def test_weights_that_are_not_numbers_do_not_hang_the_engine(tmp_path: Path) -> None:
    import torch

    model = save_tiny_model(tmp_path, "Llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    llm = make_llm(tmp_path, skip_tokenizer_init=True)
    for params in (greedy(4), SamplingParams(max_tokens=4, ignore_eos=True, top_p=0.9, top_k=5)):
        (tokens,) = output_ids(llm.generate([[10, 11]], params, use_tqdm=False))
        assert len(tokens) == 4
        assert np.all((np.array(tokens) >= 0) & (np.array(tokens) < 128))


def test_a_longer_limit_is_proposed_only_where_the_model_has_one(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"max_model_len \(256\); shorten the prompt$"):
        llm.generate([[10] * 300], greedy(2), use_tqdm=False)
    shorter = with_scheduler(llm, max_model_len=64)
    with pytest.raises(ValueError, match=r"\(64\); shorten the prompt or raise --max-model-len$"):
        shorter.generate([[10] * 100], greedy(2), use_tqdm=False)


def test_a_cache_of_less_than_two_blocks_says_what_two_take(chat_model: Path) -> None:
    message = r"kv_cache_memory_bytes 1000 is less than two KV blocks of 16 tokens, \d+ bytes"
    with pytest.raises(ValueError, match=message):
        make_llm(chat_model, num_gpu_blocks_override=None, kv_cache_memory_bytes=1000)


def test_a_tokenizer_that_is_not_there_is_called_missing(chat_model: Path, tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none"):
        with pytest.raises(ValueError, match=f"the tokenizer '{name}' is missing"):
            make_llm(chat_model, tokenizer=name)
    with pytest.raises(ValueError, match=r"'\./none' is missing"):
        make_llm("./none")


def test_a_platform_without_a_device_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from jaxengine.process import check_devices

    def fail() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda': no device")

    check_devices()
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        ValueError, match=r"JAX_PLATFORMS=cuda\): .*no device\. Set JAX_PLATFORMS=c"
    ):
        check_devices()


def test_the_cache_of_a_cpu_follows_the_model_within_its_limits() -> None:
    from jaxengine.engine.device.memory import GIB, default_cpu_cache_bytes

    sizes = [default_cpu_cache_bytes(64 * GIB, size * GIB // 8) for size in (1, 8, 80)]
    assert sizes == [GIB // 2, GIB, 4 * GIB]
    assert default_cpu_cache_bytes(GIB, GIB) == GIB // 4
