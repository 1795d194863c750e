"""The page of the host program says what the code does: its lists and its recipe for noise, followed word for word in NumPy."""

import re
from pathlib import Path

import numpy as np

from sora_jax.inputs import cleaning
from sora_jax.sampling import noise

PAGE = (Path(__file__).parents[2] / "docs" / "host_program.md").read_text("utf-8")
MASK = 0xFFFFFFFF


def fences() -> list[str]:
    return re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)


def test_the_lists_of_substitutions_are_those_of_the_code():
    shown = [text.splitlines() for text in fences() if "  ->  " in text]
    lists = (cleaning._BEFORE_FILE_NAMES, cleaning._AFTER_FILE_NAMES, cleaning._LAST)
    expected = [[f"{pattern.pattern}  ->  {text!r}" for pattern, text in each] for each in lists]
    assert shown == expected


def threefry(key: tuple[int, int], x: tuple[int, int]) -> tuple[int, int]:
    k = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    a, b = (x[0] + k[0]) & MASK, (x[1] + k[1]) & MASK
    rotations = [[13, 15, 26, 6], [17, 29, 16, 24]]
    for i in range(5):
        for r in rotations[i % 2]:
            a = (a + b) & MASK
            b = ((b << r | b >> (32 - r)) & MASK) ^ a
        a, b = (a + k[(i + 1) % 3]) & MASK, (b + k[(i + 2) % 3] + i + 1) & MASK
    return a, b


def value(key: tuple[int, int], n: int, polynomials: list[list[float]]) -> np.float32:
    a, b = threefry(key, (n >> 32, n & MASK))
    unit = np.uint32((a ^ b) >> 9 | 0x3F800000).view(np.float32) - np.float32(1)
    low = np.float32(-0.99999994)
    u = np.maximum(low, unit * (np.float32(1) - low) + low)
    w = -np.log1p(-u * u)
    at, row = (w - np.float32(2.5), polynomials[0]) if w < 5 else (np.sqrt(w) - np.float32(3), polynomials[1])
    p = np.float32(row[0])
    for coefficient in row[1:]:
        p = p * at + np.float32(coefficient)
    return np.sqrt(np.float32(2)) * p * u


def test_the_recipe_for_noise_makes_the_noise():
    (text,) = [text for text in fences() if text.startswith("2.81022636e-08")]
    polynomials = [[float(word) for word in line.split()] for line in text.splitlines()]
    shape = (1, 3, 4, 5, 4)
    for seed in (0, 5, 2**32 - 1):
        key = threefry((0, seed), (0, 0))
        values = [value(key, n, polynomials) for n in range(240)]
        np.testing.assert_allclose(values, np.asarray(noise.initial_noise(seed, shape)).ravel(), rtol=1e-5, atol=1e-5)
