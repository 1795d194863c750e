"""The text of compiled programs, written by hand where a figure can be counted, and by XLA for this CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback

from sora_jax.planning.compiled_text import CompiledText, shape_bytes

# One all-to-all of 2 KB in each of 28 turns; weights are read a slice at a time, and one array lies in fast memory.
BY_HAND = """HloModule jit_f, is_scheduled=true

%slice (p0: bf16[28,16,8], p1: s32[]) -> bf16[16,8] {
  %p0 = bf16[28,16,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = bf16[1,16,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,16,8}
  ROOT %flat = bf16[16,8]{1,0} bitcast(%cut)
}

%body (arg: (s32[], bf16[64,16], bf16[28,16,8])) -> (s32[], bf16[64,16], bf16[28,16,8]) {
  %arg = (s32[]{:T(128)}, bf16[64,16]{1,0:T(8,128)(2,1)}, bf16[28,16,8]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[64,16]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %w = bf16[28,16,8]{2,1,0} get-tuple-element(%arg), index=2
  %own = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %i), kind=kLoop, calls=%slice
  %moved = bf16[64,16]{1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %out = (s32[], bf16[64,16], bf16[28,16,8]) tuple(%i, %moved, %w)
}

%condition (arg.1: (s32[], bf16[64,16], bf16[28,16,8])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[64,16]{1,0}, bf16[28,16,8]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %at = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[64,16], bf16[28,16,8])) -> (s32[], bf16[64,16], bf16[28,16,8]) {
  %a = (s32[]{:T(128)}, bf16[64,16]{1,0}, bf16[28,16,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[64,16], bf16[28,16,8]) while(%a), condition=%condition, body=%body
}
"""


def test_loops_collectives_and_bytes_of_a_program_by_hand() -> None:
    text = CompiledText(BY_HAND)
    tokens, weights = 64 * 16 * 2, 16 * 8 * 2
    (moved,) = text.collectives()
    assert (moved.kind, moved.number, moved.nbytes) == ("all-to-all", 28, 28 * tokens)
    assert text.moved_bytes() == 28 * (2 * tokens + weights + 4)  # a slice and its index; the copy in fast memory is free
    assert text.loops() == 0
    assert text.host_transfers() == []
    assert text.dtypes() == {"s32", "bf16", "pred"}
    asked = CompiledText(BY_HAND.replace("constant(28)", "parameter(1)"))
    assert (asked.loops(), asked.collectives()[0].number) == (1, 1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[2,3]{1,0}", 24),
        ("(bf16[4]{0}, s32[], /*index=2*/pred[8]{0})", 8 + 4 + 8),
        ("bf16[8]{0:T(8,128)(2,1)S(1)}", 0),
        ("s4[7]{0}", 4),
        ("f8e4m3fn[16]{0}", 16),
        ("token[]", 0),
        ("f64[]", 8),
    ],
)
def test_bytes_of_a_shape(shape: str, expected: int) -> None:
    assert shape_bytes(shape) == expected


def test_a_program_of_xla_moves_what_xla_counts_times_its_turns() -> None:
    """XLA counts a loop once; without one, both counts are of the same operations."""
    rows = jax.ShapeDtypeStruct((512, 256), jnp.float32)

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w)

    one = jax.jit(layer).lower(rows, jax.ShapeDtypeStruct((256, 256), jnp.float32)).compile()
    moved = CompiledText(one.as_text()).moved_bytes()
    assert moved == pytest.approx(one.cost_analysis()["bytes accessed"], rel=0.05)

    stack = jax.ShapeDtypeStruct((11, 256, 256), jnp.float32)
    many = jax.jit(lambda x, stack: jax.lax.scan(lambda x, w: (layer(x, w), None), x, stack)[0]).lower(rows, stack).compile()
    scanned = CompiledText(many.as_text())
    assert scanned.loops() == 0
    assert 11 * moved <= scanned.moved_bytes() < 11 * 2.2 * moved  # a slice of the stack is copied, the carry too


def test_a_call_of_the_host_is_seen() -> None:
    def loud(x: jax.Array) -> jax.Array:
        io_callback(lambda value: None, None, x)
        return x + 1

    text = CompiledText(jax.jit(loud).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile().as_text())
    assert len(text.host_transfers()) == 1
    assert "callback" in text.host_transfers()[0]
