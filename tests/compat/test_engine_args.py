"""vLLM's engine arguments: taken, translated or refused, one row each."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import EngineArgs, EngineConfig
from jaxengine.compat import engine_args
from jaxengine.compat.engine_args import FIELD_NAMES, ROWS, dtype_name, resolve_engine_args


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_args, "_warned", set())


def test_no_row_stands_twice_or_for_a_field_of_ours() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert not set(names) & set(FIELD_NAMES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_argument_is_taken_at_its_default(row, caplog) -> None:
    for value in (row.default, None, *row.also):
        assert resolve_engine_args({row.name: value}) == {}
    assert caplog.records == []


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.kind == "ignored"], ids=lambda row: row.name
)
def test_an_argument_that_makes_no_difference_is_taken_with_one_warning(row, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="jaxengine")
    for _ in range(2):
        assert resolve_engine_args({row.name: "something else"}) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{row.name}='something else' makes no difference: ")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.kind == "refused"], ids=lambda row: row.name
)
def test_an_argument_that_asks_for_what_is_not_there_is_refused_with_a_remedy(row) -> None:
    with pytest.raises(ValueError, match=rf"^{row.name}='something else' is not supported: \w"):
        resolve_engine_args({row.name: "something else"})


def test_none_is_the_default_of_every_field() -> None:
    assert resolve_engine_args(dict.fromkeys(FIELD_NAMES)) == {}


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"dtype": np.float16}, {"dtype": "float16"}),
        ({"dtype": np.dtype("float32")}, {"dtype": "float32"}),
        ({"dtype": jnp.bfloat16}, {"dtype": "bfloat16"}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"max_model_len": -1}, {}),
        ({"max_model_len": "auto"}, {}),
        ({"max_model_len": "32k"}, {"max_model_len": 32000}),
        ({"max_model_len": "1.5K"}, {"max_model_len": 1536}),
        ({"max_num_batched_tokens": "8K"}, {"max_num_batched_tokens": 8192}),
        ({"kv_cache_memory_bytes": "2G"}, {"kv_cache_memory_bytes": 2**31}),
        ({"load_format": "runai_streamer"}, {"load_format": "auto"}),
        ({"distributed_executor_backend": "mp"}, {}),
        ({"distributed_executor_backend": "external_launcher"}, {}),
        ({"distributed_executor_backend": "ray"}, {"distributed_executor_backend": "ray"}),
        ({"attention_backend": "FLASH_ATTN"}, {}),
        ({"attention_backend": "triton"}, {"attention_backend": "triton"}),
        ({"runner": "generate", "convert": "none"}, {"task": "generate"}),
        ({"runner": "pooling", "task": "embedding"}, {"task": "embed"}),
        ({"override_pooler_config": {"pooling_type": "CLS", "normalize": None}},
         {"pooler_config": {"pooling_type": "CLS"}}),
        ({"rope_theta": 5e5}, {"hf_overrides": {"rope_theta": 5e5}}),
        ({"structured_outputs_config": {"reasoning_parser": "a"}}, {"reasoning_parser": "a"}),
        ({"profiler_config": {"torch_profiler_dir": "t"}}, {"profiler_dir": "t"}),
        ({"hf_token": True, "reasoning_parser": ""}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_vllms_spellings_become_ours(arguments, fields) -> None:
    assert resolve_engine_args(arguments) == fields
    EngineConfig(model="m", **fields)


def test_a_dtype_of_torch_is_read_by_its_name() -> None:
    torch = pytest.importorskip("torch")
    assert dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"max_modle_len": 5}, TypeError, "no engine argument 'max_modle_len'; did you mean"),
        ({"xyzzy": 5}, TypeError, "no engine argument 'xyzzy'$"),
        ({"max_model_len": "many"}, ValueError, "max_model_len is 'many': give an"),
        ({"max_model_len": "1.5"}, ValueError, "not a whole number"),
        ({"runner": "draft"}, ValueError, "runner='draft' is not supported: use generate or p"),
        ({"pooler_config": "mean"}, ValueError, "pooler_config must be a mapping, got 'mean'"),
        ({"hf_token": "secret"}, ValueError, "environment variable HF_TOKEN"),
        ({"structured_outputs_config": {"disable_any_whitespace": True}}, ValueError, "each"),
        (
            {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2},
            ValueError,
            "'external_launcher' with 2 devices is not supported",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error_that_names_it(arguments, error, match) -> None:
    with pytest.raises(error, match=match):
        resolve_engine_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seed": 2**63}, "seed is 9223372036854775808: an integer of 64 bits"),
        ({"max_model_len": 2**70}, "max_model_len is 1180591620717411303424"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"gpu_memory_utilization": "much"}, "gpu_memory_utilization is 'much'"),
        ({"logprobs_mode": "cooked"}, "logprobs_mode is 'cooked': use one of raw_logprobs"),
    ],
)
def test_a_value_out_of_bounds_is_refused_before_anything_is_loaded(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        EngineConfig(model="m", **arguments)


def test_engine_args_hold_what_they_were_given_and_make_a_config() -> None:
    arguments = EngineArgs("m", max_model_len="2k", swap_space=4)
    assert vars(arguments) == {"model": "m", "max_model_len": "2k", "swap_space": 4}
    assert arguments.create_engine_config() == EngineConfig(model="m", max_model_len=2000)
    with pytest.raises(ValueError, match="enable_lora=True is not supported"):
        EngineArgs(model="m", enable_lora=True)
