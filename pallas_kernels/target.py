"""What a program is compiled for: the kind of device, and which kernels may serve it."""

import dataclasses
from typing import Any

# Assumed where there is no GPU to ask (cross-compiling): H100 and H200.
DEFAULT_NUM_SMS = 132
# By compute capability, major and minor, the first that fits.
# Source: CUDA C++ programming guide, "Compute Capabilities".
GENERATIONS = {
    "12.": "blackwell",
    "10.": "blackwell",
    "9.": "hopper",
    "8.9": "ada",
    "8.": "ampere",
    "7.5": "turing",
    "7.": "volta",
}
# For devices that only have a name, as those of cross-compilation. GH200 is an H200, GB200 a B200.
NAMES = {
    "hopper": ("H100", "H200", "H800", "H20"),
    "blackwell": ("B100", "B200", "B300"),
    "ada": ("L4", "L40"),
    "ampere": ("A100", "A800", "A10", "A30", "A40"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of one program, all alike. Static: it is part of what a program is.

    Attributes:
        platform: "cpu" or "gpu".
        generation: Of a GPU: "hopper", "blackwell", "ada", "ampere" ...; None if unknown.
        num_sms: Streaming multiprocessors of a GPU; those of an H100 where nobody knows.
        implementation: "reference" makes every op take its plain jnp form, which is differentiable;
            None leaves the choice to each op.
    """

    platform: str = "cpu"
    generation: str | None = None
    num_sms: int = DEFAULT_NUM_SMS
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Refuse an implementation that not every op has."""
        if self.implementation not in (None, "reference"):
            raise ValueError(
                f"implementation {self.implementation!r} is not one that all ops have: "
                "use None or 'reference'"
            )

    @classmethod
    def of(cls, device: Any, implementation: str | None = None) -> "Target":
        """Describe a device.

        Args:
            device: A ``jax.Device``, or a ``jax.sharding.AbstractDevice`` to compile for.
            implementation: As the attribute.
        """
        if device.platform != "gpu":
            return cls(device.platform, implementation=implementation)
        num_sms = getattr(device, "core_count", None) or getattr(device, "num_cores", None)
        return cls("gpu", _generation(device), int(num_sms or DEFAULT_NUM_SMS), implementation)

    @property
    def is_gpu(self) -> bool:
        """Whether Triton's kernels run here."""
        return self.platform == "gpu"

    @property
    def is_hopper(self) -> bool:
        """Whether these GPUs have the matrix units that Mosaic's kernels are for."""
        return self.generation == "hopper"

    def choice(self, implementation: str | None) -> str | None:
        """Return what an op is to take: what its caller names, or what all ops are to take."""
        return self.implementation if implementation is None else implementation


def _generation(device: Any) -> str | None:
    capability = str(getattr(device, "compute_capability", ""))
    for prefix, generation in GENERATIONS.items():
        if capability.startswith(prefix):
            return generation
    words = device.device_kind.replace("-", " ").split()
    for generation, names in NAMES.items():
        if any(word.removeprefix("G") in names for word in words):
            return generation
    return None
