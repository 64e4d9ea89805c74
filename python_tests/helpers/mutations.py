"""Saved folders with one thing changed: a bit, a byte, a piece, an entry, a file, another folder's file."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

# ENGRAM_MUTATIONS=10000 makes a long run of the tests that use it.
COUNT = int(os.environ.get("ENGRAM_MUTATIONS", "200"))


def mutations(folder: Path, other: Path, count: int = COUNT, seed: int = 0) -> Iterator[str]:
    """Change `folder` in one place, yield what was changed, put it back; so many times.

    Args:
        folder: a saved folder.
        other: one of the same kind with other content, whose files are copied in.
        count: of the changes.
        seed: of what is changed.
    """
    chance = random.Random(seed)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if _holds(path))
    for _ in range(count):
        name = chance.choice(names)
        path = folder / name
        original = path.read_bytes()
        kinds = [_flipped, _replaced, _removed, _inserted, _truncated, _swapped, _repeated]
        if name.endswith(".json"):
            kinds += [_entry] * 4 + [_spaced, _nested]
        # The only file of another folder is that folder, and nothing changed.
        kind = chance.choice([*kinds, _gone] + [None] * (len(names) > 1))
        content = (other / name).read_bytes() if kind is None else kind(original, chance)
        if content == original:
            continue
        path.unlink() if content is None else path.write_bytes(content)
        yield f"{name}: {'another folder' if kind is None else kind.__name__}"
        path.write_bytes(original)


def _holds(path: Path) -> bool:
    """Whether a file has content; models' cards have none, nor have locks."""
    return path.is_file() and path.name not in ("README.md", ".lock")


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _flipped(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def _replaced(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]


def _removed(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice([1, 2, 100]) :]


def _inserted(content, chance):
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.choice([b" ", b"0", b"\n", b"\x00", b","]) + content[place:]


def _truncated(content, chance):
    return content[: chance.randrange(len(content))]


def _swapped(content, chance):
    place = chance.randrange(len(content) - 1)
    return content[:place] + content[place : place + 2][::-1] + content[place + 2 :]


def _repeated(content, chance):
    place = chance.randrange(len(content))
    return content[:place] + content[place : place + 20] * 2 + content[place + 20 :]


def _gone(content, chance):
    return None


def _spaced(content, chance):
    return json.dumps(json.loads(content), indent=chance.choice([None, 0, 1, 4])).encode()


def _nested(content, chance):
    depth = chance.choice([10, 100_000])
    return b"[" * depth + content + b"]" * depth


def _entry(content, chance):
    """One entry of a JSON file, changed in kind or value, taken out, or doubled."""
    whole = json.loads(content)
    places = list(_places(whole))
    holder, key = chance.choice(places)
    value = holder[key]
    change = chance.randrange(5)
    if change == 0:
        del holder[key]
    elif change == 1 and isinstance(holder, list):
        holder.append(value)
    elif change == 2:
        holder[key] = [value]
    elif isinstance(value, bool) or value is None:
        holder[key] = 0 if value else True
    elif isinstance(value, (int, float)):
        holder[key] = chance.choice([value + 1, -value - 1, str(value), 1e300, None])
    elif isinstance(value, str):
        holder[key] = chance.choice([value + "x", value[:-1], value.upper() + " ", 3, None])
    else:
        holder[key] = chance.choice([None, 3, {}, []])
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    return text.encode()


def _places(value):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(entries):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)
