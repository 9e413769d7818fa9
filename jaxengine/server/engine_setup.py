"""EngineSetup: what the engine's process is told by its parent, as one line of JSON."""

import dataclasses
import json
from pathlib import Path

from jaxengine.config import EngineConfig


@dataclasses.dataclass(frozen=True)
class EngineSetup:
    """What the parent decides.

    Attributes:
        config: The engine's.
        socket_path: Where front ends connect.
        key: Their secret.
        tokenizer_directory: Where the tokenizer's files are put for them.
        step_timeout_s: Longest time without a step while there is work.
    """

    config: EngineConfig
    socket_path: str
    key: bytes
    tokenizer_directory: Path
    step_timeout_s: float

    def to_json(self) -> str:
        """Write it as one line."""
        return json.dumps(
            {
                "config": dataclasses.asdict(self.config),
                "socket_path": self.socket_path,
                "key": self.key.hex(),
                "tokenizer_directory": str(self.tokenizer_directory),
                "step_timeout_s": self.step_timeout_s,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "EngineSetup":
        """Read what ``to_json`` has written."""
        values = json.loads(text)
        return cls(
            EngineConfig(**values["config"]),
            values["socket_path"],
            bytes.fromhex(values["key"]),
            Path(values["tokenizer_directory"]),
            float(values["step_timeout_s"]),
        )
