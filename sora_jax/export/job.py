"""The order of one export, as data that its processes share.

Invariant: a job together with the model directory decides every stage, so each process builds the same stages by itself.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sora_jax.config import FLOAT32, NETWORKS, ModelConfig
from sora_jax.export.attention import export_forms, pair_forms
from sora_jax.export.cut import WHOLE_CUT, Cut
from sora_jax.export.entries import TargetName
from sora_jax.export.program import Program, Stage, with_half_boundary
from sora_jax.export.size import Size
from sora_jax.export.stages import PARTS, list_stages
from sora_jax.export.targets import Options, target_module
from sora_jax.storage.directory import Manifest, open_network

WORK = ".work"  # inside the unfinished folder: captured arrays, entries of finished stages, compiled references


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One export.

    Attributes:
      directory: the model directory, absolute.
      target: what artefacts are made.
      options: how stages are written.
      parts: what is written; stages before the last of them run too, because their outputs are its inputs.
      sizes: sizes of the videos; the functions of the first have plain names.
      guidance: guidance scale of the captured step.
      sampler: whether the target's sampler program is written.
      vectors: whether test vectors are written.
      cut: how the transformer is cut.
    """

    directory: str
    target: TargetName
    options: Options
    parts: tuple[str, ...]
    sizes: tuple[Size, ...]
    guidance: float
    sampler: bool
    vectors: bool = False
    cut: Cut = WHOLE_CUT

    def write(self, folder: Path) -> None:
        """Writes the job where its processes find it."""
        (folder / WORK / "job.json").write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Returns the job of an unfinished folder."""
        fields = json.loads((folder / WORK / "job.json").read_text("utf-8"))
        fields["options"] = Options(**fields["options"])
        fields["sizes"] = tuple(Size(**size) for size in fields["sizes"])
        fields["parts"] = tuple(fields["parts"])
        cut = fields["cut"]
        fields["cut"] = Cut(**{**cut, "attention_forms": tuple(cut["attention_forms"])})
        return cls(**fields)

    def networks(self) -> dict[str, Manifest]:
        """Returns the manifests of the model directory."""
        return {network: open_network(self.directory, network) for network in NETWORKS}

    @property
    def needed_parts(self) -> tuple[str, ...]:
        """The parts to run: up to the last that is written."""
        return PARTS[: 1 + max(PARTS.index(part) for part in self.parts)]

    def writes(self, stage: Stage) -> bool:
        """Returns whether a stage is written, not only run."""
        part = stage.network if stage.network != "vae" else "vae_" + stage.name.rpartition("_")[2]
        return part in self.parts

    def reference_stages(self, config: ModelConfig) -> list[Stage]:
        """Returns the stages to run, in float32 and with both rows of guidance, as the pipeline runs them."""
        forms = export_forms(self.options.logits_limit, "stablehlo")  # with loops: it compiles sooner
        cut = self.cut.reference
        return list_stages(config, self.sizes, parts=self.needed_parts, policy=FLOAT32, forms=forms, cut=cut)

    def exported_stages(self, config: ModelConfig) -> dict[str, Stage]:
        """Returns the stages to write by name, with the dtypes of the target."""
        made = self._with_policy(config, self.options)
        if self.options.precision != "float32":
            wide = self._with_policy(config, dataclasses.replace(self.options, precision="float32", io_precision="float32"))
            made = {name: wide[name] if stage.program.keep_float32 else stage for name, stage in made.items()}
        if self.options.io_precision == "float16":
            made = self._with_half_boundaries(made)
        return {name: stage for name, stage in made.items() if self.writes(stage)}

    def _with_policy(self, config: ModelConfig, options: Options) -> dict[str, Stage]:
        limit = options.logits_limit
        listed = list_stages(
            config,
            self.sizes,
            parts=self.needed_parts,
            policy=target_module(self.target).policy(options),
            forms=export_forms(limit, self.target),
            cut=self.cut,
            pair_forms=pair_forms(self.cut, limit, self.target),
        )
        return {stage.name: stage for stage in listed}

    def _with_half_boundaries(self, stages: Mapping[str, Stage]) -> dict[str, Stage]:
        """Returns the stages with float16 inputs and outputs where they compute in float16; they still share programs."""
        programs: dict[str, Program] = {}
        for stage in stages.values():
            if self.options.boundary_of(stage) == "float16" and stage.program.name not in programs:
                programs[stage.program.name] = with_half_boundary(stage.program)
        return {
            name: dataclasses.replace(stage, program=programs.get(stage.program.name, stage.program))
            for name, stage in stages.items()
        }


def load_values(folder: Path, size: Size) -> dict[str, np.ndarray]:
    """Returns the named arrays of the captured run of a size, as they stand."""
    with np.load(folder / WORK / f"{size.key}.npz") as arrays:
        return dict(arrays)


def save_values(folder: Path, size: Size, values: Mapping[str, Any]) -> None:
    """Writes the named arrays of the captured run of a size."""
    np.savez(folder / WORK / f"{size.key}.npz", **values)


def groups(stages: Sequence[Stage], limit_bytes: int) -> list[list[str]]:
    """Returns the names of the stages of each process: as many in a row as have ``limit_bytes`` of weights, at least one."""
    made: list[list[str]] = []
    room = 0
    for stage in stages:
        size = parameter_bytes(stage)
        if not made or size > room:
            made.append([])
            room = limit_bytes
        made[-1].append(stage.name)
        room -= size
    return made


def parameter_bytes(stage: Stage) -> int:
    """Returns the size of a stage's weights in its own dtypes."""
    return sum(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in stage.program.abstract.values())
