"""Damages a file: bits and bytes, declared sizes, values of JSON, instructions of a pickle.

Of a format without checksums (safetensors, GGUF, a converted directory) only what describes the
weights is damaged, and the file's length: a flipped bit in a plain weight cannot be seen.
"""

import copy
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 5, 7, 31, 255, 2**16, 2_000_000, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 10**12),
    *(2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 10**9, 10**12, 2**63, -(2**63), 10**40, 10**400, 0.5, 1.0, 1e308, -0.0),
    *(float("nan"), float("inf"), True, False, None, "", "a", "1", "../x", "\0", "x" * 100_000),
    *([], {}, [0], [[0]], {"a": 1}, [1] * 100_000, ["a"] * 10_000, "float64", "LlamaForCausalLM"),
    "yarn",
)
# What a config may say beside what the one of the corpus does.
MORE_FIELDS: dict[str, Any] = {
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 8},
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_qkv_bias": True,
    "partial_rotary_factor": 0.5,
    "auto_map": {"AutoModel": "a.B"},
}
Chance = random.Random


def flip_bit(content: bytes, chance: Chance) -> bytes:
    place = chance.randrange(len(content))
    return (
        content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    )


def set_byte(content: bytes, chance: Chance) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]


def delete_run(content: bytes, chance: Chance) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice((1, 4, 8, 100)) :]


def insert_run(content: bytes, chance: Chance) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.randbytes(chance.choice((1, 4, 8, 100))) + content[place:]


def repeat_run(content: bytes, chance: Chance) -> bytes:
    start = chance.randrange(len(content))
    run = content[start : start + chance.choice((1, 8, 64, 1000))]
    return content[:start] + run * chance.choice((2, 3, 1000)) + content[start:]


def set_number(content: bytes, chance: Chance) -> bytes:
    """Write a number that a reader may take for a size, in 32 or 64 bits."""
    place, letter = chance.randrange(len(content)), chance.choice("IQ")
    number = chance.choice(NUMBERS) % (1 << 32 if letter == "I" else 1 << 64)
    packed = struct.pack("<" + letter, number)
    return content[:place] + packed + content[place + len(packed) :]


BYTES = (flip_bit, flip_bit, set_byte, delete_run, insert_run, repeat_run, set_number, set_number)


def damage(content: bytes, chance: Chance) -> bytes:
    """One or a few changes of bytes."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = chance.choice(BYTES)(content, chance) or b"\0"
    return content


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places_of(value[key])
    return found


def damage_json(content: bytes, chance: Chance) -> bytes:
    """Replace, drop, rename or double values of a JSON text; or its bytes; or nest it deep."""
    kind = chance.randrange(10)
    if kind == 0:
        return damage(content, chance)
    if kind == 1:
        deep = chance.choice(("[", '{"a":')) * chance.choice((10, 100, 990, 100_000))
        place = chance.randrange(len(content))
        return content[:place] + deep.encode() + content[place:]
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        places = places_of(value)
        if not places:
            break
        container, key = chance.choice(places)
        action = chance.randrange(6)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[str(chance.choice(VALUES))[:50]] = container.pop(key)
        elif action == 2 and isinstance(container[key], int):
            container[key] += chance.choice((-1, 1, 8, 2**32))
        else:
            container[key] = copy.deepcopy(chance.choice(VALUES))  # a later change may be inside
    text = json.dumps(value)
    if kind == 3 and isinstance(value, dict):
        name = chance.choice(tuple(MORE_FIELDS))
        field = {name: copy.deepcopy(MORE_FIELDS[name])}
        places = [place for place in places_of(field) if chance.randrange(2)]
        for container, key in places:
            container[key] = copy.deepcopy(chance.choice(VALUES))
        value |= field
    if kind == 2:  # a key that is there twice
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    return text.encode()


def damage_safetensors(path: Path, chance: Chance) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, tensors = content[:end], content[end:]
    kind = chance.randrange(5)
    if kind == 0:
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == 1:
        path.write_bytes(content + chance.randbytes(chance.choice((1, 8, 1000))))
    elif kind == 2:
        path.write_bytes(damage(header, chance) + tensors)
    else:
        changed = damage_json(header[8:], chance)
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + tensors)


def damage_gguf(path: Path, chance: Chance) -> None:
    content = path.read_bytes()
    # The tensors' names come last in the header; behind them lie types, offsets and padding.
    end = content.rindex(b"blk.1.ffn_down.weight") + 64
    if chance.randrange(8) == 0:
        path.write_bytes(content[: chance.randrange(len(content))])
    else:
        path.write_bytes(damage(content[:end], chance) + content[end:])


def damage_zip(path: Path, chance: Chance) -> None:
    """Bytes anywhere: the zip's checksums and its two headers cover them."""
    content = path.read_bytes()
    if chance.randrange(4) == 0:
        directory = content.index(b"PK\1\2")
        path.write_bytes(content[:directory] + damage(content[directory:], chance))
    elif chance.randrange(3) == 0:  # near the header of an entry
        starts = [i for i in range(len(content) - 4) if content[i : i + 4] == b"PK\3\4"]
        start = chance.choice(starts)
        end = start + 100
        path.write_bytes(content[:start] + damage(content[start:end], chance) + content[end:])
    else:
        path.write_bytes(damage(content, chance))


def forge_pickle(path: Path, chance: Chance) -> None:
    """Another pickle under fresh checksums: what a hostile author would write."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            is_pickle = name.endswith("data.pkl")
            archive.writestr(name, damage(content, chance) if is_pickle else content)


def damage_converted(path: Path, chance: Chance) -> None:
    """The manifest, an array's metadata, its length, or the config."""
    arrays = sorted((path / "parameters").glob("*/.zarray"))
    kind = chance.randrange(6)
    if kind == 0:
        array = chance.choice(arrays).parent
        chunk = next(each for each in sorted(array.iterdir()) if each.name[0].isdigit())
        chunk.write_bytes(chunk.read_bytes()[: chance.randrange(8)] * chance.choice((0, 1, 2000)))
        return
    if kind == 1:
        target = chance.choice(arrays)
    elif kind == 2:
        target = path / "config.json"
    else:
        target = path / "manifest.json"
    target.write_bytes(damage_json(target.read_bytes(), chance))


def _json_file(name: str) -> Callable[[Path, Chance], None]:
    def change(path: Path, chance: Chance) -> None:
        target = path / name
        target.write_bytes(damage_json(target.read_bytes(), chance))

    return change


def _file(name: str, change: Callable[[Path, Chance], None]) -> Callable[[Path, Chance], None]:
    return lambda path, chance: change(path / name, chance)


def damage_tokenizer(path: Path, chance: Chance) -> None:
    names = ("tokenizer.json", "tokenizer.json", "tokenizer.json", "tokenizer_config.json")
    _json_file(chance.choice(names))(path, chance)


# Format -> ways to damage it.
MUTATIONS: dict[str, tuple[Callable[[Path, Chance], None], ...]] = {
    "safetensors": (_file("model.safetensors", damage_safetensors),),
    "index": (_json_file("model.safetensors.index.json"),),
    "config": (_json_file("config.json"), _json_file("generation_config.json")),
    "pytorch_bin": (
        _file("pytorch_model.bin", damage_zip),
        _file("pytorch_model.bin", forge_pickle),
    ),
    "gguf": (_file("model.gguf", damage_gguf),),
    "tokenizer": (damage_tokenizer,),
    "converted": (damage_converted,),
}
