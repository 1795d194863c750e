"""The compiled sampler and its rules: numbers and a velocity, no network and no model file.

`sample` runs a sampling and says what it took, `Sampler.steps` runs it step by step, `integrate` is the same as a pure
function.  All take the same options (`Options`).

**A batch with different settings for each sample** is one program: guidance, and the numbers of a leap, may be sequences or
arrays with one value for each sample::

    end = sample(velocity, z, schedule, guidance=[1.0, 3.0, 7.0], leap=Leap.dynamic(tolerance=[1e-3, 1e-4, 1e-5]))

**What compiles anew.**  A sampler takes its velocity apart (`captured`): JAX arrays that it holds are runtime inputs, all else
belongs to the program, by value.  An attribute that changes is therefore seen by the next call, and never an old one used::

    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        def __call__(self, z, t):
            return self.scale * z

    velocity = Scaled(jnp.asarray(1.0))
    sample(velocity, z, schedule)  # compiles
    velocity.scale = jnp.asarray(2.0)
    sample(velocity, z, schedule)  # the new value, in the same program

A function is known by its identity, as ``jax.jit`` has it.  A lambda made anew in a loop therefore compiles anew each time, and
what a function closes over is read when it is compiled; pass what changes as an argument instead::

    def scaled(scale, z, t):
        return scale * z

    for scale in (1.0, 2.0, 3.0):
        sample(jax.tree_util.Partial(scaled, scale), z, schedule)  # compiles once

Invariant: this room imports no network and no file of a model.  Importing it loads nothing; a name is loaded when it is used.
"""

from typing import TYPE_CHECKING

from sora_jax.lazy import lazy_names

if TYPE_CHECKING:
    from sora_jax.sampling.adaptive import Reuse
    from sora_jax.sampling.calibration import calibrate
    from sora_jax.sampling.guidance import Guidance
    from sora_jax.sampling.integration import integrate
    from sora_jax.sampling.leap import Leap
    from sora_jax.sampling.options import Options
    from sora_jax.sampling.reuse import Plan
    from sora_jax.sampling.sampler import Sampler, sample
    from sora_jax.sampling.schedule import Schedule

__all__ = ["Guidance", "Leap", "Options", "Plan", "Reuse", "Sampler", "Schedule", "calibrate", "integrate", "sample"]

_MODULES = {
    "Guidance": "guidance",
    "Leap": "leap",
    "Options": "options",
    "Plan": "reuse",
    "Reuse": "adaptive",
    "Sampler": "sampler",
    "Schedule": "schedule",
    "calibrate": "calibration",
    "integrate": "integration",
    "sample": "sampler",
}

__getattr__, __dir__ = lazy_names("sora_jax.sampling", _MODULES)
