"""Classifier-free guidance: from the velocities with and without caption to the one that a step follows.

`Guidance` is what a user asks for, `GuidanceRule` the same as runtime inputs of the compiled sampler.  Published rules, each by
its own name:

    scale        u + scale (c - u), the same at all times
    interval     outside it the caption alone is followed, and one row of two is evaluated
    zero_star    u is first scaled by <c, u> / <u, u>, and the first steps may stand still
    rescale      the guided velocity gets part of the spread of c back

c is the velocity with caption, u the one without.

Invariant: a rule reads c, u and the time of the step only.  At the ends of an interval and of standing still nothing is carried
over from the step before: no residual, no velocity, no cosine.

Source: arXiv 2207.12598 (guidance); arXiv 2404.07724 (interval); arXiv 2503.18886 (CFG-Zero*); arXiv 2305.08891 section 3.4
(rescale).  Differs from source: an interval is one of flow times, not of noise levels; steps that stand still are not
evaluated; inner products and spreads are of the sampled frames only.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sora_jax.sampling.arguments import PerSample, each, finite, is_traced, shown, whole
from sora_jax.sampling.joining import expand

TINY = 1e-8
Scalar = np.ndarray | jax.Array


@no_type_check  # a wrong value is answered by __post_init__
@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly, when and by which rule a caption is followed.

    Attributes:
      scale: weight of the caption against no caption; 1 follows the caption alone.  One number, or one for each sample.
      interval: lowest and highest flow time (0 is data, 1 noise) at which guidance applies; None: at all times.
      zero_star: CFG-Zero*: scale the velocity without caption to fit the one with it first; static.
      zero_steps: CFG-Zero*: so many first steps stand still; the published value is 1, and 0 here leaves it out.
      rescale: share of the spread of c that the guided velocity gets, 0 to 1 (published: 0.7); None: as it comes.
    """

    scale: PerSample
    interval: tuple[int | float, int | float] | None = None
    zero_star: bool = False
    zero_steps: int = 0
    rescale: int | float | None = None

    def __post_init__(self) -> None:
        if not is_traced(self.scale):
            values = each("guidance", self.scale)
            checked = [finite("guidance", value) for value in ((self.scale,) if values is None else values)]
            object.__setattr__(self, "scale", checked[0] if values is None else tuple(checked))
        if self.interval is not None:
            object.__setattr__(self, "interval", _checked_interval(self.interval))
        if not isinstance(self.zero_star, bool):
            raise ValueError(f"guidance zero_star is {self.zero_star!r}; expected True or False.")
        if whole("guidance zero_steps", self.zero_steps, least=0) and not self.zero_star:
            raise ValueError("guidance zero_steps belong to CFG-Zero*; set zero_star=True, or leave them out.")
        if self.rescale is not None and not 0 <= finite("guidance rescale", self.rescale) <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}; expected a share from 0 to 1.")
        if self.rescale is not None and self.zero_star:
            raise ValueError("guidance has both zero_star and rescale, two corrections of one fault; choose one.")

    @classmethod
    def of(cls, guidance: Any) -> "Guidance":
        """Returns the rule that a user's option names: a `Guidance`, or a scale."""
        return guidance if isinstance(guidance, Guidance) else cls(guidance)

    def rule(self) -> "GuidanceRule":
        """Returns the runtime inputs."""
        scale = self.scale if isinstance(self.scale, jax.core.Tracer) else np.asarray(self.scale, np.float32)
        low, high = (None, None) if self.interval is None else (np.asarray(end, np.float32) for end in self.interval)
        return GuidanceRule(
            scale=scale,
            low=low,
            high=high,
            zero_steps=np.asarray(self.zero_steps, np.int32) if self.zero_steps else None,
            share=None if self.rescale is None else np.asarray(self.rescale, np.float32),
            zero_star=self.zero_star,
        )


