"""The form of norms and attention for float16 programs: equal in float32, and small where the usual form is large."""

import dataclasses
from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.config import FLOAT32
from sora_jax.networks.attention import DENSE
from sora_jax.networks.layers import RMSNorm, layer_norm
from sora_jax.networks.vae.layers import GroupNorm

HALF_RANGE = dataclasses.replace(FLOAT32, half_range=True)


def _tokens(seed: int, *, outliers: bool) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), (2, 7, 96))
    return x.at[..., 5].set(-900.0).at[..., 40].set(400.0) if outliers else x


def _norms(half_range: bool) -> dict[str, Callable[[jax.Array], jax.Array]]:
    policy = HALF_RANGE if half_range else FLOAT32
    rms = RMSNorm(96, epsilon=1e-6, policy=policy)
    rms.scale[...] = jnp.linspace(0.5, 2.0, 96)
    group = GroupNorm(96, groups=8, epsilon=1e-5, policy=policy)
    group.scale[...], group.bias[...] = jnp.linspace(0.5, 2.0, 96), jnp.linspace(-1.0, 1.0, 96)
    return {"layer": lambda x: layer_norm(x, epsilon=1e-6, half_range=half_range), "rms": rms, "group": group}


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("factor", [1e-4, 1.0])
def test_norms_agree_with_their_usual_form(kind: str, outliers: bool, factor: float) -> None:
    """Two float32 evaluations of one formula; at 1e-4 the epsilon rules, so its scaling is tested too."""
    x = factor * _tokens(3, outliers=outliers)
    np.testing.assert_allclose(_norms(True)[kind](x), _norms(False)[kind](x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_row_of_zeros_stays_finite(kind: str) -> None:
    np.testing.assert_array_equal(_norms(True)[kind](jnp.zeros((2, 7, 96))), 0)


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_no_intermediate_leaves_the_range_of_float16(kind: str) -> None:
    """Every value of the traced program is below float16's largest number; in the usual form 900 squared is not."""
    x = _tokens(3, outliers=True)
    assert _largest(_norms(True)[kind], x) < 65504 < _largest(_norms(False)[kind], x)


def _largest(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    closed = jax.make_jaxpr(function)(x)
    return _evaluate(closed.jaxpr, closed.consts, [x])[1]


def _evaluate(jaxpr: jax.extend.core.Jaxpr, consts: list, inputs: list) -> tuple[list, float]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    largest = 0.0

    def value(atom: object) -> jax.Array:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [value(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if inner is not None:
            results, inside = _evaluate(inner.jaxpr, inner.consts, operands)
            largest = max(largest, inside)
        else:
            results = equation.primitive.bind(*operands, **equation.params)
            results = results if equation.primitive.multiple_results else [results]
        for variable, result in zip(equation.outvars, results, strict=True):
            known[variable] = result
            largest = max(largest, float(jnp.max(jnp.abs(result))))
    return [value(atom) for atom in jaxpr.outvars], largest


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.ci), True])
def test_attention_agrees_with_its_usual_form(masked: bool) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 9, 16))
    bias = jax.random.normal(jax.random.key(1), (1, 3, 9, 9))
    mask = jnp.asarray([[True] * 5 + [False] * 4, [True] * 9])[:, None, None, :] if masked else None
    usual, half = (DENSE(q, k, v, scale=0.3, bias=bias, mask=mask, half_range=half) for half in (False, True))
    np.testing.assert_allclose(half, usual, rtol=0, atol=2e-6)
    if masked:
        hidden = DENSE(q, k, v.at[0, :, 5:].add(100.0), scale=0.3, bias=bias, mask=mask, half_range=True)
        np.testing.assert_array_equal(hidden, half)  # a hidden key's weight is exactly zero
