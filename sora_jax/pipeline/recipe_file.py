"""A reuse plan as a JSON file, with the model and the settings it was calibrated for.

Invariant: `read` returns what `write` wrote; a file that is not a plan, or a plan of another model, is refused with one line. A
plan can be used for other prompts, seeds and sizes, where its error was not measured, but not for another network.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, no_type_check

from sora_jax import files

if TYPE_CHECKING:
    from sora_jax.sampling.reuse import Plan

_FORMAT = "sora_jax plan 1"
# What a calibration depends on, of the settings.
CALIBRATED = (
    "num_steps", "guidance", "seed", "shift", "guidance_low", "guidance_high", "guidance_rule", "guidance_rescale",
    "merge_steps", "merge", "height", "width", "num_frames", "fps", "dtype",
)  # fmt: skip


@no_type_check  # the plan's type is JAX's business, and a file is refused without it
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A plan and where it comes from.

    Attributes:
      plan: what each step evaluates.
      model: ``Pipeline.model_id`` of the model it was calibrated for.
      error: root-mean-square shift of the latents that all reused steps together were measured to cause, at most.
      calibrated: settings of the calibration, JSON-ready; for people.
    """

    plan: "Plan"
    model: str
    error: float
    calibrated: Mapping[str, Any]

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the file whole or not at all.

        Raises:
          FileExistsError: the file exists and ``overwrite`` is False.
        """
        fields = {
            "format": _FORMAT,
            "model": self.model,
            "num_steps": len(self.plan.codes),
            "evaluations": self.plan.evaluations,
            "error": self.error,
            "keep": self.plan.keep,
            "codes": list(self.plan.codes),
            "calibrated": dict(self.calibrated),
        }
        lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
        files.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n", overwrite=overwrite)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "PlanFile":
        """Returns what a file holds.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is something else, or its plan is invalid.
        """
        files.refuse_missing(path, "plan", remedy=f"make one with: sora-jax calibrate MODEL_DIR -o {path}")
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{path} is not a plan: no JSON ({why}); expected a file of sora-jax calibrate.") from error
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            format_ = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"{path} is not a plan: format {format_!r}; expected {_FORMAT!r}, a file of sora-jax calibrate.")
        codes = fields.get("codes")
        if not isinstance(codes, list) or not all(type(code) is int for code in codes):
            raise ValueError(f"{path}: codes are {codes!r}; expected a list with one whole number for each step.")
        from sora_jax.sampling.reuse import Plan

        try:
            plan = Plan(codes=tuple(codes), keep=fields["keep"])
            return cls(
                plan=plan, model=str(fields["model"]), error=float(fields["error"]), calibrated=dict(fields["calibrated"])
            )
        except KeyError as missing:
            raise ValueError(f"{path} lacks {missing}; expected a file of sora-jax calibrate.") from missing
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def for_model(self, model_id: str, path: str | os.PathLike[str]) -> "Plan":
        """Returns the plan for the model it was calibrated for; the folder of the model may have another name by now.

        Raises:
          ValueError: it was calibrated for another model.
        """
        if self.model.split()[-1:] != model_id.split()[-1:]:
            raise ValueError(
                f"{path} was calibrated for the model {self.model!r}, this is {model_id!r}; calibrate again with: "
                "sora-jax calibrate MODEL_DIR"
            )
        return self.plan
