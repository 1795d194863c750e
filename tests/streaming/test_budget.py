import pytest

from sora_jax.process import available_bytes
from sora_jax.streaming.budget import parse_budget


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        ("3.3GB", 3_300_000_000),
        ("3 GiB", 3 * 2**30),
        ("512MiB", 512 * 2**20),
        (" 650mb ", 650_000_000),
        ("2kB", 2_000),
        (".5KiB", 512),
        ("1TB", 10**12),
        ("123456b", 123_456),
        ("123456", 123_456),
        (123_456, 123_456),
        (3.3e9, 3_300_000_000),
    ],
)
def test_sizes(value, num_bytes):
    assert parse_budget(value) == num_bytes


@pytest.mark.parametrize(
    "value", ["", "GB", "3.3 G", "-1GB", "3,3GB", "1e9", "nan", "3iB", "0", "0.5", 0, -5, float("nan"), True]
)
def test_what_is_no_size_is_refused(value):
    with pytest.raises(ValueError, match="memory budget is"):
        parse_budget(value)


def test_auto_leaves_a_share_of_what_is_free():
    assert 0.5 * available_bytes() < parse_budget("auto") < available_bytes()
