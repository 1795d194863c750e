"""``sora-jax convert`` (``python -m convert_weights`` is the same): one verb for each thing to do with checkpoints.

Invariant: standard output holds what was written or compared, notes go to standard error, and an interrupted conversion goes on
when the same command is given again.  The work is `convert_weights`'.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from sora_jax import shell
from sora_jax.commands import options
from sora_jax.config import NETWORKS
from sora_jax.pipeline import command_line
from sora_jax.pipeline.model_file import model_path
from sora_jax.pipeline.option import Option, declared
from sora_jax.shell import FAILED, OK, Parser, counted, note
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.directory import Manifest, open_network, present_networks

if TYPE_CHECKING:
    from convert_weights.checkpoint import Options, Source

_EPILOG = """\
examples:
  sora-jax convert t5 t5-v1_1-xxl models/open-sora-1.2 --dtype int8
  sora-jax convert stdit3 OpenSora-STDiT-v3 models/open-sora-1.2 --dtype bfloat16
  sora-jax convert vae OpenSora-VAE-v1.2 models/open-sora-1.2
  sora-jax convert pipeline downloads models/open-sora-1.2 --dtype t5=int8,stdit3=bfloat16
  sora-jax convert verify models/open-sora-1.2 --source OpenSora-STDiT-v3
  sora-jax convert to-torch models/open-sora-1.2 checkpoints
  sora-jax convert upgrade models/open-sora-1.2
An interrupted conversion continues when the same command is run again.
"""


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

    def options(self) -> "Options":
        """Returns them as `convert_weights` takes them."""
        from convert_weights.checkpoint import Options

        return Options(
            section=self.section,
            config_file=self.config,
            spatial=self.spatial,
            ignore_config_keys=list(self.ignore_config_key),
            allow_mixed_dtypes=self.allow_mixed_dtypes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion(Reading, options.Writing):
    """What is converted, and to where."""

    source: Annotated[Path, Option("A weight file, an index of shards, or a folder.", metavar="SOURCE", positional=True)]
    directory: Annotated[Path, Option("Model directory.", metavar="MODEL_DIR", positional=True)]
    dtype: Annotated[
        str, Option(f"Stored dtype: {', '.join(STORED_DTYPES)}; pipeline also takes t5=int8,....", metavar="NAME")
    ] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification(Reading):
    """What is compared with what."""

    directory: Annotated[str, Option("Model directory, or pocket.", metavar="MODEL_DIR", positional=True)]
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
class Upgrading:
    """What is rewritten in the present format."""

    directory: Annotated[str, Option("Model directory, or pocket.", metavar="MODEL_DIR", positional=True)]
    quiet: Annotated[bool, Option("No progress bar and no notes.")] = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 differs or failed, 2 source or usage is wrong, 130 interrupted."""
    return shell.run(command, arguments, interrupted="interrupted; run the same command again to continue.", reports=True)


