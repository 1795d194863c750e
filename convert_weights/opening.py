"""Opens the sources of a conversion and matches their arrays with a network's table, before any value is read.

Invariant: every fault that names, shapes, types and configurations show is in the plan of the source that is returned, those of
checkpoints to merge and of adapters included. Nothing is written.
"""

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_weights import parameter_shapes, table
from convert_weights.blending import UNCHANGED, Adapter, Blend, Scaled, Weighted, open_adapter, others_of, own_weight
from convert_weights.errors import SourceError
from convert_weights.readers import GGUF, Checkpoint, merge, open_checkpoint
from convert_weights.rules import ConversionError, Plan, Rule, make_plan
from convert_weights.source_config import Resolved, resolve

SPATIAL_PREFIX = "spatial_vae.module."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is read; the defaults suit the published ones.

    Attributes:
      section: which state dict of a training checkpoint to take (default: EMA where there is one).
      config_file: read instead of the config.json in the folder of the weights.
      spatial: for the VAE: the AutoencoderKL, where the source holds only the temporal part.
      ignore_config_keys: unknown config.json keys that are known not to change the network.
      allow_mixed_dtypes: accept arrays that differ in dtype.
      tokenizer: for T5: a tokenizer's file, or its folder, where it is not in the folder of the weights.
      merged: other checkpoints of the same network, for a weighted mean.
      adapters: adapters of low rank, which are added.
    """

    section: str | None = None
    config_file: Path | None = None
    spatial: Path | None = None
    ignore_config_keys: Collection[str] = ()
    allow_mixed_dtypes: bool = False
    tokenizer: Path | None = None
    merged: tuple[Weighted, ...] = ()
    adapters: tuple[Scaled, ...] = ()


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class Added:
    """Another source: ``kind`` and ``record`` are how the manifest names it."""

    kind: str
    checkpoint: Checkpoint
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose names and shapes have been matched with a network's table.

    ``checkpoint`` has the files of all sources, ``added`` says which are those of another than the first.
    """

    network: str
    checkpoint: Checkpoint
    resolved: Resolved
    plan: Plan
    shapes: Mapping[str, tuple[int, ...]]
    blend: Blend = UNCHANGED
    added: tuple[Added, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(identity.size for identity in self.checkpoint.files.values())


def open_source(network: str, source: str | os.PathLike[str], options: Options = DEFAULTS) -> Source:
    """Returns the plan of a conversion, faults included; reads headers only.

    Raises:
      SourceError: no usable checkpoint is there.
      ConversionError: its config.json describes another network.
    """
    return match(network, *open_files(network, source, options), options)


def open_files(network: str, source: str | os.PathLike[str], options: Options) -> tuple[Checkpoint, Path | None]:
    """Returns the arrays of a source, and the folder of a spatial part that the caller names separately."""
    checkpoint = open_checkpoint(source, section=options.section)
    if options.spatial is None:
        return checkpoint, None
    if network != "vae":
        raise SourceError(f"a spatial part belongs to the vae, not to {network}.")
    spatial = open_checkpoint(options.spatial)
    return merge(checkpoint, spatial, SPATIAL_PREFIX), spatial.folder


def _blended(opened: Source, rules: Sequence[Rule], ignored: Mapping[str, str], options: Options) -> Source:
    """Returns a source with what other checkpoints and adapters add to it.

    Raises:
      ConversionError: a weight is none.
      SourceError: one of them cannot be read, or is named twice.
    """
    network, plan, faults = opened.network, opened.plan, list(opened.plan.faults)
    added: list[Added] = []
    others: list[tuple[Plan, Checkpoint, float]] = []
    try:
        weight = own_weight(options.merged) if options.merged else 1.0
    except ValueError as error:
        raise ConversionError(f"{opened.checkpoint.path} cannot be merged", [str(error)]) from None
    for each in options.merged:
        other = open_checkpoint(each.path, section=options.section)
        theirs = make_plan(rules, ignored, other.headers, opened.shapes, allow_mixed_dtypes=True)
        faults += [f"{each.path}: {fault}" for fault in other.faults + theirs.faults]
        config = resolve(
            network, other.folder, ignore=options.ignore_config_keys, headers=other.headers, metadata=other.metadata
        )
        if config.config != opened.resolved.config and (other.metadata or (other.folder / "config.json").is_file()):
            faults.append(f"{each.path}: its configuration is another than that of {opened.checkpoint.path}")
        others.append((theirs, other, each.weight))
        added.append(Added("merged", other, {"weight": each.weight}))
    adapters: dict[str, list[Adapter]] = {}
    for asked in options.adapters:
        adapter = open_adapter(asked, plan, rules, opened.checkpoint.headers)
        faults += adapter.faults
        for name, factors in adapter.adapters.items():
            adapters.setdefault(name, []).append(factors)
        added.append(Added("adapters", adapter.checkpoint, adapter.record))
    blend = Blend(weight, others_of(plan, others), adapters)
    return dataclasses.replace(
        opened,
        checkpoint=_with_files(opened.checkpoint, [each.checkpoint for each in added]),
        plan=dataclasses.replace(plan, faults=tuple(faults)),
        blend=blend,
        added=tuple(added),
    )


def _with_files(checkpoint: Checkpoint, others: Iterable[Checkpoint]) -> Checkpoint:
    for other in others:
        if twice := checkpoint.files.keys() & other.files.keys():
            raise SourceError(f"{min(twice)} is named twice; every source of a conversion counts once.")
        checkpoint = dataclasses.replace(
            checkpoint,
            files={**checkpoint.files, **other.files},
            extents={**checkpoint.extents, **other.extents},
            sections={**checkpoint.sections, **other.sections},
            notes=checkpoint.notes + other.notes,
        )
    return checkpoint


def match(network: str, checkpoint: Checkpoint, spatial_folder: Path | None, options: Options) -> Source:
    """Returns the arrays matched with the network that the configuration describes."""
    resolved = resolve(
        network,
        checkpoint.folder,
        config_file=options.config_file,
        spatial_folder=spatial_folder,
        ignore=options.ignore_config_keys,
        headers=checkpoint.headers,
        metadata=checkpoint.metadata,
        source=checkpoint.path,
    )
    rules, ignored = table(network, resolved.config)
    shapes = parameter_shapes(network, resolved.config)
    mixed = options.allow_mixed_dtypes or checkpoint.format == GGUF  # whose norms are float32 whatever the matrices are
    plan = make_plan(rules, ignored, checkpoint.headers, shapes, allow_mixed_dtypes=mixed)
    plan = dataclasses.replace(plan, faults=checkpoint.faults + plan.faults)
    opened = Source(network, checkpoint, resolved, plan, shapes)
    return _blended(opened, rules, ignored, options) if options.merged or options.adapters else opened
