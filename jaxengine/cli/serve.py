"""``jaxengine serve``: flags and a file of them -> EngineConfig and ServerSettings."""

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxengine.cli.arguments import (
    Parser,
    add_engine_arguments,
    add_field,
    any_value,
    engine_arguments,
    field_helps,
    hyphenate,
)
from jaxengine.compat.engine_args import resolve_engine_args
from jaxengine.config import EngineConfig
from jaxengine.server.settings import ServerSettings

# Lists that are given as values behind one flag, or by repeating it.
LISTS = ("served_model_name", "api_key")
JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")


def serve_parser(prog: str = "jaxengine serve") -> argparse.ArgumentParser:
    """Return the parser: the server's flags, the engine's, and those of vLLM that are known."""
    parser = Parser(
        prog=prog,
        description="Serve a model in the form of OpenAI's API.",
        allow_abbrev=False,
        conflict_handler="resolve",  # what offline use has no need of has a meaning here
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="hub name, directory or file")
    parser.add_argument("--model", metavar="MODEL", help="the same, as a flag")
    parser.add_argument("--config", type=Path, metavar="FILE", help="flags as YAML: name: value")
    add_engine_arguments(parser)
    group, helps = parser.add_argument_group("server"), field_helps(ServerSettings)
    for field in dataclasses.fields(ServerSettings):
        flag, text = "--" + field.name.replace("_", "-"), helps[field.name].replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if field.name in LISTS:
            group.add_argument(flag, **options, nargs="+", action="extend", metavar="TEXT")
        elif field.name in JSON_LISTS:
            group.add_argument(flag, **options, type=_json_list, metavar="JSON")
        else:
            add_field(group, field, helps[field.name], field.default)
    return parser


def parse_serve(arguments: Sequence[str]) -> tuple[EngineConfig, ServerSettings]:
    """Read the flags.

    Raises:
        ValueError: If one is not possible, or there is no model.
    """
    parser = serve_parser()
    options = parser.parse_args(single_dashes(arguments, parser))
    if options.config is not None:
        for name, value in _read_file(options.config, parser).items():
            if getattr(options, name, None) is None:  # the command line goes before the file
                setattr(options, name, value)
    tag, model = options.model_tag, options.model
    if tag is not None and model is not None and tag != model:
        raise ValueError(f"two models are given, {tag!r} and {model!r}: leave one out")
    if (tag or model) is None:
        raise ValueError("no model is given: jaxengine serve MODEL")
    names = [field.name for field in dataclasses.fields(ServerSettings)]
    own = {name: getattr(options, name) for name in names if hasattr(options, name)}
    engine = {k: v for k, v in engine_arguments(options).items() if k not in names}
    config = EngineConfig(model=os.fspath(tag or model), **resolve_engine_args(engine))
    return config, ServerSettings(**own)


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal comes; return the exit status."""
    from jaxengine.server.launcher import serve  # loads the web framework

    return serve(*parse_serve(arguments))


def single_dashes(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Spell ``-tensor-parallel-size`` with two dashes, where there is such a flag."""
    known = parser._option_string_actions
    result = []
    for argument in hyphenate(arguments):
        flag = argument.split("=", 1)[0].replace("_", "-")
        is_long = len(flag) > 2 and flag[0] == "-" and flag[1] != "-"
        doubled = is_long and flag not in known and "-" + flag in known
        result.append("-" + argument if doubled else argument)
    return hyphenate(result)


def _json_list(text: str) -> list[str]:
    value = any_value(text)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of texts")
    return value


def _read_file(file: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Read flags from YAML; what stands on the command line goes before them.

    Raises:
        ValueError: If it cannot be read, or holds what is no flag.
    """
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {str(file)!r} cannot be read: {error}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"--config {str(file)!r} must hold names and values")
    known = {action.dest for action in parser._actions}
    found = {}
    for name, value in values.items():
        dest = str(name).replace("-", "_")
        if dest not in known or dest in ("config", "debug", "help"):
            raise ValueError(f"--config {str(file)!r}: there is no flag {name!r}")
        found[dest] = [value] if dest in LISTS and isinstance(value, str) else value
    return found
