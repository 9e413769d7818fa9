"""The progress bar of a batch."""

import time

from tqdm import tqdm

from jaxengine.outputs import RequestOutput


class Progress:
    """A progress bar of prompts that also says how many tokens a second go in and out."""

    def __init__(self, total: int, disable: bool) -> None:
        self._bar = tqdm(total=total, desc="Processed prompts", disable=disable, dynamic_ncols=True)
        self._started = time.perf_counter()
        self._num_input_tokens = self._num_output_tokens = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, output: RequestOutput) -> None:
        """Count a finished prompt and its tokens."""
        self._num_input_tokens += len(output.prompt_token_ids or ())
        self._num_output_tokens += sum(len(each.token_ids) for each in output.outputs)
        seconds = time.perf_counter() - self._started
        self._bar.set_postfix_str(
            f"input {self._num_input_tokens / seconds:.1f} tok/s, "
            f"output {self._num_output_tokens / seconds:.1f} tok/s"
        )
        self._bar.update()
