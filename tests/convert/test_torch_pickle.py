"""The stack machine for pickles: what torch writes is read, what would do harm ends at once."""

import pickle
import struct

import pytest
from jaxengine.convert import torch_pickle
from jaxengine.convert.torch_pickle import PickleError

NESTED_KEY = b"}(" + b")" + b"\x85" * 1_000_000 + b"K\x01u."  # a key of tuples, 10**6 deep
# A tuple of two times the one before, 40 times: its hash takes 2**40 steps.
SHARED_KEY = b"})" + b"q\x00h\x00\x86" * 40 + b"K\x01s."


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_values_come_out_as_python_reads_them(protocol: int) -> None:
    value = {"a": [1, -2, 70_000, 2**40, 0.5, None, True], "b": ("x", ("y",), (), {"c": {}})}
    assert torch_pickle.load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED_KEY, "a key that is a tuple, not a text"),
        (SHARED_KEY, "a key that is a tuple, not a text"),
        (b"\x8e" + struct.pack("<Q", 2**62) + b".", r"the instruction b'\\x8e'"),
        (b"X" + struct.pack("<I", 2**32 - 1) + b".", "asks for 4294967295 bytes at byte 5"),
        (b"\x8b" + struct.pack("<i", 2**31 - 1) + b".", r"the instruction b'\\x8b'"),
        (b"cos\nsystem\n(X\x02\0\0\0lstR.", "names os.system, which is no part of a tensor"),
        (b"ctorch._utils\n" + b"x" * 2000, "a name without end"),
        (b"K\x01)R.", "calls a int"),
        (b"ccollections\nOrderedDict\n(K\x01K\x02\x86\x85tR.", "OrderedDict with arguments"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nK\x01K\x01K\x01\x87R.", "damaged at byte"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR.", "tensor from a int"),
        (b"h\x07.", "damaged at byte"),
        (b"\x86.", "no 2 values"),
        (b"t.", "no mark"),
        (b".", "damaged at byte 1"),
        (b"K\x01K\x02a.", "appends to no list"),
        (b"}X\x01\0\0\0aK\x01sX\x01\0\0\0aK\x02s.", "has the key 'a' twice"),
        (b"}(K\x01u.", "fills a dict"),
        (b"K\x01Q.", "a damaged storage"),
        (b"X\x02\0\0\0\xff\xfe.", "damaged at byte"),
        (b"", "asks for 1 bytes at byte 0"),
    ],
)
def test_what_torch_does_not_write_ends_at_once(content: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        torch_pickle.load(content)
