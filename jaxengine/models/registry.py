"""HF architecture -> model class. Outside packages add theirs with ``ModelRegistry``."""

from collections.abc import Callable

from flax import nnx

from jaxengine import convert
from jaxengine.config import ModelConfig
from jaxengine.models.decoder import ModelOptions
from jaxengine.models.llama import LlamaForCausalLM
from jaxengine.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM

ModelFactory = Callable[[ModelConfig, ModelOptions], nnx.Module]


class ModelRegistry:
    """The models that can be served.

    A model is called as ``Decoder`` is: ``model(batch, caches, hidden)`` and ``compute_logits``.
    """

    _models: dict[str, ModelFactory] = {  # noqa: RUF012 - the one registry is meant to be shared
        "LlamaForCausalLM": LlamaForCausalLM,
        "LLaMAForCausalLM": LlamaForCausalLM,
        "MistralForCausalLM": LlamaForCausalLM,
        "Qwen2ForCausalLM": Qwen2ForCausalLM,
        "Qwen3ForCausalLM": Qwen3ForCausalLM,
    }

    @classmethod
    def register_model(
        cls, architecture: str, model: ModelFactory, rules: Callable | None = None
    ) -> None:
        """Add or replace a model.

        Args:
            architecture: The name in the checkpoint's ``architectures``.
            model: Class (or function) that builds the module from config and options.
            rules: The table that maps the checkpoint's tensors, as in ``convert/llama.py``; None
                if ``convert`` has one for the architecture already.
        """
        cls._models[architecture] = model
        if rules is not None:
            convert.register_family(architecture, rules)

    @classmethod
    def supported(cls) -> list[str]:
        """Names of the architectures that can be served."""
        return sorted(cls._models)

    @classmethod
    def resolve(cls, architecture: str) -> ModelFactory:
        """Return the class of an architecture.

        Raises:
            ValueError: If there is none, naming those there are.
        """
        if architecture not in cls._models:
            raise ValueError(
                f"architecture {architecture!r} is not supported; supported are "
                f"{', '.join(cls.supported())}. Text-to-speech and other multimodal models are out "
                "of scope; others can be added with jaxengine.ModelRegistry.register_model"
            )
        return cls._models[architecture]
