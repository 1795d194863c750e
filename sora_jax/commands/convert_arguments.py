"""What the verbs of ``sora-jax convert`` take from the command line: one dataclass for each.

Invariant: this module reads nothing and decides nothing; `convert` does what is asked here.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sora_jax.commands import options
from sora_jax.config import NETWORKS
from sora_jax.pipeline.option import Option
from sora_jax.storage.arrays import STORED_DTYPES

if TYPE_CHECKING:
    from convert_weights.opening import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a checkpoint is read."""

    section: Annotated[
        str | None,
        Option("State dict of a training checkpoint to take (default: EMA where there is one).", metavar="NAME"),
    ] = None
    config: Annotated[Path | None, Option("A config.json to read instead of the one with the weights.", metavar="FILE")] = None
    spatial: Annotated[
        Path | None, Option("vae: the AutoencoderKL, where SOURCE holds only the temporal part.", metavar="SOURCE")
    ] = None
    ignore_config_key: Annotated[
        tuple[str, ...],
        Option("A key of config.json known not to change the network; repeatable.", metavar="KEY", repeats=True),
    ] = ()
    allow_mixed_dtypes: Annotated[bool, Option("Accept arrays that differ in dtype.")] = False
    tokenizer: Annotated[
        Path | None, Option("t5: tokenizer.json or spiece.model, where it is not with the weights.", metavar="FILE")
    ] = None

    merge: Annotated[
        tuple[str, ...],
        Option(
            "Another checkpoint of the network and its weight in the mean, of which SOURCE has the rest of 1; repeatable.",
            metavar="SOURCE:WEIGHT",
            repeats=True,
        ),
    ] = ()
    lora: Annotated[
        tuple[str, ...],
        Option(
            "An adapter of low rank in PEFT's names, and a scale (1 without); repeatable.",
            metavar="FILE[:SCALE]",
            repeats=True,
        ),
    ] = ()

    def options(self) -> "Options":
        """Returns them as `convert_weights` takes them."""
        from convert_weights.blending import Scaled, Weighted, parse
        from convert_weights.opening import Options

        return Options(
            section=self.section,
            config_file=self.config,
            spatial=self.spatial,
            ignore_config_keys=list(self.ignore_config_key),
            allow_mixed_dtypes=self.allow_mixed_dtypes,
            tokenizer=self.tokenizer,
            merged=tuple(parse(text, Weighted, None) for text in self.merge),
            adapters=tuple(parse(text, Scaled, 1.0) for text in self.lora),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(Reading, options.Writing):
    """What is converted, and to where."""

    source: Annotated[Path, Option("A weight file, an index of shards, or a folder.", metavar="SOURCE", positional=True)]
    directory: Annotated[Path, Option("Model directory.", metavar="MODEL_DIR", positional=True)]
    dtype: Annotated[
        str, Option(f"Stored dtype: {', '.join(STORED_DTYPES)}; pipeline also takes t5=int8,....", metavar="NAME")
    ] = "float32"
    dry_run: Annotated[bool, Option("Say what would be written, from names and shapes alone, and write nothing.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification(Reading):
    """What is compared with what."""

    directory: Annotated[str, Option("Model directory or its URL, or pocket.", metavar="MODEL_DIR", positional=True)]
    source: Annotated[Path | None, Option("Compare bit for bit with this checkpoint, converted again.", metavar="SOURCE")] = (
        None
    )
    network: Annotated[str | None, Option("Look at this network only.", choices=NETWORKS)] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversal:
    """What is written back, and to where."""

    directory: Annotated[str, Option("Model directory, or pocket.", metavar="MODEL_DIR", positional=True)]
    out: Annotated[Path, Option("Folder that gets one folder for each network.", metavar="OUT", positional=True)]
    network: Annotated[str | None, Option("Write this network only.", choices=NETWORKS)] = None
    overwrite: Annotated[bool, Option("Replace files that exist.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orbax(Reversal):
    """What is written as orbax checkpoints, and to where."""

    dtype: Annotated[
        str | None, Option("Dtype of the arrays (default: as stored, int8 with its scales).", choices=("float32", "bfloat16"))
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromOrbax:
    """Which orbax checkpoint becomes a network, and where."""

    source: Annotated[Path, Option("An orbax checkpoint of a flat dictionary.", metavar="SOURCE", positional=True)]
    directory: Annotated[Path, Option("Model directory.", metavar="MODEL_DIR", positional=True)]
    network: Annotated[str | None, Option("Its network, where the checkpoint does not say it.", choices=NETWORKS)] = None
    config: Annotated[Path | None, Option("Its config.json, likewise.", metavar="FILE")] = None
    dtype: Annotated[str | None, Option("Stored dtype (default: that of the arrays).", choices=tuple(STORED_DTYPES))] = None
    overwrite: Annotated[bool, Option("Replace what exists.")] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upgrading:
    """What is rewritten in the present format."""

    directory: Annotated[str, Option("Model directory, or pocket.", metavar="MODEL_DIR", positional=True)]
    quiet: Annotated[bool, Option("No progress bar and no notes.")] = False