def _checked_interval(interval: Any) -> tuple[float, float]:
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise ValueError(f"guidance interval is {shown(interval)}; expected two flow times, such as (0.2, 0.9).")
    low, high = (finite("guidance interval", end) for end in interval)
    if low > high:
        raise ValueError(f"guidance interval ({low:g}, {high:g}) is upside down; expected the lower time first.")
    if not (low >= 0 and high <= 1):
        raise ValueError(f"guidance interval ({low:g}, {high:g}) leaves the flow; expected times from 0 (data) to 1 (noise).")
    return low, high


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes and paths
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidanceRule:
    """A `Guidance` as runtime numbers (float32, int32).

    Attributes:
      scale: scalar or [B].
      low: lowest flow time that is guided; None: all are, likewise ``high``.
      high: highest flow time that is guided.
      zero_steps: first steps that stand still; None compiles none.
      share: of `rescale`; None compiles no rescaling.
      zero_star: static.
    """

    scale: Scalar
    low: Scalar | None = None
    high: Scalar | None = None
    zero_steps: Scalar | None = None
    share: Scalar | None = None
    zero_star: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def varies(self) -> bool:
        """Whether some steps are guided otherwise than others; static."""
        return self.low is not None or self.zero_steps is not None

    def applies(self, t: Float[Array, "*N"]) -> Bool[Array, "*N"]:
        """Returns whether a step at flow time ``t`` is guided."""
        if self.low is None or self.high is None:
            return jnp.ones(t.shape, bool)
        return (t >= self.low) & (t <= self.high)

    def stands_still(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Returns whether a step stands still."""
        return jnp.asarray(False) if self.zero_steps is None else step < self.zero_steps

    def restarts(self, step: Int[Array, ""], t: Float[Array, ""], t_before: Float[Array, ""]) -> Bool[Array, ""]:
        """Returns whether the velocity of this step follows another rule than the one before; flow times."""
        restart = jnp.asarray(False) if self.zero_steps is None else step == self.zero_steps
        return restart if self.low is None else restart | ((step > 0) & (self.applies(t) != self.applies(t_before)))

    def combine(
        self,
        conditional: Float[Array, "B ..."],
        unconditional: Float[Array, "B ..."],
        active_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B ..."]:
        """Returns the guided velocity."""
        if self.zero_star:
            unconditional = _fit(unconditional, conditional, active_BT) * unconditional
        difference = conditional - unconditional
        v = unconditional + self._scale(difference) * difference
        if self.share is None:
            return v
        share = jnp.asarray(self.share, v.dtype)
        ratio = _spread(conditional, active_BT) / jnp.maximum(_spread(v, active_BT), TINY)
        return v * (share * ratio + (1 - share))

    def combine_half(
        self,
        conditional: Float[Array, "B ..."],
        difference: Float[Array, "B ..."],
        active_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B ..."]:
        """Returns the same where ``difference``, c - u, is that of an earlier step."""
        if self.zero_star or self.share is not None:
            return self.combine(conditional, conditional - difference, active_BT)
        return conditional + (self._scale(conditional) - 1) * difference

    def _scale(self, v: Array) -> Array:
        scale = jnp.asarray(self.scale, v.dtype)
        return expand(scale, v) if scale.ndim else scale


def _fit(u: Array, c: Array, active_BT: Array | None) -> Array:
    """Returns <c, u> / <u, u> of each sample, with axes of length 1 behind."""
    u, c = _active(u, active_BT), _active(c, active_BT)
    axes = tuple(range(1, u.ndim))
    fit_B = jnp.sum(c * u, axis=axes) / (jnp.sum(u * u, axis=axes) + TINY)
    return expand(fit_B, u)


def _spread(v: Array, active_BT: Array | None) -> Array:
    """Returns the standard deviation of each sample over all its values, with axes of length 1 behind."""
    axes = tuple(range(1, v.ndim))
    if active_BT is None:
        return jnp.std(v, axis=axes, keepdims=True)
    active = expand(active_BT | ~jnp.any(active_BT, axis=1, keepdims=True), v)  # a sample without active frames: of all
    return jnp.std(v, axis=axes, keepdims=True, where=active)


def _active(v: Array, active_BT: Array | None) -> Array:
    return v if active_BT is None else v * expand(active_BT, v)
