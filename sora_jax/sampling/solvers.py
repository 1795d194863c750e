"""Solvers of the flow ODE: what a step adds to the Euler step, from the one evaluation before it.

Times are in flow units (1 noise, 0 data), velocities point from noise to data, and every solver is Euler
``z + (t - t_next) v`` plus a correction, so that a sampling may fall back to Euler at any sample, frame or step.

Invariant: a correction vanishes where velocity is constant, and the functions see numbers only: no model, no loop.
Heun evaluates twice a step; its second evaluation belongs to the sampler.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

SOLVERS = ("euler", "ab2", "dpmpp", "heun")


def check_solver(solver: Any) -> str:
    """Returns the solver's name.

    Raises:
      ValueError: it is unknown.
    """
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; expected one of {', '.join(SOLVERS)}.")
    return solver


def ab2_correction(
    v: Float[Array, "B ..."],
    v_before: Float[Array, "B ..."],
    *,
    t_before: Float[Array, ""],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
) -> Float[Array, "B ..."]:
    """Returns the Adams-Bashforth 2 term for unequal steps: the integral of a velocity linear in time, minus Euler's.

    With ``t_next = 0`` it extrapolates a leap.
    """
    step, step_before = t - t_next, t_before - t
    return (step * step / (2 * step_before)) * (v - v_before)


def dpmpp_correction(
    data: Float[Array, "B ..."],
    data_before: Float[Array, "B ..."],
    *,
    t_before: Float[Array, ""],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
) -> Float[Array, "B ..."]:
    """Returns the second-order term of DPM-Solver++(2M) for the flow ``z = (1 - t) data + t noise``.

    ``data = z + t v`` is the predicted end of the path.  In this flow the first-order solver is Euler.  The term is 0 in the
    step to t = 0 and after a step from t = 1, where the log signal-to-noise ratio is infinite, as in the published solver.

    Source: arXiv 2211.01095 algorithm 2, with alpha = 1 - t and sigma = t.
    """
    log_ratio = _log_snr(t_next) - _log_snr(t)
    log_ratio_before = _log_snr(t) - _log_snr(t_before)
    weight = (1 - t_next / t) * log_ratio / (2 * log_ratio_before)
    usable = (t_next > 0) & jnp.isfinite(weight)  # also where the result is not used: gradients would be NaN
    return jnp.where(usable, weight, 0) * (data - data_before)


def _log_snr(t: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.log1p(-t) - jnp.log(t)
