"""Command-line flags, made from the fields of EngineConfig and SamplingParams.

A field added there is a flag here, with the help text of its docstring.
"""

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxengine.compat.engine_args import ROWS, Row, whole_number
from jaxengine.compat.similar_names import did_you_mean
from jaxengine.config import EngineConfig
from jaxengine.sampling_params import SamplingParams

# Sampling parameters that make sense on a command line.
SAMPLING_FIELDS = (
    *("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
    *("skip_special_tokens", "logprobs", "prompt_logprobs", "logit_bias", "bad_words"),
    *("allowed_token_ids",),
)
REPEATED_FIELDS = {"stop": str, "stop_token_ids": int, "bad_words": str, "allowed_token_ids": int}
ALIASES = {
    "tensor_parallel_size": ["-tp"],
    "pipeline_parallel_size": ["-pp"],
    "data_parallel_size": ["-dp"],
    "quantization": ["-q"],
    "optimization_level": ["-O"],
    "compilation_config": ["-cc"],
}


def hyphenate(arguments: Sequence[str]) -> list[str]:
    """Spell ``--foo_bar`` as ``--foo-bar``, up to a lone ``--``."""
    arguments = list(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return [_hyphenate_flag(argument) for argument in arguments[:end]] + arguments[end:]


def _hyphenate_flag(argument: str) -> str:
    match = re.match(r"--[\w-]+(?==|$)", argument)
    return argument if match is None else match[0].replace("_", "-") + argument[match.end() :]


class Parser(argparse.ArgumentParser):
    """A parser whose error for a misspelt flag says which one may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end with status 2."""
        flags = re.match(r"unrecognized arguments: .*?(--[\w-]+)", message)
        if flags is not None:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            message += did_you_mean(flags[1], known)
        super().error(message)


def human_int(text: str) -> int:
    """Read an integer with an optional suffix: 32k is 32000, 32K is 32768."""
    try:
        return int(whole_number(text, "the value"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def any_value(text: str) -> Any:
    """Read JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of EngineConfig but the model, and for vLLM's other ones."""
    group = parser.add_argument_group("engine")
    helps = field_helps(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model":
            add_field(group, field, helps.get(field.name, ""), _default_of(field))
    foreign = parser.add_argument_group(
        "vLLM's other flags",
        "are taken, too: docs/coming-from-vllm.md says of each whether it makes a difference.",
    )
    for row in ROWS:
        _add_row(foreign, row)


def add_sampling_arguments(
    parser: argparse.ArgumentParser, defaults: Mapping[str, Any] | None = None
) -> None:
    """Add a flag for the sampling parameters; those not given keep the model's defaults.

    Args:
        parser: Gets the flags.
        defaults: Of this command, where they differ from ``SamplingParams``.
    """
    group = parser.add_argument_group(
        "sampling", "Defaults are those of the model's generation config, else these."
    )
    helps = field_helps(SamplingParams)
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    for name in SAMPLING_FIELDS:
        default = (defaults or {}).get(name, _default_of(fields[name]))
        add_field(group, fields[name], helps.get(name, ""), default)


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the engine flags that were given, vLLM's other ones among them."""
    names = (field.name for field in dataclasses.fields(EngineConfig) if field.name != "model")
    return _given(options, (*names, *(row.name for row in ROWS)))


def sampling_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling flags that were given."""
    return _given(options, SAMPLING_FIELDS)


def _given(options: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _add_row(group: Any, row: Row) -> None:
    """Add a flag of vLLM's; it stands in no help, or the help would be about little else."""
    options: dict[str, Any] = {
        "dest": row.name,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    is_switch = isinstance(row.default, bool) or (
        row.default is None and row.name.startswith(("enable_", "disable_"))
    )
    options |= {"action": argparse.BooleanOptionalAction} if is_switch else {"type": any_value}
    flags = ["--" + row.name.replace("_", "-"), *ALIASES.get(row.name, [])]
    group.add_argument(*flags, **options)


def add_field(group: Any, field: dataclasses.Field[Any], help_text: str, default: Any) -> None:
    """Add a flag for a field of a dataclass; one that is not given is no attribute."""
    flags = ["--" + field.name.replace("_", "-"), *ALIASES.get(field.name, [])]
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    options["help"] = f"{help_text} (default: {default!r})".replace("%", "%%")
    annotation = str(field.type)
    if field.name in REPEATED_FIELDS:
        options |= {"action": "append", "type": REPEATED_FIELDS[field.name]}
        options["help"] = "May be repeated: " + options["help"]
    elif field.default in (True, False) and isinstance(field.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif "Mapping" in annotation:
        options |= {"type": json_object, "metavar": "JSON"}
    elif re.search(r"\bint\b", annotation):
        options |= {"type": human_int, "metavar": "N"}
    elif re.search(r"\bfloat\b", annotation):
        options |= {"type": float, "metavar": "X"}
    group.add_argument(*flags, **options)


def field_helps(cls: type) -> dict[str, str]:
    """Read the field descriptions of a class out of its Google-style docstring."""
    doc = inspect.getdoc(cls) or ""
    section = re.search(r"^(?:Attributes|Args):\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^    (\w+): ((?:.*\n?)(?:     +.*\n?)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
