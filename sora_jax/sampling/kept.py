"""Residuals kept from evaluated steps: brought up to date, and carried on to a later time.

A reused step takes the residual of the last evaluation as it is, or, extrapolated, the line through the last two:
``r + (t - t_1) (r_1 - r_2) / (t_1 - t_2)``.

Invariant: rows are brought up to date by themselves (a half step evaluates the first ones only), and a line is drawn only
through two evaluations between which nothing restarted; else the residual is taken as it is.

Source: TaylorSeer (arXiv 2503.06923), first order.  Differs from source: differences are by flow time, not by the number of
steps, so that steps may be unequal and evaluations irregular.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax import layout
from sora_jax.sampling.joining import expand
from sora_jax.sampling.state import Kept


def updated(kept: Kept, residual: Float[Array, "R ..."], t: Float[Array, ""], *, continues: Bool[Array, ""]) -> Kept:
    """Returns what is kept after an evaluation of the first rows at ``t``; without those before unless it ``continues``."""
    assert kept.residual is not None
    rows = len(residual)
    if rows < len(kept.residual):
        residual = layout.joined(residual, kept.residual[rows:])
    if kept.residual_before is None or kept.times_2R is None:
        return dataclasses.replace(kept, residual=residual)
    first_R = jnp.arange(len(residual)) < rows
    before_R = jnp.where(continues, kept.times_2R[0], jnp.nan)
    times_2R = jnp.stack([jnp.where(first_R, t, kept.times_2R[0]), jnp.where(first_R, before_R, kept.times_2R[1])])
    residual_before = jnp.where(expand(first_R, residual), kept.residual, kept.residual_before)
    return dataclasses.replace(kept, residual=residual, residual_before=residual_before, times_2R=times_2R)


def residual_at(kept: Kept, rows: int, t: Float[Array, ""]) -> Float[Array, "R ..."]:
    """Returns the residual of the first rows for a reused step at time ``t``."""
    assert kept.residual is not None
    residual = kept.residual[:rows]
    if kept.residual_before is None or kept.times_2R is None:
        return residual
    last_R, before_R = kept.times_2R[:, :rows]
    known_R = jnp.isfinite(before_R)
    weight_R = jnp.where(known_R, (t - last_R) / jnp.where(known_R, last_R - before_R, 1), 0).astype(residual.dtype)
    return residual + expand(weight_R, residual) * (residual - kept.residual_before[:rows])
