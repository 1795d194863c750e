"""Export of a model directory to StableHLO, ONNX, Core ML and Core AI, checked numerically before it is finished.

``export`` writes a folder of artefacts with a manifest, ``ExportedModel`` runs one.  A name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from sora_jax.lazy import lazy_names

if TYPE_CHECKING:
    from sora_jax.export.check import CheckError
    from sora_jax.export.exporter import ExportError, export
    from sora_jax.export.host_program import ExportedModel
    from sora_jax.export.size import Size

__all__ = ["CheckError", "ExportError", "ExportedModel", "Size", "export"]

_MODULES = {
    "CheckError": "check",
    "ExportError": "exporter",
    "ExportedModel": "host_program",
    "Size": "size",
    "export": "exporter",
}

__getattr__, __dir__ = lazy_names("sora_jax.export", _MODULES)
