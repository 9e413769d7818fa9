"""What an engine says when it is ready."""

import dataclasses
import textwrap
from collections.abc import Mapping

from jaxengine.batch import StepShape
from jaxengine.engine.device import memory
from jaxengine.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Startup:
    """What the start did: seconds of its parts, one after the other, and where the memory goes.

    Attributes:
        compile_seconds: Seconds of each step's program; several compile at a time.
    """

    model: ModelConfig
    device_kind: str
    num_devices: int
    compile_s: float
    load_s: float
    compile_seconds: Mapping[StepShape, float]
    budget: memory.MemoryBudget

    def text(self) -> str:
        """The report that an engine prints when it is ready."""
        devices = f"{self.num_devices} x {self.device_kind}"
        lines = [
            f"{self.model.architecture} in {self.model.dtype} on {devices}",
            self.budget.table(),
            f"  weights loaded in {self.load_s:.1f} s; {self._programs()}",
        ]
        return "\n".join(lines)

    def _programs(self) -> str:
        seconds = self.compile_seconds
        if not seconds:
            return "steps compile when they are first needed"
        lines = [f"{len(seconds)} step programs in {self.compile_s:.1f} s, each in seconds"]
        for decode_only, title in ((False, "prefill, tokens x rows"), (True, "decoding, rows")):
            listed = ", ".join(
                f"{_size_text(shape)}: {seconds[shape]:.1f}"
                for shape in sorted(seconds, key=lambda s: (s.num_tokens, s.num_rows))
                if shape.decode_only == decode_only
            )
            lines += textwrap.wrap(
                f"{title}: {listed}", 96, initial_indent="    ", subsequent_indent="      "
            )
        return "\n".join(lines)


def _size_text(shape: StepShape) -> str:
    return f"{shape.num_rows}" if shape.decode_only else f"{shape.num_tokens}x{shape.num_rows}"
