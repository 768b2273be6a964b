"""Random JSON schemas: nested objects, arrays, enums, numbers and strings with bounds."""

from typing import Any

import numpy as np

_NAMES = ("name", "count", "colour", "box", "when", "is_red", "parts", "score", "größe", "a-b")
_WORDS = ("red", "green", "blue", 'a big "dog"', "Straße", "", "1")


def random_schema(rng: np.random.Generator, depth: int = 3) -> dict[str, Any]:
    """Returns a schema of draft 2020-12 whose values are nested up to `depth` deep."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "union"]
    kind = rng.choice([*kinds, *["object", "object", "object", "array", "array"] * (depth > 0)])
    return globals()[f"_{kind}"](rng, depth)


def _object(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    names = [str(name) for name in rng.permutation(_NAMES)[: rng.integers(1, 5)]]
    properties = {name: random_schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    closed = {"additionalProperties": False} if rng.random() < 0.5 else {}
    return {"type": "object", "properties": properties, "required": required} | closed


def _array(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    least = int(rng.integers(0, 3))
    bounds = {"minItems": least} | ({"maxItems": least + int(rng.integers(0, 3))} if rng.random() < 0.8 else {})
    return {"type": "array", "items": random_schema(rng, depth - 1), **bounds}


def _string(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del depth
    least = int(rng.integers(0, 5))
    form = rng.choice(["length", "length", "pattern", "format", "any"])
    if form == "length":
        return {"type": "string", "minLength": least, "maxLength": least + int(rng.integers(0, 8))}
    if form == "pattern":
        return {"type": "string", "pattern": str(rng.choice([r"^[A-Z]{2}-\d{3}$", "^(ab|cd)+$", r"^\d{1,4}$"]))}
    if form == "any":
        return {"type": "string"}
    return {"type": "string", "format": str(rng.choice(["date", "time", "uuid", "ipv4"]))}


def _integer(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del depth
    low = int(rng.integers(-1000, 1000))
    return {"type": "integer"} | ({"minimum": low, "maximum": low + int(rng.integers(0, 500))} if low % 4 else {})


def _number(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del depth
    low = round(float(rng.uniform(-10, 10)), 2)
    return {"type": "number"} | ({"minimum": low, "exclusiveMaximum": low + 5} if rng.random() < 0.7 else {})


def _boolean(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del rng, depth
    return {"type": "boolean"}


def _null(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del rng, depth
    return {"type": ["null", "boolean"]}


def _enum(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del depth
    values = [*map(str, rng.permutation(_WORDS)[:3]), None, 7, [1, "x"], {"a": 1}]
    return {"enum": values[int(rng.integers(0, 3)) :]}


def _const(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    del depth
    return {"const": str(rng.choice(_WORDS))}


def _union(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, min(depth - 1, 0)), {"type": "boolean"}]}
