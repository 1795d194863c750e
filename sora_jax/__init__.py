"""Text to video with Open-Sora 1.2's architecture in JAX: the public names.

Invariant: importing the package imports neither JAX nor a network; a name is loaded when it is first used, so that
``sora-jax --help`` and ``sora-jax inspect`` answer at once.
"""

from typing import TYPE_CHECKING

from sora_jax.lazy import lazy_names
from sora_jax.version import __version__

if TYPE_CHECKING:
    from sora_jax.networks.merging import Merge
    from sora_jax.pipeline.clip import Clip
    from sora_jax.pipeline.parameters import load_parameters
    from sora_jax.pipeline.pipeline import Pipeline
    from sora_jax.sampling.adaptive import Reuse
    from sora_jax.sampling.calibration import calibrate
    from sora_jax.sampling.guidance import Guidance
    from sora_jax.sampling.integration import integrate
    from sora_jax.sampling.leap import Leap
    from sora_jax.sampling.reuse import Plan
    from sora_jax.sampling.sampler import Sampler, sample
    from sora_jax.sampling.schedule import Schedule

__all__ = [
    "Clip",
    "Guidance",
    "Leap",
    "Merge",
    "Pipeline",
    "Plan",
    "Reuse",
    "Sampler",
    "Schedule",
    "__version__",
    "calibrate",
    "integrate",
    "load_parameters",
    "sample",
]

_MODULES = {
    "Clip": "pipeline.clip",
    "Guidance": "sampling.guidance",
    "Leap": "sampling.leap",
    "Merge": "networks.merging",
    "Pipeline": "pipeline.pipeline",
    "Plan": "sampling.reuse",
    "Reuse": "sampling.adaptive",
    "Sampler": "sampling.sampler",
    "Schedule": "sampling.schedule",
    "calibrate": "sampling.calibration",
    "integrate": "sampling.integration",
    "load_parameters": "pipeline.parameters",
    "sample": "sampling.sampler",
}

__getattr__, __dir__ = lazy_names("sora_jax", _MODULES)
