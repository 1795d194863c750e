"""``sora-jax convert`` (``python -m convert_weights`` is the same): one verb for each thing to do with checkpoints.

Invariant: standard output holds what was written or compared, notes go to standard error, and an interrupted conversion goes on
when the same command is given again.  The work is `convert_weights`'.
"""

import argparse
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sora_jax import shell
from sora_jax.commands.convert_arguments import Conversion, FromOrbax, Orbax, Reading, Reversal, Upgrading, Verification
from sora_jax.config import NETWORKS
from sora_jax.pipeline import command_line
from sora_jax.pipeline.model_file import model_path
from sora_jax.pipeline.option import declared
from sora_jax.shell import FAILED, OK, Parser, counted, note
from sora_jax.storage.directory import Manifest, open_network, present_networks

if TYPE_CHECKING:
    from convert_weights.opening import Options, Source

_EPILOG = """\
examples:
  sora-jax convert t5 t5-v1_1-xxl models/open-sora-1.2 --dtype int8
  sora-jax convert stdit3 OpenSora-STDiT-v3 models/open-sora-1.2 --dtype bfloat16
  sora-jax convert vae OpenSora-VAE-v1.2 models/open-sora-1.2
  sora-jax convert pipeline downloads models/open-sora-1.2 --dtype t5=int8,stdit3=bfloat16
  sora-jax convert t5xxl_fp8_e4m3fn.safetensors models/open-sora-1.2 --tokenizer tokenizer.json
  sora-jax convert downloads models/open-sora-1.2 --dry-run
  sora-jax convert verify models/open-sora-1.2 --source OpenSora-STDiT-v3
  sora-jax convert to-torch models/open-sora-1.2 checkpoints
  sora-jax convert to-orbax models/open-sora-1.2 checkpoints
  sora-jax convert upgrade models/open-sora-1.2
Without the name of a network, the names of the arrays say which one it is; a folder that has a network's or a verb's name is
written ./t5. An interrupted conversion continues when the same command is run again.
"""


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
    verbs = parser.add_subparsers(required=True, metavar=f"{{{','.join(VERBS)}}}|SOURCE", dest="verb")
    for name, (summary, _, _) in VERBS.items():
        verbs.add_parser(name, help=summary, prog=f"sora-jax convert {name}", add_help=False)
    if arguments and arguments[0] not in VERBS and not arguments[0].startswith("-"):
        return _convert_unnamed(parser, arguments)
    verb = parser.parse_args(arguments[:1]).verb
    summary, kind, work = VERBS[verb]
    own = command_line.make_parser(f"sora-jax convert {verb}", f"{summary[0].upper()}{summary[1:]}.", {"": declared(kind)})
    asked = command_line.read(own, arguments[1:], kind)
    return work(verb, asked)


def _convert_unnamed(parser: Parser, arguments: Sequence[str]) -> int:
    """Converts a source whose network its arrays say."""
    if len(arguments) < 2:
        parser.error(f"{arguments[0]!r} is neither a network nor a verb, and a source needs a MODEL_DIR behind it")
    own = command_line.make_parser("sora-jax convert", "Converts SOURCE, whose arrays say which network it is.", _CONVERSION)
    asked = command_line.read(own, arguments, Conversion)
    if not asked.source.exists():
        raise FileNotFoundError(f"{asked.source} does not exist; expected a source of weights, or one of {', '.join(VERBS)}.")
    from convert_weights.all_networks import is_pipeline
    from convert_weights.orbax_checkpoint import is_orbax

    if is_orbax(asked.source):
        raise ValueError(f"{asked.source} is an orbax checkpoint: sora-jax convert from-orbax {asked.source} MODEL_DIR.")
    from convert_weights.identify import network_of_arrays
    from convert_weights.readers import open_checkpoint

    if is_pipeline(asked.source):
        return _convert_all("pipeline", asked)
    network = network_of_arrays(open_checkpoint(asked.source, section=asked.section))
    if not asked.quiet:
        note(f"{asked.source} holds {network}")
    return _convert(network, asked)


def _rehearse(network: str, asked: Conversion, source: Path, dtype: str, reading: "Options") -> None:
    from convert_weights.rehearsal import rehearse

    plan = rehearse(network, source, asked.directory, dtype=dtype, overwrite=asked.overwrite, options=reading)
    _check_source(asked, plan.source)
    tokenizer = ", with its tokenizer" if plan.tokenizer else ", without a tokenizer" if network == "t5" else ""
    shell.result(
        f"would write {plan.target}: {counted(plan.arrays, 'array')}, {plan.nbytes / 1e9:.3f} GB as {dtype}{tokenizer}; "
        f"{plan.free_bytes / 1e9:.1f} GB are free there"
    )


def _convert(network: str, asked: Conversion) -> int:
    from convert_weights.checkpoint import convert_checkpoint

    if asked.dry_run:
        _rehearse(network, asked, asked.source, asked.dtype, asked.options())
        return OK
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
    reasons: dict[str, list[str]] = {}
    for name, reason in opened.plan.ignored.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        note(f"ignored {', '.join(names[:3])}{more}: {reason}")


def _convert_all(_: str, asked: Conversion) -> int:
    from convert_weights.all_networks import convert_pipeline, find_networks, options_of

    if asked.merge or asked.lora:
        raise ValueError("--merge and --lora belong to one network; convert the networks one by one.")
    dtypes = _dtypes(asked.dtype)
    folders = find_networks(asked.source)
    if not asked.quiet:
        for network, folder in folders.items():
            note(f"{network}: {folder}")
    if asked.dry_run:
        for network in NETWORKS:
            _rehearse(network, asked, folders[network], dtypes[network], options_of(network, folders, asked.options()))
        return OK
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


def _to_orbax(_: str, asked: Orbax) -> int:
    from convert_weights.orbax_checkpoint import to_orbax

    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file
    directory = model_path(asked.directory)
    for network in [asked.network] if asked.network else present_networks(directory) or NETWORKS:
        manifest = open_network(directory, network)
        path = to_orbax(manifest, asked.out / network, dtype=asked.dtype, overwrite=asked.overwrite)
        nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        shell.result(f"{network}: {path}, {nbytes / 1e9:.3f} GB")
    return OK


def _from_orbax(_: str, asked: FromOrbax) -> int:
    from convert_weights.orbax_checkpoint import from_orbax

    logging.getLogger("absl").setLevel(logging.WARNING)
    started = time.monotonic()
    manifest = from_orbax(
        asked.source,
        asked.directory,
        network=asked.network,
        config_file=asked.config,
        dtype=asked.dtype,
        overwrite=asked.overwrite,
    )
    shell.result(_summary(manifest, time.monotonic() - started))
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


_CONVERSION = {"": declared(Conversion)}

# What each verb does, what it takes, and the function that does it.
VERBS: Mapping[str, tuple[str, Any, Callable[[str, Any], int]]] = {
    **{network: (f"convert the network {network}", Conversion, _convert) for network in NETWORKS},
    "pipeline": ("convert all three networks, from a folder that holds their folders", Conversion, _convert_all),
    "verify": ("compare checksum, shape and dtype of every parameter, and the source's values", Verification, _verify),
    "to-torch": ("write PyTorch names and layouts back, as safetensors", Reversal, _to_torch),
    "to-orbax": ("write networks as standard orbax checkpoints", Orbax, _to_orbax),
    "from-orbax": ("make a network from an orbax checkpoint", FromOrbax, _from_orbax),
    "upgrade": ("rewrite networks of an older format in the present one, in place", Upgrading, _upgrade),
}
