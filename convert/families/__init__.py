"""The families that come with the engine, by architecture; others are registered beside them."""

from __future__ import annotations

import difflib

from jaxengine.convert.families import (
    baichuan,
    bloom,
    chatglm,
    cohere,
    deci,
    encoders,
    exaone,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite_moe,
    hunyuan,
    internlm,
    llama,
    llama_variants,
    mixtures,
    mpt,
    multimodal,
    nemotron,
    olmo,
    opt,
    persimmon,
    phi,
    phi3,
    phimoe,
    qwen,
    stablelm,
    starcoder2,
    telechat,
)
from jaxengine.convert.families.family import Family
from jaxengine.convert.families.fields import Config
from jaxengine.convert.model_spec import ModelSpec

_MODULES = (
    *(llama, llama_variants, gemma, phi, phi3, olmo, cohere, glm, chatglm, internlm, exaone),
    *(stablelm, starcoder2, nemotron, hunyuan, persimmon, baichuan, qwen, telechat, deci, falcon),
    *(gpt2, gpt_bigcode, gpt_neo, gptj, gpt_neox, opt, bloom, mpt, multimodal),
    *(mixtures, phimoe, granite_moe, gpt_oss, encoders),
)
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


def built_in_families() -> list[Family]:
    """The families that come with the engine, in the order of the documents."""
    return [family for module in _MODULES for family in module.FAMILIES]


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
            "config.json names no architecture: add an 'architectures' list to it, such as "
            "['LlamaForCausalLM'] (docs/supported-models.md lists the names)"
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
    nearest = difflib.get_close_matches(architecture, _families, n=4, cutoff=0.6)
    reason = f"config.json: the architecture {architecture} is not supported"
    if any(word in architecture for word in OUT_OF_SCOPE):
        reason = (
            f"{architecture} is a multimodal, speech or text-to-speech architecture: these are "
            "out of scope, only text models are served"
        )
    reason += f"; the nearest of those that are: {', '.join(nearest)}" if nearest else ""
    if has_remote_code:
        reason += ". The model brings its own code (auto_map), which is never run"
    return (
        f"{reason}. docs/supported-models.md lists them all; others are added with "
        "jaxengine.ModelRegistry.register_model (docs/adding-a-model.md)"
    )
