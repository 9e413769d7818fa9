"""LLMEngine and EngineArgs: vLLM's step-by-step interface, over an LLM."""

import types
from collections.abc import Sequence
from typing import Any

from jaxengine.compat.engine_args import resolve_engine_args
from jaxengine.compat.model_config import ServedModelConfig
from jaxengine.config import EngineConfig
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.prompts import Prompt


class EngineArgs(types.SimpleNamespace):
    """Engine arguments of vLLM, by name: ``EngineArgs(model, max_model_len=4096)``.

    Raises:
        TypeError: If vLLM has no such argument.
        ValueError: If one asks for what is not there.
    """

    def __init__(self, model: str, **arguments: Any) -> None:
        super().__init__(model=model, **arguments)
        self.create_engine_config()

    def create_engine_config(self) -> EngineConfig:
        """Return the arguments as the engine takes them."""
        arguments = dict(vars(self))
        return EngineConfig(model=str(arguments.pop("model")), **resolve_engine_args(arguments))


class LLMEngine:
    """Requests in, and after each step the outputs that are new.

    Args:
        llm: Whose engine this is. Its own calls go on beside it.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._request_ids: set[str] = set()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **_: Any) -> "LLMEngine":
        """Load a model."""
        from jaxengine.llm import LLM  # which has an LLMEngine itself

        return LLM.from_engine_args(engine_args).llm_engine

    @property
    def model_config(self) -> ServedModelConfig:
        """The model served."""
        return self._llm.model_config

    def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer."""
        return self._llm.get_tokenizer()

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Any = None,
        priority: int = 0,
    ) -> str:
        """Queue a request; ``step`` brings its outputs.

        Raises:
            ValueError: If it is not possible, or the id is in use. Nothing has changed then.
        """
        self._llm.add_request(
            prompt,
            params,
            request_id=request_id,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
            priority=priority,
        )
        self._request_ids.add(request_id)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step, and return the new outputs."""
        outputs = self._llm.step()
        self._request_ids -= {output.request_id for output in outputs if output.finished}
        return outputs

    def abort_request(self, request_ids: Sequence[str] | str) -> None:
        """End requests; no outputs come for them any more."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self._llm.abort_request(request_id)
            self._request_ids.discard(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether outputs are still to come."""
        return bool(self._request_ids)

    def get_num_unfinished_requests(self) -> int:
        """How many requests still wait for outputs."""
        return len(self._request_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; returns False if requests still run."""
        return self._llm.reset_prefix_cache()
