"""Values that no honest file holds, and ways of putting them into JSON, texts and bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = (0, -1, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 10**9, 10**18, 10**40, -(2**63), 1.5, 1e308, -0.0)
TEXTS = ("", "x", "../x", "/etc/passwd", "a\x1b[31mb", "\n", "a\0b", "\ud800", "\u202e", "x" * 5000, "0", "F32", "é" * 300)
VALUES: tuple[Any, ...] = (None, True, False, *NUMBERS, *TEXTS, [], {}, [[]], [1, 2], {"a": 1}, [None], [0] * 1000, [10**18, 0])


def nested(draw: np.random.Generator) -> str:
    """Returns JSON that is deeper than any recursion should go."""
    depth = int(draw.choice([50, 900, 100_000]))
    return draw.choice(["[", '{"a":', '[{"a":']) * depth


def pick(draw: np.random.Generator, values: Any) -> Any:
    """Returns one of several values of any type."""
    return values[int(draw.integers(len(values)))]


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) of a JSON value."""
    found, left = [], [tree]
    while left:
        container = left.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            found.append((container, key))
            if isinstance(value, dict | list):
                left.append(value)
    return found


def mutate_json(path: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value in place of one in a JSON file, or removes, doubles or renames it; returns what was done."""
    tree = json.loads(path.read_text())
    container, key = pick(draw, places(tree))
    action = int(draw.integers(8))
    if action == 0:
        del container[key]
        done = f"{key} removed"
    elif action == 1 and isinstance(container, dict):
        name = pick(draw, TEXTS)
        container[name] = container.pop(key)
        done = f"{key} renamed"
    elif action == 2:
        text = json.dumps(tree)
        at = text.find(json.dumps(key) + ":") if isinstance(container, dict) else -1
        entry = json.dumps({str(key): container[key]})[1:-1]
        path.write_text(text[:at] + entry + ", " + text[at:] if at >= 0 else text * 2)
        return f"{key} doubled"
    elif action == 3:
        return f"{key} nested: " + _splice(path, tree, container, key, nested(draw))
    elif action == 4:
        return f"{key}: " + _splice(
            path, tree, container, key, pick(draw, ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1_0", "0x1"])
        )
    else:
        container[key] = pick(draw, VALUES)
        done = f"{key} = {container[key]!r:.30}"
    path.write_text(json.dumps(tree))
    return done


def _splice(path: Path, tree: Any, container: Any, key: Any, text: str) -> str:
    container[key] = "@here@"
    path.write_text(json.dumps(tree).replace('"@here@"', text))
    return text[:20]


def mutate_bytes(content: bytes, draw: np.random.Generator) -> tuple[bytes, str]:
    """Returns the bytes with some changed, removed, doubled or put in, and what was done."""
    changed = bytearray(content)
    at = int(draw.integers(len(content)))
    span = int(draw.choice([1, 2, 4, 16]))
    action = int(draw.integers(5))
    if action == 0:
        changed[at] ^= 1 << int(draw.integers(8))
    elif action == 1:
        changed[at : at + span] = draw.bytes(span)
    elif action == 2:
        del changed[at : at + span]
    elif action == 3:
        changed[at:at] = changed[at : at + span]
    else:
        changed[at:at] = draw.bytes(span)
    return bytes(changed), f"{('bit flipped', 'overwritten', 'removed', 'doubled', 'put in')[action]} at {at}"


def instead(draw: np.random.Generator) -> tuple[bytes, str]:
    """Returns what failed downloads leave in place of a file."""
    contents = {
        "git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>" * 20,
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "nothing": b"",
        "zeros": bytes(5000),
        "noise": draw.bytes(5000),
        "gzip": b"\x1f\x8b\x08\x00" + draw.bytes(200),
        "a header of 2**62": (2**62).to_bytes(8, "little") + bytes(100),
        "JSON": b'{"error": "not found"}',
    }
    name = pick(draw, list(contents))
    return contents[name], name
