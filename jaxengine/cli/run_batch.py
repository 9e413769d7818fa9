"""``jaxengine run-batch``: a file of requests in, a file of answers out."""

import argparse
import asyncio
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxengine.cli.arguments import (
    Parser,
    add_engine_arguments,
    add_field,
    engine_arguments,
    field_helps,
    human_int,
    hyphenate,
)
from jaxengine.config import EngineConfig
from jaxengine.server.settings import ServerSettings

# Fields of ServerSettings that say what a body means.
SERVER_FIELDS = (
    *("chat_template_content_format", "default_chat_template_kwargs"),
    *("trust_request_chat_template", "response_role", "tool_call_parser"),
    *("enable_auto_tool_choice", "return_tokens_as_token_ids"),
    *("max_completion_prompts", "max_n", "max_stop_strings", "max_request_body_bytes"),
)


def batch_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(
        prog="jaxengine run-batch",
        description="Answer a file of requests in OpenAI's batch form; begun again, it goes on "
        "where it was ended.",
        allow_abbrev=False,
        conflict_handler="resolve",  # what offline use has no need of has a meaning here
    )
    add_engine_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks (default: False)")
    parser.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, one a line"
    )
    parser.add_argument(
        "-o", "--output-file", type=Path, required=True, metavar="FILE", help="gets the answers"
    )
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="hub name, directory or file"
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="TEXT",
        help="names that bodies may give as the model (default: MODEL)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=human_int,
        metavar="N",
        help="requests at a time (default: twice --max-num-seqs)",
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="draw no progress bar (default: False)"
    )
    group, helps = parser.add_argument_group("as served"), field_helps(ServerSettings)
    for field in dataclasses.fields(ServerSettings):
        if field.name in SERVER_FIELDS:
            add_field(group, field, helps[field.name], field.default)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Answer what is not answered yet; return the exit status."""
    options = batch_parser().parse_args(hyphenate(arguments))
    if options.max_concurrency is not None and options.max_concurrency < 1:
        raise ValueError(f"--max-concurrency is {options.max_concurrency}: it must be at least 1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jaxengine").setLevel(logging.INFO)
    own: dict[str, Any] = {k: getattr(options, k) for k in SERVER_FIELDS if hasattr(options, k)}
    settings = ServerSettings(
        served_model_name=options.served_model_name,
        api_key=(),
        max_num_queued_reqs=sys.maxsize,
        **own,
    )
    from jaxengine.server.batch_run import open_output  # loads the web framework

    output = open_output(options.input_file, options.output_file)
    try:
        num_done = asyncio.run(_run(options, settings, output)) if output.num_missing else 0
    finally:
        output.close()
    print(
        f"{num_done} requests done, {len(output.done)} answers in {str(options.output_file)!r}, "
        f"{output.num_errors} of them errors",
        file=sys.stderr,
    )
    return 0


async def _run(options: argparse.Namespace, settings: ServerSettings, output: Any) -> int:
    from jaxengine.async_llm import AsyncEngineArgs, AsyncLLM
    from jaxengine.server.batch_run import run_batch
    from jaxengine.server.parsers.output_parser import check_parsers

    served = ("served_model_name", *SERVER_FIELDS)
    engine = {k: v for k, v in engine_arguments(options).items() if k not in served}
    engine_args = AsyncEngineArgs(options.model, **engine)
    config: EngineConfig = engine_args.create_engine_config()
    check_parsers(settings.tool_call_parser, config.reasoning_parser)
    llm = AsyncLLM.from_engine_args(engine_args)
    try:
        return await run_batch(
            llm,
            settings,
            output,
            options.input_file,
            reasoning_parser=config.reasoning_parser,
            max_concurrency=options.max_concurrency,
            show_progress=not options.no_progress,
        )
    finally:
        llm.shutdown()
