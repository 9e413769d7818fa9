from typing import Any

import pytest

from jaxengine.config import EngineConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code=True is refused"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5: .* 0.05 and 1.0"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
        ({"block_size": 12}, "block_size 12 is not a multiple of 8 between 8 and 256: use 16"),
        ({"block_size": 512}, "block_size 512"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: a positive integer is needed"),
        ({"max_model_len": 2.5}, "max_model_len is 2.5"),
        ({"max_num_batched_tokens": "8k"}, "max_num_batched_tokens is '8k'"),
        ({"tensor_parallel_size": -1}, "tensor_parallel_size is -1"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0: a positive integer"),
        ({"data_parallel_size": 1.5}, "data_parallel_size is 1.5: a positive integer is needed"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy is 'lifo': use one of fcfs, priority"),
        ({"load_format": "npz"}, "load_format is 'npz': use one of auto, safetensors"),
        ({"attention_backend": "flash"}, "attention_backend is 'flash': use one of None, ref"),
    ],
    ids=str,
)
def test_engine_arguments_out_of_bounds_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig("model", **arguments)


def test_an_unknown_engine_argument_is_named() -> None:
    with pytest.raises(TypeError, match="max_number_of_seqs"):
        EngineConfig("model", max_number_of_seqs=3)  # type: ignore[call-arg]


def test_configs_cannot_be_changed_and_can_be_keys() -> None:
    config = EngineConfig("model", hf_overrides={"a": 1})
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    assert len({config, EngineConfig("model", hf_overrides={"a": 1})}) == 1
