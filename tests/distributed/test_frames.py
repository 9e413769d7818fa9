"""Frames keep what they are given, exactly, and refuse everything else."""

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.batch import StepShape
from jaxengine.distributed.frames import (
    MAX_ARRAY_BYTES,
    MAX_HEADER_BYTES,
    PREFIX,
    Frame,
    check_lengths,
    decode,
    encode,
)
from jaxengine.distributed.step_frames import decode_step, encode_step
from jaxengine.engine.device.step_inputs import ScoringInputs, StepInputs
from jaxengine.engine.sampling.sampling_inputs import SamplerVariant

INT32 = st.integers(-(2**31), 2**31 - 1)
SMALL = st.integers(-2, 2**20)


def ints(*shapes: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    def fill(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
        count = int(np.prod(shape))
        values = st.lists(INT32, min_size=count, max_size=count)
        return values.map(lambda numbers: np.array(numbers, np.int32).reshape(shape))

    return st.sampled_from(shapes).flatmap(fill)


VECTORS = ints((0,), (1,), (7,), (40,))
BY_TYPE = {"bool": st.booleans(), "int": SMALL, "str": st.text(max_size=5)}
VARIANTS = st.builds(
    SamplerVariant,
    **{
        field.name: BY_TYPE[getattr(field.type, "__name__", str(field.type))]
        for field in dataclasses.fields(SamplerVariant)
    },
)
STEPS = st.builds(
    StepInputs,
    shape=st.builds(StepShape, SMALL, SMALL, st.booleans()),
    packed=VECTORS,
    table_updates=st.none() | ints((3, 0), (3, 5)),
    variant=VARIANTS,
    sampling=VECTORS,
    scoring=st.none() | st.builds(ScoringInputs, num_logprobs=SMALL, next_ids=VECTORS),
    token_targets=VECTORS,
    num_token_stores=SMALL,
)


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and body of an encoded frame."""
    num_header, num_body = PREFIX.unpack(data[: PREFIX.size])
    assert len(data) == PREFIX.size + num_header + num_body
    return data[PREFIX.size : PREFIX.size + num_header], data[PREFIX.size + num_header :]


def assert_same(first: object, second: object) -> None:
    """Equal in type and value, through dataclasses and arrays."""
    assert type(first) is type(second)
    if isinstance(first, np.ndarray):
        assert first.dtype == second.dtype  # type: ignore[attr-defined]
        np.testing.assert_array_equal(first, second, strict=True)
    elif dataclasses.is_dataclass(first):
        for field in dataclasses.fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    else:
        assert first == second


@given(inputs=STEPS, replica=st.integers(0, 63))
def test_a_step_comes_out_as_it_went_in(inputs: StepInputs, replica: int) -> None:
    frame = decode(*split(encode(encode_step(inputs, replica))))
    found_replica, found = decode_step(frame)
    assert found_replica == replica
    assert_same(found, inputs)


def test_floats_keep_their_bits() -> None:
    values = np.array([0.1, -0.0, np.inf, np.nan, 1e-45], np.float32)
    (found,) = decode(*split(encode(Frame("x", {}, (values,))))).arrays
    assert found.tobytes() == values.tobytes()


def test_an_array_of_objects_or_of_another_type_is_not_sent() -> None:
    for array in (np.array([{}]), np.zeros(2, np.int64)):
        with pytest.raises(ValueError, match="int32 or float32"):
            encode(Frame("x", {}, (array,)))


def small_step(num_token_stores: Any = 0) -> StepInputs:
    return StepInputs(
        shape=StepShape(1, 1, True),
        packed=np.zeros(1, np.int32),
        table_updates=None,
        variant=SamplerVariant(),
        sampling=np.zeros(0, np.int32),
        scoring=None,
        token_targets=np.zeros(1, np.int32),
        num_token_stores=num_token_stores,
    )


def test_a_value_that_is_neither_number_nor_name_nor_array_is_not_sent() -> None:
    step = small_step(num_token_stores=0.5)
    with pytest.raises(TypeError, match="only numbers, names and arrays"):
        encode_step(step)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"[]", b""),
        (b"not JSON", b""),
        (b"\xff", b""),
        (b'{"kind": 1, "values": {}, "arrays": []}', b""),
        (b'{"kind": "x", "values": {}}', b""),
        (b'{"kind": "x", "values": {}, "arrays": []}', b"more"),
        (b'{"kind": "x", "values": {}, "arrays": [["int32", [2]]]}', b"few!"),
        (b'{"kind": "x", "values": {}, "arrays": [["int32", [-1]]]}', b""),
        (b'{"kind": "x", "values": {}, "arrays": [["int32", ["1"]]]}', b"four"),
        (b'{"kind": "x", "values": {}, "arrays": [["object", [1]]]}', b"12345678"),
        (b'{"kind": "x", "values": {}, "arrays": [[["int32"], [1]]]}', b"1234"),
        (b'{"kind": "x", "values": {}, "arrays": [1]}', b""),
    ],
)
def test_bytes_that_are_no_frame_are_refused(header: bytes, body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (json's own is one, too)
        decode(header, body)


@pytest.mark.parametrize("lengths", [(MAX_HEADER_BYTES + 1, 0), (0, MAX_ARRAY_BYTES + 1)])
def test_a_frame_that_is_too_long_is_refused_before_it_is_read(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        check_lengths(*struct.unpack(">IQ", PREFIX.pack(*lengths)))


def test_a_step_with_other_fields_or_types_is_refused() -> None:
    good = encode_step(small_step())
    inputs = good.values["inputs"]
    for wrong in (
        {**inputs, "num_token_stores": True},
        {**inputs, "packed": {"array": 9}},
        {**inputs, "packed": None},
        {**inputs, "shape": {"num_tokens": 1}},
        {name: value for name, value in inputs.items() if name != "sampling"},
        {**inputs, "more": 1},
    ):
        with pytest.raises(ValueError, match="a step's frame"):
            decode_step(Frame("step", {"replica": 0, "inputs": wrong}, good.arrays))
