"""What programs are made for: known when they are traced, whether such a device is there or not."""

import dataclasses

import jax

# In ``device_kind``: GPUs with Hopper's matrix units, which Mosaic's kernels here are for.
HOPPER_NAMES = ("H100", "H200", "H800", "GH200")
# Streaming multiprocessors where a device does not say: those of an H100.
DEFAULT_NUM_SMS = 132


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        platform: "cpu" or "gpu".
        generation: "hopper", or None for any other.
        num_sms: Streaming multiprocessors of a GPU.
        implementation: "reference" makes every op plain ``jax.numpy``, which can be differentiated;
            None takes the fastest that serves.
    """

    platform: str = "cpu"
    generation: str | None = None
    num_sms: int = DEFAULT_NUM_SMS
    implementation: str | None = None

    @classmethod
    def of(cls, device: jax.Device, implementation: str | None = None) -> "Target":
        """The kind of a device."""
        is_hopper = any(name in device.device_kind for name in HOPPER_NAMES)
        return cls(
            platform=device.platform,
            generation="hopper" if is_hopper else None,
            num_sms=int(getattr(device, "core_count", 0) or DEFAULT_NUM_SMS),
            implementation=implementation,
        )

    @property
    def is_gpu(self) -> bool:
        """Whether kernels for GPUs can be compiled for it."""
        return self.platform == "gpu" and self.implementation is None

    @property
    def is_hopper(self) -> bool:
        """Whether it is a GPU that Mosaic's kernels are for."""
        return self.is_gpu and self.generation == "hopper"
