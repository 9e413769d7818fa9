"""The progress bar of a batch."""

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from jaxengine.outputs import RequestOutput

MakeBar = Callable[..., Any]


class Progress:
    """A progress bar of prompts that also says how many tokens a second go in and out.

    Args:
        total: Number of prompts.
        use_tqdm: Whether to draw; or what makes the bar in place of tqdm.
        compile_seconds: Seconds spent compiling so far, which are left out of the throughput.
    """

    def __init__(
        self,
        total: int,
        use_tqdm: bool | MakeBar,
        compile_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        make_bar = use_tqdm if callable(use_tqdm) else tqdm
        options = {"total": total, "desc": "Processed prompts", "dynamic_ncols": True}
        self._bar = make_bar(**options) if use_tqdm else None
        self._started = time.perf_counter()
        self._compile_seconds = compile_seconds
        self._num_input_tokens = self._num_output_tokens = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def say_compiling(self) -> None:
        """Show that the wait is for the compiler."""
        if self._bar is not None:
            self._bar.set_postfix_str("compiling")

    def advance(self, count: int) -> None:
        """Count prompts of which nothing else is to be told."""
        if self._bar is not None:
            self._bar.update(count)

    def update(self, output: RequestOutput) -> None:
        """Count a finished prompt and its tokens."""
        self._num_input_tokens += len(output.prompt_token_ids or ())
        self._num_output_tokens += sum(len(each.token_ids) for each in output.outputs)
        if self._bar is None:
            return
        seconds = max(time.perf_counter() - self._started - self._compile_seconds(), 1e-6)
        self._bar.set_postfix_str(
            f"input {self._num_input_tokens / seconds:.1f} tok/s, "
            f"output {self._num_output_tokens / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update()
