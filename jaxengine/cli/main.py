"""``jaxengine serve | generate | chat | ...``: flags in, text out."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jaxengine
import jaxengine.convert.__main__
from jaxengine.cli.arguments import (
    Parser,
    add_engine_arguments,
    add_sampling_arguments,
    engine_arguments,
    hyphenate,
    sampling_arguments,
)
from jaxengine.cli.chat import Chat, stream_text
from jaxengine.cli.complete import complete, has_url, read_prompt
from jaxengine.cli.environment import collect_environment
from jaxengine.compat.similar_names import did_you_mean
from jaxengine.compile_watch import CompileWatch
from jaxengine.outputs import Logprob, RequestOutput
from jaxengine.sampling_params import SamplingParams

MakeLLM = Callable[..., Any]
HELPS = {
    "serve": "Serve a model in the form of OpenAI's API",
    "run-batch": "Answer a file of requests in OpenAI's batch form",
    "generate": "Continue one or more prompts in one batch",
    "chat": "Talk to a model in the terminal; --url: to one of a server",
    "complete": "Continue prompts in the terminal; --url: with a server's model",
    "bench": "Measure speed",
    "worker": "Run this host's part of a model that another host leads",
    "convert": "Convert a checkpoint once, so that it loads without further work",
    "collect-env": "Describe this machine for a bug report",
}
DEFAULT_MAX_TOKENS = 128  # of ``generate``; SamplingParams' 16 rarely ends a sentence


def main(arguments: Sequence[str] | None = None, make_llm: MakeLLM | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None reads ``sys.argv``.
        make_llm: Makes the model from a name and engine arguments; None is ``LLM``.

    Returns:
        The exit status: 0, 2 after an error, 130 after Ctrl-C.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "convert":
        return jaxengine.convert.__main__.main(rest)
    if command in SERVER_COMMANDS:
        module = f"jaxengine.cli.{SERVER_COMMANDS[command]}"
        return _run_alone(rest, lambda: importlib.import_module(module).main(rest))
    if command in ("chat", "complete") and has_url(rest):
        module = "jaxengine.cli.remote"
        return _run_alone(rest, lambda: importlib.import_module(module).remote_main(command, rest))
    if command not in COMMANDS:
        _parse_no_command(command)
    run, make_parser = COMMANDS[command]
    # Intermixed: prompts may stand before, between and behind the flags.
    options = make_parser().parse_intermixed_args(hyphenate(rest))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("jaxengine").setLevel(logging.INFO)
    try:
        run(options, make_llm or jaxengine.LLM)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _run_alone(arguments: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command that reads its flags itself; return the exit status."""
    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def generate_parser() -> argparse.ArgumentParser:
    """Return the parser of ``jaxengine generate``."""
    parser = _new_parser("generate")
    _add_model(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="none: standard input")
    parser.add_argument(
        "--prompts-file", type=Path, help="more prompts, one per line (default: none)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="use the model's chat template (default: False)"
    )
    parser.add_argument(
        "--no-progress", action="store_true", help="draw no progress bar (default: False)"
    )
    add_sampling_arguments(parser, {"max_tokens": DEFAULT_MAX_TOKENS})
    add_engine_arguments(parser)
    return parser


def chat_parser() -> argparse.ArgumentParser:
    """Return the parser of ``jaxengine chat``."""
    parser = _new_parser("chat")
    _add_model(parser)
    parser.add_argument(
        "--url", help="talk to this server, without MODEL; see --url URL --help (default: none)"
    )
    parser.add_argument("--system-prompt", help="first message of the conversation (default: none)")
    add_sampling_arguments(parser, {"max_tokens": None})
    add_engine_arguments(parser)
    return parser


def complete_parser() -> argparse.ArgumentParser:
    """Return the parser of ``jaxengine complete``."""
    parser = _new_parser("complete")
    _add_model(parser)
    parser.add_argument(
        "--url", help="ask this server, without MODEL; see --url URL --help (default: none)"
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="none: standard input")
    add_sampling_arguments(parser, {"max_tokens": DEFAULT_MAX_TOKENS})
    add_engine_arguments(parser)
    return parser


def worker_parser() -> argparse.ArgumentParser:
    """Return the parser of ``jaxengine worker``."""
    parser = _new_parser("worker")
    _add_model(parser)
    add_engine_arguments(parser)
    return parser


def environment_parser() -> argparse.ArgumentParser:
    """Return the parser of ``jaxengine collect-env``."""
    return _new_parser("collect-env")


