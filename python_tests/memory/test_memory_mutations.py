"""Changed folders: each is refused in one sentence, or holds the same memory to the bit.

ENGRAM_MUTATIONS=4000 changes more of them.
"""

import json
import os
import random
import struct

import pytest
import torch
from memory_files import pack, unpack
from memory_helpers import assert_unchanged, filled, frozen, latents, mixed

import engram_kernels as ek
from engram_kernels.memory import EpisodicMemory

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = "memory.safetensors"
MUTATIONS = int(os.environ.get("ENGRAM_MUTATIONS", "800"))
# What stands in a field that should hold something else.
STRANGE = (
    None,
    True,
    0,
    -1,
    2,
    2**31,
    2**63,
    10**400,
    0.5,
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": {}},
)


def flip(dice, content):
    """Some bits, anywhere, or in the header."""
    content = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8))):
        content[dice.randrange(len(content) if dice.random() < 0.5 else 900)] ^= 1 << dice.randrange(8)
    return bytes(content)


def cut(dice, content):
    """The end, or a piece from the middle."""
    start = dice.randrange(len(content))
    return (
        content[:start] + content[start + dice.randrange(1, 64) :] if dice.random() < 0.5 else content[:start]
    )


def insert(dice, content):
    at = dice.randrange(len(content) + 1)
    return content[:at] + dice.randbytes(dice.choice((1, 8, 64))) + content[at:]


def blank(dice, content):
    """Zeros, as a disk that was full leaves them."""
    start, size = dice.randrange(len(content)), dice.randrange(1, 512)
    return (content[:start] + bytes(size) + content[start + size :])[: len(content)]


def swap(dice, content):
    """Two pieces."""
    size = dice.randrange(1, 64)
    one, other = sorted(dice.randrange(len(content) - size) for _ in range(2))
    pieces = (
        content[:one],
        content[other : other + size],
        content[one + size : other],
        content[one : one + size],
    )
    return (b"".join(pieces) + content[other + size :])[: len(content)]


def header(dice, content):
    """An entry of the header, whose length still fits."""
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    name = dice.choice(list(entries))
    kind = dice.randrange(4)
    if kind == 0:
        del entries[name]
    elif kind == 1:
        entries[dice.choice(list(entries))] = entries[name]
    elif kind == 2:
        entries[name][dice.choice(list(entries[name]))] = dice.choice(STRANGE)
    else:
        entries[name] = dice.choice(STRANGE)
    text = json.dumps(entries).encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", dice.choice((len(text), 2**40, 0))) + text + content[8 + size :]


def test_changed_folders_are_refused_or_the_same_to_the_bit(tmp_path):
    mixed().save_pretrained(tmp_path / "m")
    memory = EpisodicMemory.from_pretrained(tmp_path / "m")
    before, content, dice = frozen(memory), (tmp_path / "m" / FILE).read_bytes(), random.Random(0)
    refused = 0
    for number in range(MUTATIONS):
        change = dice.choice((flip, cut, insert, blank, swap, header))
        (tmp_path / "m" / FILE).write_bytes(change(dice, content))
        try:
            other = EpisodicMemory.from_pretrained(tmp_path / "m")
        except ek.EngramError as error:
            assert str(error).startswith("directory: expected a saved memory, got"), (number, change, error)
            assert "\n" not in str(error) and len(str(error)) < 600, (number, change, error)
            refused += 1
        else:
            assert_unchanged(other, before)
            assert other.settings == memory.settings and torch.equal(other.m0, memory.m0)
    assert 0.9 * MUTATIONS < refused < MUTATIONS


def test_parts_of_other_memories_are_refused(tmp_path):
    for name, memory in (("one", mixed()), ("other", mixed())):
        memory.forget(ids=[1 if name == "one" else 2])
        memory.save_pretrained(tmp_path / name)
    one, other = ((tmp_path / name / FILE).read_bytes() for name in ("one", "other"))
    size = 8 + int.from_bytes(one[:8], "little")
    assert size == 8 + int.from_bytes(other[:8], "little")
    (tmp_path / "one" / FILE).write_bytes(one[:size] + other[size:])
    with pytest.raises(ek.EngramError, match="is incomplete or was changed"):
        EpisodicMemory.from_pretrained(tmp_path / "one")


def strange(dice, content):
    """The same JSON with something else somewhere."""
    if isinstance(content, (dict, list)) and content and dice.random() < 0.8:
        places = list(content) if isinstance(content, dict) else list(range(len(content)))
        place = dice.choice(places)
        changed = content.copy()
        changed[place] = strange(dice, content[place])
        if dice.random() < 0.05:
            del changed[place]
        return changed
    return dice.choice(STRANGE)


def bend(dice, tensors):
    """One tensor with another shape, type or entry."""
    name = dice.choice(list(tensors))
    tensor = tensors[name].clone()
    kind = dice.randrange(5)
    if kind == 0:
        tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice((0, -1, 1, 2**40))
    elif kind == 1 and tensor.is_floating_point():
        tensor.view(-1)[dice.randrange(tensor.numel())] = dice.choice(
            (float("nan"), float("inf"), 1e-30, 1e30)
        )
    elif kind == 2:
        tensor = tensor[: dice.randrange(len(tensor))].clone()
    elif kind == 3:
        tensor = tensor.to(dice.choice((torch.float32, torch.int8, torch.bool, torch.float8_e4m3fn)))
    else:
        tensor = tensor.reshape(dice.choice(((-1,), (1, -1), (-1, 1))))
    return {**tensors, name: tensor}


def test_forged_folders_are_refused_or_can_be_used(tmp_path):
    """Whoever forges a file can give it its checksum; it is no memory then, or does what memories do."""
    mixed().save_pretrained(tmp_path / "m")
    config, tensors, lines = unpack(tmp_path / "m" / FILE)
    dice, used = random.Random(1), 0
    for number in range(MUTATIONS // 4):
        forged = [config, tensors, lines]
        which = dice.randrange(3)
        forged[which] = bend(dice, tensors) if which == 1 else strange(dice, forged[which])
        if not isinstance(forged[0], dict):
            continue
        try:
            pack(tmp_path / "m" / FILE, *forged)
        except (OverflowError, UnicodeEncodeError, ValueError):
            continue  # Not even forged.
        try:
            memory = EpisodicMemory.from_pretrained(tmp_path / "m")
            queries = latents(2, 3, 6)
            for addressing in ("key", "content"):
                memory.read(queries, addressing=addressing)
            memory.leverage(queries)
            memory.recall(queries[0], memory=1)
            memory.write(queries, ids=range(100, 106))
            memory.forget(ids=memory.ids)
            memory.save_pretrained(tmp_path / "m", replace=True)
        except ek.EngramError as error:
            assert "\n" not in str(error), (number, error)
        else:
            used += 1
    assert used


def test_the_same_file_under_another_folder_is_the_same_memory(tmp_path):
    filled().save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILE).write_bytes((tmp_path / "a" / FILE).read_bytes())
    assert_unchanged(EpisodicMemory.from_pretrained(tmp_path / "b"), frozen(filled()))