def command(arguments: Sequence[str]) -> int:
    """Reads the command line and does what its verb says."""
    parser = Parser(
        prog="sora-jax convert",
        description="Converts PyTorch checkpoints into a model directory, verifies it, or writes it back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar=f"{{{','.join(VERBS)}}}", dest="verb")
    for name, (summary, _, _) in VERBS.items():
        verbs.add_parser(name, help=summary, prog=f"sora-jax convert {name}", add_help=False)
    verb = parser.parse_args(arguments[:1]).verb
    summary, kind, work = VERBS[verb]
    own = command_line.make_parser(f"sora-jax convert {verb}", f"{summary[0].upper()}{summary[1:]}.", {"": declared(kind)})
    asked = command_line.read(own, arguments[1:], kind)
    return work(verb, asked)


def _convert(network: str, asked: Conversion) -> int:
    from convert_weights.checkpoint import convert_checkpoint

    started = time.monotonic()
    with Bar(asked.quiet) as bar:
        manifest = convert_checkpoint(
            network,
            asked.source,
            asked.directory,
            dtype=asked.dtype,
            overwrite=asked.overwrite,
            options=asked.options(),
            report=functools.partial(_check_source, asked),
            progress=lambda done, total: bar.show(network, done, total),
        )
    shell.result(_summary(manifest, time.monotonic() - started))
    return OK


def _check_source(asked: Conversion, opened: "Source") -> None:
    """Refuses a choice that the source does not offer, and says what was taken and ignored.

    Raises:
      ValueError: no file of the source holds several state dicts.
    """
    if asked.section is not None and not opened.checkpoint.sections:
        raise ValueError(f"{asked.source} holds no state dicts to choose from; leave --section out.")
    if asked.quiet:
        return
    for line in (*opened.checkpoint.notes, f"configuration: {opened.resolved.origin}"):
        note(line)
    if opened.resolved.ignored:
        note(f"config.json keys without effect here: {', '.join(opened.resolved.ignored)}")
    for name, reason in opened.plan.ignored.items():
        note(f"ignored {name}: {reason}")


def _convert_all(_: str, asked: Conversion) -> int:
    from convert_weights.all_networks import convert_pipeline, find_networks

    dtypes = _dtypes(asked.dtype)
    if not asked.quiet:
        for network, folder in find_networks(asked.source).items():
            note(f"{network}: {folder}")
    started = time.monotonic()
    with Bar(asked.quiet) as bar:
        manifests = convert_pipeline(
            asked.source,
            asked.directory,
            dtypes=dtypes,
            overwrite=asked.overwrite,
            options=asked.options(),
            progress=bar.show,
        )
    for network in NETWORKS:
        if network not in manifests:
            note(f"{network}: already in {asked.directory}; --overwrite converts it again")
    for manifest in manifests.values():
        shell.result(_summary(manifest, time.monotonic() - started))
    return OK


def _dtypes(text: str) -> dict[str, str]:
    """Returns the stored dtype of each network from ``DTYPE`` or ``NETWORK=DTYPE,...``; the VAE is never int8."""
    if "=" not in text:
        return {network: "float32" if network == "vae" and text == "int8" else text for network in NETWORKS}
    named = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := named.keys() - set(NETWORKS):
        raise ValueError(f"--dtype names {', '.join(sorted(unknown))}; expected {', '.join(NETWORKS)}.")
    return {network: named.get(network, "float32") for network in NETWORKS}


def _verify(_: str, asked: Verification) -> int:
    if asked.source is None:
        idle = [each.called for each in declared(Reading).values() if getattr(asked, each.name) != each.default]
        if idle:
            raise ValueError(f"{idle[0]} says how a source is read; give --source as well, or leave {idle[0]} out.")
    from convert_weights.verify import verify

    directory = model_path(asked.directory)
    faults = verify(directory, source=asked.source, network=asked.network, options=asked.options(), note=note)
    for network, found in faults.items():
        count = len(open_network(directory, network).parameters)
        state = counted(len(found), "fault") if found else "checksums, shapes and dtypes as recorded"
        shell.result(f"{network}: {counted(count, 'array')}, {state}")
        for fault in found:
            note(fault)
    failed = any(faults.values())
    if asked.source and not failed:
        shell.result(f"equal to {asked.source}, bit for bit")
    return FAILED if failed else OK


def _to_torch(_: str, asked: Reversal) -> int:
    from convert_weights.to_torch import to_torch

    directory = model_path(asked.directory)
    networks = [asked.network] if asked.network else present_networks(directory) or NETWORKS
    for network in networks:
        path = to_torch(open_network(directory, network), asked.out / network, overwrite=asked.overwrite)
        shell.result(f"{network}: {path}, {path.stat().st_size / 1e9:.3f} GB")
    return OK


def _upgrade(_: str, asked: Upgrading) -> int:
    from sora_jax.storage.upgrade import outdated, upgrade, upgraded_bytes

    directory = model_path(asked.directory)
    manifests = outdated(directory)
    if manifests and not asked.quiet:
        largest = max(manifests, key=upgraded_bytes)
        note(
            f"upgrading {', '.join(manifest.network for manifest in manifests)}, one after the other: needs "
            f"{upgraded_bytes(largest) / 1e9:.3f} GB of free disk space, for {largest.network}, until the old files are removed"
        )
    for manifest in manifests:
        started = time.monotonic()
        with Bar(asked.quiet) as bar:
            upgraded = upgrade(manifest, progress=functools.partial(bar.show, manifest.network))
        shell.result(_summary(upgraded, time.monotonic() - started))
    if not manifests:
        shell.result(f"{directory}: every network has the present format")
    return OK


def _summary(manifest: Manifest, seconds: float) -> str:
    from sora_jax.process import peak_bytes

    nbytes = sum(parameter.nbytes for parameter in manifest.parameters.values())
    return (
        f"{manifest.path}: {counted(len(manifest.parameters), 'array')}, {nbytes / 1e9:.3f} GB as {manifest.dtype}, "
        f"{seconds:.1f} s, peak memory {peak_bytes() / 1e9:.2f} GB"
    )


class Bar:
    """A progress bar of source bytes, on standard error; begins anew with each network."""

    def __init__(self, quiet: bool):
        self._quiet, self._network = quiet, ""
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, network: str, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` bytes of a network's source were converted."""
        if self._quiet:
            return
        if self._bar is None or network != self._network:
            from tqdm import tqdm

            self.__exit__()
            self._network = network
            self._bar = tqdm(total=total, desc=network, unit="B", unit_scale=True, disable=None)
        self._bar.update(min(done, total) - self._bar.n)


# What each verb does, what it takes, and the function that does it.
VERBS: Mapping[str, tuple[str, Any, Callable[[str, Any], int]]] = {
    **{network: (f"convert the network {network}", Conversion, _convert) for network in NETWORKS},
    "pipeline": ("convert all three networks, from a folder that holds their folders", Conversion, _convert_all),
    "verify": ("compare checksum, shape and dtype of every parameter, and the source's values", Verification, _verify),
    "to-torch": ("write PyTorch names and layouts back, as safetensors", Reversal, _to_torch),
    "upgrade": ("rewrite networks of an older format in the present one, in place", Upgrading, _upgrade),
}
