"""The families that come with the engine, by architecture; others are registered beside them."""

from __future__ import annotations

from jaxengine.convert.families import deci, falcon, gemma, gpt2, llama, phi
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import ModelSpec

_MODULES = (llama, gpt2, phi, gemma, falcon, deci)
_families: dict[str, Family] = {
    architecture: family
    for module in _MODULES
    for family in module.FAMILIES
    for architecture in family.architectures
}

OUT_OF_SCOPE = (
    "ForConditionalGeneration", "Whisper", "Speech", "Bark", "TTS", "Tts", "Vits", "Musicgen",
    "Vision", "VL", "Llava", "Audio", "Wav2Vec", "Kokoro", "Clip", "CLIP",
)  # fmt: skip


def register_family(family: Family) -> None:
    """Make checkpoints of a family readable. A later call for the same architecture wins."""
    for architecture in family.architectures:
        _families[architecture] = family


def supported_architectures() -> list[str]:
    """Names of the architectures that can be read."""
    return sorted(_families)


def family_of(config: Config) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: If it names none, or none that is known.
    """
    return _families[architecture_of(config)]


def architecture_of(config: Config) -> str:
    """The first of the config's architectures that is supported.

    Raises:
        ValueError: If it names none, or none that is known.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list | tuple) or not architectures:
        raise ValueError(
            "config.json names no architecture: add an 'architectures' list to it, with one of "
            f"{', '.join(supported_architectures())}"
        )
    for architecture in architectures:
        if isinstance(architecture, str) and architecture in _families:
            return architecture
    raise ValueError(_unsupported(str(architectures[0])[:100], "auto_map" in config))


def model_spec(config: Config) -> ModelSpec:
    """The spec of a config.json, overrides applied.

    Raises:
        ValueError: If the architecture is not supported, or a field is missing or makes no sense.
    """
    architecture = architecture_of(config)
    return _families[architecture].spec({**config, "architectures": [architecture]})


def _unsupported(architecture: str, has_remote_code: bool) -> str:
    supported = ", ".join(supported_architectures())
    reason = (
        f"config.json: the architecture {architecture} is not supported; supported: {supported}"
    )
    if any(word in architecture for word in OUT_OF_SCOPE):
        reason = (
            f"{architecture} is a multimodal, speech or text-to-speech architecture: these are "
            f"out of scope, only text models are served. Supported: {supported}"
        )
    if has_remote_code:
        reason += ". The model brings its own code (auto_map), which is never run"
    return f"{reason}. Others can be added with jaxengine.ModelRegistry.register_model"
