"""ServerSettings: every flag of ``serve`` that is not the engine's. Standard library only."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """How the server listens, whom it lets in, and what it allows them; in vLLM's spelling.

    Attributes:
        host: Address to listen on; None is all of them.
        port: TCP port.
        uds: Path of a unix socket to listen on instead.
        root_path: Path under which a proxy shows the server.
        served_model_name: Names that requests may give; None is the model's own. The first is
            the one that answers bear.
        api_key: Keys, one of which every request must bring ("Authorization: Bearer KEY"). None
            reads the environment variable VLLM_API_KEY.
        ssl_keyfile: Private key for TLS.
        ssl_certfile: Certificate for TLS.
        ssl_ca_certs: Certificates that clients' ones are checked with.
        ssl_cert_reqs: Whether clients need a certificate: 0 no, 1 may bring one, 2 must.
        allowed_origins: Web pages that may call the server (CORS), as a JSON list.
        allowed_methods: Their methods, as a JSON list.
        allowed_headers: Their headers, as a JSON list.
        allow_credentials: Whether they may send cookies.
        chat_template_content_format: What the chat template takes as content: auto, string, openai.
        default_chat_template_kwargs: Variables of the template for every request.
        trust_request_chat_template: Let requests bring a template of their own.
        response_role: Role of the answers.
        tool_call_parser: How the model writes its tool calls: hermes, llama3_json, mistral,
            pythonic, qwen3_coder, deepseek_v3 or openai.
        enable_auto_tool_choice: Let the model choose whether to call tools.
        return_tokens_as_token_ids: Write the tokens of logprobs as "token_id:7".
        enable_force_include_usage: End every stream with its usage.
        enable_prompt_tokens_details: Accepted: usage always says how many tokens were cached.
        sse_keep_alive_interval: Seconds after which a silent stream gets a comment; 0 for none.
        enable_log_requests: Write every request's parameters to the log.
        max_log_len: Characters of a prompt in the log; None is all of it.
        enable_request_id_headers: Answer with the header X-Request-Id.
        disable_fastapi_docs: Serve neither /docs nor /openapi.json.
        disable_uvicorn_access_log: Do not write a line for every request.
        uvicorn_log_level: debug, info, warning, error or critical.
        api_server_count: Processes that speak HTTP.
        max_num_queued_reqs: Requests that may wait; further ones are answered with 503.
        max_num_queued_tokens: Prompt tokens of requests that are not done; likewise. None is any.
        max_request_body_bytes: Longest body; longer ones are answered with 413.
        max_completion_prompts: Most prompts in one request.
        max_n: Most outputs of a prompt.
        max_stop_strings: Most stop strings of a request.
        request_timeout_s: Longest time for a request's headers and body to arrive.
        max_stored_responses: Answers of /v1/responses that are kept; the oldest one goes first.
        engine_step_timeout_s: Longest time of a step; then the server ends and says where it hung.
        shutdown_timeout: Seconds that running requests get after SIGTERM.
        server_dev_mode: Also serve /reset_prefix_cache, /server_info and the profiler.
    """

    host: str | None = None
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    served_model_name: Sequence[str] | None = None
    api_key: Sequence[str] | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    ssl_cert_reqs: int = 0
    allowed_origins: Sequence[str] = ("*",)
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    chat_template_content_format: str = "auto"
    default_chat_template_kwargs: Mapping[str, Any] | None = None
    trust_request_chat_template: bool = False
    response_role: str = "assistant"
    tool_call_parser: str = ""
    enable_auto_tool_choice: bool = False
    return_tokens_as_token_ids: bool = False
    enable_force_include_usage: bool = False
    enable_prompt_tokens_details: bool = True
    sse_keep_alive_interval: float = 0.0
    enable_log_requests: bool = False
    max_log_len: int | None = None
    enable_request_id_headers: bool = False
    disable_fastapi_docs: bool = False
    disable_uvicorn_access_log: bool = False
    uvicorn_log_level: str = "info"
    api_server_count: int = 1
    max_num_queued_reqs: int = 10_000
    max_num_queued_tokens: int | None = None
    max_request_body_bytes: int = 32 << 20
    max_completion_prompts: int = 1024
    max_n: int = 128
    max_stop_strings: int = 16
    request_timeout_s: float = 60.0
    max_stored_responses: int = 1000
    engine_step_timeout_s: float = 300.0
    shutdown_timeout: float = 300.0
    server_dev_mode: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked alone."""
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: it must lie between 0 and 65535")
        for name in (
            *("api_server_count", "max_request_body_bytes", "max_completion_prompts"),
            *("max_n", "max_stop_strings", "max_num_queued_reqs"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("request_timeout_s", "engine_step_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.enable_auto_tool_choice and not self.tool_call_parser:
            raise ValueError("enable_auto_tool_choice needs --tool-call-parser")
        for name in ("served_model_name", "api_key"):
            if any(not each for each in getattr(self, name) or ()):
                raise ValueError(f"{name} holds an empty text: leave it out")
