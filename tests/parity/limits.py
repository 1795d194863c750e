"""How far a computed tensor may lie from the reference, and the verdict: the only table of tolerances for fixtures.

Invariant: booleans and integers are compared exactly, floats by max abs and relative L2 in float64, and nothing that is
not finite passes.  The numbers are those of the fixtures' own README, which measured the reference in float32 against
itself in float64; no limit here is chosen by looking at our own error.
"""

import dataclasses
from fnmatch import fnmatchcase

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Upper bounds (exclusive).  ``max_abs`` holds at ``rms`` and grows in proportion above it; None is unbounded."""

    max_abs: float | None
    rel_l2: float
    rms: float | None = None

    def max_abs_at(self, rms: float) -> float | None:
        """Returns the bound on max abs for a reference of the given root mean square."""
        if self.max_abs is None or self.rms is None:
            return self.max_abs
        return self.max_abs * max(1.0, rms / self.rms)


_NETWORK = Limit(max_abs=2.5e-4, rel_l2=5e-5, rms=1.4)  # 5 times the reference's own cos(t * freq) noise at t near 1000
_MASKS = Limit(max_abs=1e-5, rel_l2=1e-5)  # copies, means and rotations: a few float32 roundings
_TINY = Limit(max_abs=None, rel_l2=1e-4)  # inputs of 1e-3, where a wrong norm epsilon shows as 1e-2
_LATENTS = Limit(max_abs=6e-4, rel_l2=5e-5)  # 10 times the reference's noise accumulated over a sampling

# (suite/case/tensor pattern, limit); the first match decides.
LIMITS: tuple[tuple[str, Limit], ...] = (
    ("stdit3/units/*", _TINY),
    ("stdit3/rope/*", _MASKS),
    ("stdit3/*", _NETWORK),
    ("tdtm/merge_fn/*", _MASKS),
    ("tdtm/*", _NETWORK),
    ("rflow/*/out.timesteps", Limit(max_abs=3e-4, rel_l2=1e-6)),  # float32 spacing at 1000 is 6e-5
    ("rflow/*/out.v", Limit(max_abs=2e-3, rel_l2=1e-4, rms=5.0)),  # guidance 7 amplifies the network's noise
    ("rflow/*/out.pred0", _NETWORK),  # the network's output before guidance
    ("rflow/*/out.*", _LATENTS),
    ("vae/units/*.small.*", _TINY),
    ("vae/*", Limit(max_abs=1e-4, rel_l2=2e-5, rms=0.5)),  # 13 times the reference's convolution noise
    ("t5/units/*", _TINY),
    ("t5/*", Limit(max_abs=3e-5, rel_l2=1e-5, rms=1.0)),  # 16 times the reference's noise
    ("text/*/ref_*", Limit(max_abs=1e-6, rel_l2=1e-6)),  # both sides resize with Pillow
    ("text/*", _MASKS),
    ("wide/stdit3_wide/*", Limit(max_abs=5e-4, rel_l2=5e-5)),
    ("wide/tdtm_wide/*", Limit(max_abs=5e-4, rel_l2=5e-5)),
    ("wide/*", Limit(max_abs=None, rel_l2=5e-5)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Outcome for one tensor; ``note`` says why it failed where the numbers do not."""

    passed: bool
    max_abs: float | None = None
    rel_l2: float | None = None
    limit_max_abs: float | None = None
    limit_rel_l2: float | None = None
    note: str = ""


def limit_for(suite: str, case: str, tensor: str) -> Limit:
    """Returns the limit of a tensor.

    Raises:
      KeyError: no row of the table matches.
    """
    name = f"{suite}/{case}/{tensor}"
    for pattern, limit in LIMITS:
        if fnmatchcase(name, pattern):
            return limit
    raise KeyError(f"no limit for {name}; add a row with its reason to tests/parity/limits.py.")


def compare(computed: np.ndarray, reference: np.ndarray, limit: Limit) -> Comparison:
    """Returns the distance of a computed tensor from its reference, and whether it is allowed."""
    if computed.shape != reference.shape:
        return Comparison(passed=False, note=f"shape {computed.shape}, the fixture has {reference.shape}")
    if reference.dtype.kind in "biu":
        unequal = int(np.sum(computed != reference))
        return Comparison(
            passed=unequal == 0,
            max_abs=float(np.max(np.abs(computed.astype(np.float64) - reference.astype(np.float64)), initial=0.0)),
            limit_max_abs=0.0,
            note=f"{unequal} of {reference.size} differ" if unequal else "exact",
        )
    wide, truth = computed.astype(np.float64), reference.astype(np.float64)
    for name, values in (("the fixture", truth), ("the computed tensor", wide)):
        if not np.all(np.isfinite(values)):
            return Comparison(passed=False, note=f"{name} holds {int(np.sum(~np.isfinite(values)))} values that are not finite")
    error = wide - truth
    norm = float(np.linalg.norm(truth.ravel()))
    max_abs = float(np.max(np.abs(error), initial=0.0))
    rel_l2 = float(np.linalg.norm(error.ravel())) / norm if norm else (0.0 if max_abs == 0 else float("inf"))
    bound = limit.max_abs_at(norm / max(1, truth.size) ** 0.5)
    return Comparison(
        passed=rel_l2 < limit.rel_l2 and (bound is None or max_abs < bound),
        max_abs=max_abs,
        rel_l2=rel_l2,
        limit_max_abs=bound,
        limit_rel_l2=limit.rel_l2,
    )
