"""The compute dtype where nobody names one: bfloat16 on accelerators, float32 on every CPU."""

from pathlib import Path

import pytest

from sora_jax.devices import compute_dtype
from sora_jax.devices.compute_dtype import choose_dtype, dtype_note, multiplies_bfloat16


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "gpu", "float32"),
    ],
)
def test_auto_depends_on_the_platform_and_a_name_does_not(dtype: str, platform: str, expected: str) -> None:
    assert choose_dtype(dtype, platform=platform) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("processor\t: 0\n", None),
    ],
)
def test_products_of_bfloat16_are_read_off_the_flags(tmp_path: Path, text: str, expected: bool | None) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text(text)
    assert multiplies_bfloat16(information) is expected
    assert multiplies_bfloat16(tmp_path / "gone") is None


@pytest.mark.parametrize("has", [True, False, None])
def test_who_asks_for_bfloat16_by_name_hears_where_it_may_be_slow(monkeypatch: pytest.MonkeyPatch, has: bool | None) -> None:
    monkeypatch.setattr(compute_dtype, "multiplies_bfloat16", lambda: has)
    note = dtype_note("bfloat16", platform="cpu")
    assert note.startswith("this processor has no products of bfloat16") == (has is False)
    assert dtype_note("bfloat16", platform="gpu") == dtype_note("float32", platform="cpu") == ""
