"""Solvers of the flow ODE: what a step adds to the Euler step, from the one evaluation before it.

Times are in flow units (1 noise, 0 data), velocities point from noise to data, and every solver is Euler
``z + (t - t_next) v`` plus a correction, so that a sampling may fall back to Euler at any sample, frame or step.

Invariant: a correction vanishes where velocity is constant, and the functions see numbers only: no model, no loop.
Heun evaluates twice a step; its second evaluation belongs to `moving`.  Where a correction is not used, at a start or the
end of the path, it is still finite: otherwise gradients would be NaN.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SOLVERS = ("euler", "ab2", "ab3", "dpmpp", "unipc", "heun")


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
    usable = (t_next > 0) & jnp.isfinite(weight)
    return jnp.where(usable, weight, 0) * (data - data_before)


def ab3_correction(
    v: Float[Array, "B ..."],
    v_before: Float[Array, "B ..."],
    v_older: Float[Array, "B ..."],
    *,
    t_older: Float[Array, ""],
    t_before: Float[Array, ""],
    t: Float[Array, ""],
    t_next: Float[Array, ""],
) -> Float[Array, "B ..."]:
    """Returns the Adams-Bashforth 3 term for unequal steps: the integral of a velocity quadratic in time, minus Euler's."""
    step, step_before = t - t_next, t_before - t
    slope = (v - v_before) * _inverse(t - t_before)
    slope_before = (v_before - v_older) * _inverse(t_before - t_older)
    bend = (slope - slope_before) * _inverse(t - t_older)
    return (step**3 / 3 + step_before * step**2 / 2) * bend - step**2 / 2 * slope


def trapezoid_correction(
    v: Float[Array, "B ..."], v_before: Float[Array, "B ..."], *, t_before: Float[Array, ""], t: Float[Array, ""]
) -> Float[Array, "B ..."]:
    """Returns what makes the Euler step from ``t_before`` to ``t`` second order, once its end has been evaluated."""
    return (t_before - t) / 2 * (v - v_before)


def unic_corrected(
    base: Float[Array, "B ..."],
    data: Float[Array, "B ..."],
    data_before: Float[Array, "B ..."],
    data_older: Float[Array, "B ..."],
    *,
    t_older: Float[Array, ""],
    t_before: Float[Array, ""],
    t: Float[Array, ""],
    second_order: Bool[Array, "..."],
) -> Float[Array, "B ..."]:
    """Returns the latents at ``t`` by UniC, the corrector of UniPC, from those at ``t_before``, ``base``.

    ``data`` is the predicted end of the path, as in `dpmpp_correction`, at the three times, the newest at uncorrected latents.
    Order 2 integrates the parabola through all three in log-SNR; order 1 takes half of the last difference.

    Source: arXiv 2302.04867 algorithm 1 with B(h) = e^h - 1 (bh2), in the flow alpha = 1 - t and sigma = t, data prediction;
    its predictor of order 2 is then that of DPM-Solver++(2M).
    """
    log_ratio = _log_snr(t) - _log_snr(t_before)
    reach = _finite(log_ratio / (_log_snr(t_older) - _log_snr(t_before)))  # 0 where the older one lies at noise
    first, second = _corrector_weights(-log_ratio)
    older_weight = _finite((second - first) * reach**2 / (1 - reach))
    newest_weight = _finite(first - (second - first) * reach / (1 - reach))
    bent = older_weight * (data_older - data_before) + newest_weight * (data - data_before)
    term = data_before + jnp.where(second_order, bent, (data - data_before) / 2)
    ratio = _finite(t / t_before)
    return ratio * base + (1 - ratio) * term


def _corrector_weights(x: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns ``1/x - 1/(e^x - 1)`` and ``2/x^2 - (2/x + 1)/(e^x - 1)``, by their series near 0, where they are 1/2 and 1/3."""
    small = jnp.abs(x) < 0.3
    far = jnp.where(small, 1.0, x)
    first = jnp.where(small, 1 / 2 - x / 12 + x**3 / 720, 1 / far - 1 / jnp.expm1(far))
    series = 1 / 3 - x / 12 + x**2 / 360 + x**3 / 720
    return first, jnp.where(small, series, 2 / far**2 - (2 / far + 1) / jnp.expm1(far))


def _inverse(x: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def _finite(x: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(jnp.isfinite(x), x, 0)


def _log_snr(t: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.log1p(-t) - jnp.log(t)