def _new_parser(command: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"jaxengine {command}", description=f"{HELPS[command]}.", allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks (default: False)")
    return parser


def _parse_no_command(argument: str) -> NoReturn:
    """Answer --help and --version; anything else is an error with the list of commands."""
    commands = "\n".join(f"  {name:12} {text}" for name, text in HELPS.items())
    parser = argparse.ArgumentParser(
        prog="jaxengine",
        usage="jaxengine COMMAND [arguments] [--help]",
        description=f"LLM inference in JAX for NVIDIA GPUs and CPUs.\n\ncommands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=jaxengine.__version__)
    parser.parse_args([argument] if argument.startswith("-") else [])
    hint = did_you_mean(argument, HELPS)
    parser.error(f"there is no command {argument!r}: use one of {', '.join(HELPS)}{hint}")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="hub name, directory, GGUF file or converted directory"
    )


def run_generate(options: argparse.Namespace, make_llm: MakeLLM) -> None:
    """Generate for all prompts at once and print them, then the throughput."""
    prompts = _read_prompts(options)
    given = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_arguments(options)}
    SamplingParams(**given)  # a mistake should not wait until the model is loaded
    llm = make_llm(options.model, **engine_arguments(options))
    params = llm.get_default_sampling_params().clone(**given)
    started = time.perf_counter()
    use_tqdm = not options.no_progress
    with CompileWatch() as watch:
        if options.chat:
            conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = llm.chat(conversations, params, use_tqdm=use_tqdm)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - started
    for prompt, output in zip(prompts, outputs, strict=True):
        _print_output(prompt, output, is_only=len(prompts) == 1)
    print(_throughput(outputs, seconds, watch.seconds), file=sys.stderr)


def run_chat(options: argparse.Namespace, make_llm: MakeLLM) -> None:
    """Talk to the model."""
    given: dict[str, Any] = {"max_tokens": None, **sampling_arguments(options)}
    SamplingParams(**given)
    llm = make_llm(options.model, **engine_arguments(options))
    params = llm.get_default_sampling_params().clone(**given)
    Chat(llm, params, options.system_prompt).run()


def run_complete(options: argparse.Namespace, make_llm: MakeLLM) -> None:
    """Print one output as it is generated."""
    given = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_arguments(options)}
    SamplingParams(**given)
    prompt = read_prompt(options.prompt)
    llm = make_llm(options.model, **engine_arguments(options))
    params = llm.get_default_sampling_params().clone(**given)
    complete(lambda text: stream_text(llm, text, params), prompt)


def run_worker(options: argparse.Namespace, make_llm: MakeLLM) -> None:
    """Follow the leader until it ends."""
    from jaxengine.distributed.follower import run_follower  # loads jax

    run_follower(jaxengine.EngineConfig(options.model, **engine_arguments(options)))


def run_collect_environment(options: argparse.Namespace, make_llm: MakeLLM) -> None:
    """Print what a bug report needs."""
    print(collect_environment())


def _read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompts)
    if options.prompts_file is not None:
        prompts += _read_lines(options.prompts_file)
    if not prompts and not sys.stdin.isatty():
        prompts = [sys.stdin.read().removesuffix("\n")]
    if not any(prompts):
        raise ValueError("no prompt was given: write it behind MODEL, or use --prompts-file")
    return prompts


def _read_lines(file: Path) -> list[str]:
    """Return the lines of a file that are not empty; only a line feed ends one."""
    try:
        text = file.expanduser().read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"--prompts-file {str(file)!r} is missing") from None
    except OSError as error:
        raise ValueError(f"--prompts-file {str(file)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {str(file)!r} is not UTF-8: {error}") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip()]


def _print_output(prompt: str, output: RequestOutput, is_only: bool) -> None:
    if not is_only:
        print(f"Prompt: {prompt}")
    if output.prompt_logprobs is not None:
        _print_logprobs("Logprobs of the prompt:", output.prompt_token_ids, output.prompt_logprobs)
    for completion in output.outputs:
        label = "" if is_only and len(output.outputs) == 1 else f"Output {completion.index}: "
        print(f"{label}{completion.text}")
        if completion.logprobs is not None:
            _print_logprobs("Logprobs:", completion.token_ids, completion.logprobs)
    if not is_only:
        print()


def _print_logprobs(title: str, token_ids: Sequence[int], entries: Any) -> None:
    """Print a line a token: the token itself, then the most likely ones, best first."""
    print(title)
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is not None:
            others = sorted(
                (each for each in entry if each != token_id), key=lambda i: -entry[i].logprob
            )
            print("  " + "  ".join(_entry_text(i, entry[i]) for i in (token_id, *others)))


def _entry_text(token_id: int, entry: Logprob) -> str:
    token = token_id if entry.decoded_token is None else repr(entry.decoded_token)
    rank = "" if entry.rank is None else f" (rank {entry.rank})"
    return f"{token} {entry.logprob:.4f}{rank}"


def _throughput(
    outputs: Sequence[RequestOutput], seconds: float, compile_seconds: float = 0.0
) -> str:
    """Say how much was generated how fast; what compiling took is no part of the speed."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    running = max(seconds - compile_seconds, 1e-6)
    compiling = f", of which compiling {compile_seconds:.2f} s" if compile_seconds > 0.005 else ""
    num_generated = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return (
        f"{len(outputs)} prompts, {num_prompt} prompt tokens, {num_generated} generated tokens "
        f"in {seconds:.2f} s{compiling}: {num_generated / running:.1f} generated tokens/s"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    is_ours = isinstance(error, ValueError | OSError) and text
    return text if is_ours else f"{type(error).__name__}: {text}"


# Command -> its module in this folder, which has a ``main``.
SERVER_COMMANDS = {
    "serve": "serve",
    "run-batch": "run_batch",
    "bench": "bench",
}
COMMANDS = {
    "generate": (run_generate, generate_parser),
    "chat": (run_chat, chat_parser),
    "complete": (run_complete, complete_parser),
    "worker": (run_worker, worker_parser),
    "collect-env": (run_collect_environment, environment_parser),
}


if __name__ == "__main__":
    sys.exit(main())
