"""Seeded damage to JSON files and to the headers of safetensors files."""

import json
import pathlib
import random

_HOSTILE = (
    *(None, True, False, 0, -1, 1, 3, 1.5, 2**31, 2**40, 2**63, 10**30, -(10**30), 1e-320, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "1", "x\n\x1b[31m\u202e", "\ud800", "a" * 100_000),
    *([], {}, [None], [1, 2, 3], ["x"], [[]], {"x": 1}, [float("nan")] * 3),
)


def mutate(file: pathlib.Path, seed: int) -> None:
    """Changes a JSON file or the header of a safetensors file, by a seed."""
    rng = random.Random(f"{file.name} {seed}")
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        file.write_bytes(_mutate_json(content, rng))
        return
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        place = rng.randrange(8 + length) if rng.random() < 0.5 else rng.randrange(8)
        file.write_bytes(_flipped(content, place, rng))
        return
    header = _mutate_json(content[8 : 8 + length], rng)
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**40, 2**63])
    file.write_bytes(length.to_bytes(8, "little") + header + content[8 + length :][-len(content) :])


def _mutate_json(content: bytes, rng: random.Random) -> bytes:
    action = rng.random()
    if action < 0.1:
        return _flipped(content, rng.randrange(len(content)), rng)
    if action < 0.15:
        return content[: rng.randrange(len(content))]
    if action < 0.2:
        return rng.choice([b"", b"[" * 100_000, b"\xff\xfe{}", b'{"a":' * 200 + b"1" + b"}" * 200, b"1" * 5000])
    value = json.loads(content)
    if action < 0.25:
        return json.dumps(rng.choice(_HOSTILE)).encode()
    for _ in range(rng.choice([1, 1, 2, 5])):
        parent, key = rng.choice(list(_places(value)))
        act = rng.random()
        if act < 0.15:
            del parent[key]
        elif act < 0.25 and isinstance(parent, dict):
            parent[rng.choice(["x\n\x1b", "..", "", *parent])] = parent.pop(key)
        elif act < 0.35:
            _, other = rng.choice(list(_places(value)))
            parent[key] = other
        elif isinstance(parent[key], int | float) and act < 0.6:
            parent[key] = parent[key] + rng.choice([-1, 1, 0.5, 1000])
        else:
            parent[key] = rng.choice(_HOSTILE)
        if not isinstance(value, dict) or not value:
            break
    return json.dumps(value).encode()


def _places(value):
    """Yields (container, key) of every value inside `value`."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _flipped(content: bytes, place: int, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)
