"""The command ``sora-jax convert`` (``python -m convert_weights`` is the same).

It parses, calls and prints; a failure is one line (or one report of faults) on standard error and a non-zero exit code.
"""

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convert_weights.all_networks import convert_pipeline, find_networks
from convert_weights.checkpoint import Options, Source, convert_checkpoint
from convert_weights.to_torch import to_torch
from convert_weights.verify import verify
from sora_jax.config import NETWORKS
from sora_jax.files import advice
from sora_jax.process import peak_bytes
from sora_jax.shell import BAD_INPUT, FAILED, INTERRUPTED, OK, Parser
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.directory import Manifest, open_network, present_networks
from sora_jax.storage.upgrade import outdated, upgrade, upgraded_bytes

_EPILOG = """\
examples:
  sora-jax convert t5 t5-v1_1-xxl models/open-sora-1.2 --dtype int8
  sora-jax convert stdit3 OpenSora-STDiT-v3 models/open-sora-1.2 --dtype bfloat16
  sora-jax convert vae OpenSora-VAE-v1.2 models/open-sora-1.2
  sora-jax convert pipeline downloads models/open-sora-1.2 --dtype t5=int8,stdit3=bfloat16
  sora-jax convert verify models/open-sora-1.2 --source OpenSora-STDiT-v3
  sora-jax convert to-torch models/open-sora-1.2 checkpoints
  sora-jax convert upgrade models/open-sora-1.2
An interrupted conversion goes on when the same command is given again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 done, 1 failed or differs, 2 wrong usage, 130 interrupted."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        return _fail("interrupted; give the same command again to go on.", INTERRUPTED)
    except ValueError as error:
        return _fail(str(error), FAILED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}{advice(error)}.", FAILED)


def _fail(message: str, code: int) -> int:
    print(f"sora-jax convert: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sora-jax convert",
        description="Convert PyTorch checkpoints into a model directory, verify it, or write it back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{t5,stdit3,vae,pipeline,verify,to-torch,upgrade}")
    for network in (*NETWORKS, "pipeline"):
        what = "all three networks, from a folder of their folders" if network == "pipeline" else f"the network {network}"
        command = commands.add_parser(network, help=f"convert {what}")
        command.add_argument("source", type=Path, help="a weight file, an index of shards, or a folder")
        command.add_argument("directory", type=Path, metavar="MODEL_DIR")
        command.add_argument("--dtype", default="float32", help=f"stored dtype: {', '.join(STORED_DTYPES)} (default float32)")
        command.add_argument("--overwrite", action="store_true", help="replace a network that exists")
        command.add_argument("--quiet", action="store_true", help="no progress bar, no notes")
        _add_source_options(command)
        command.set_defaults(run=_convert_pipeline if network == "pipeline" else _convert, network=network)
    command = commands.add_parser("verify", help="checksum, shape and dtype of every parameter; and the source's values")
    command.add_argument("directory", type=Path, metavar="MODEL_DIR")
    command.add_argument("--source", type=Path, help="compare bit for bit with this checkpoint, converted again")
    command.add_argument("--network", choices=NETWORKS, help="look at this network only")
    _add_source_options(command)
    command.set_defaults(run=_verify)
    command = commands.add_parser("to-torch", help="write PyTorch names and layouts back, as safetensors")
    command.add_argument("directory", type=Path, metavar="MODEL_DIR")
    command.add_argument("out", type=Path, metavar="OUT", help="gets one folder for each network")
    command.add_argument("--network", choices=NETWORKS, help="write this network only")
    command.add_argument("--overwrite", action="store_true", help="replace files that exist")
    command.set_defaults(run=_to_torch)
    command = commands.add_parser("upgrade", help="rewrite networks of an older format in the present one, in place")
    command.add_argument("directory", type=Path, metavar="MODEL_DIR")
    command.add_argument("--quiet", action="store_true", help="no progress bar, no notes")
    command.set_defaults(run=_upgrade)
    return parser


def _add_source_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--section", help="which state dict of a training checkpoint to take (default: EMA where there is one)"
    )
    command.add_argument("--config", type=Path, help="read instead of the config.json beside the weights")
    command.add_argument("--spatial", type=Path, help="vae: the AutoencoderKL, where SOURCE holds only the temporal part")
    command.add_argument(
        "--ignore-config-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a config.json key known not to change the network",
    )
    command.add_argument("--allow-mixed-dtypes", action="store_true", help="accept arrays that differ in dtype")


def _source_options(options: argparse.Namespace) -> Options:
    return Options(
        section=options.section,
        config_file=options.config,
        spatial=options.spatial,
        ignore_config_keys=options.ignore_config_key,
        allow_mixed_dtypes=options.allow_mixed_dtypes,
    )


def _convert(options: argparse.Namespace) -> int:
    started = time.monotonic()
    with _Bar(options.quiet) as bar:
        manifest = convert_checkpoint(
            options.network,
            options.source,
            options.directory,
            dtype=options.dtype,
            overwrite=options.overwrite,
            options=_source_options(options),
            report=(lambda opened: None) if options.quiet else _print_notes,
            progress=lambda done, total: bar.show(options.network, done, total),
        )
    print(_summary(manifest, time.monotonic() - started))
    return OK


def _print_notes(opened: Source) -> None:
    notes = [*opened.checkpoint.notes, f"configuration: {opened.resolved.origin}"]
    if opened.resolved.ignored:
        notes.append(f"config.json keys without effect here: {', '.join(opened.resolved.ignored)}")
    notes += [f"ignored {name}: {reason}" for name, reason in opened.plan.ignored.items()]
    print("\n".join(notes))


def _convert_pipeline(options: argparse.Namespace) -> int:
    dtypes = _dtypes(options.dtype)
    if not options.quiet:
        for network, folder in find_networks(options.source).items():
            print(f"{network}: {folder}")
    started = time.monotonic()
    with _Bar(options.quiet) as bar:
        manifests = convert_pipeline(
            options.source,
            options.directory,
            dtypes=dtypes,
            overwrite=options.overwrite,
            options=_source_options(options),
            progress=bar.show,
        )
    for network in NETWORKS:
        if network not in manifests:
            print(f"{network}: already in {options.directory}; --overwrite converts it again")
    for manifest in manifests.values():
        print(_summary(manifest, time.monotonic() - started))
    return OK


def _dtypes(text: str) -> dict[str, str]:
    """Returns the stored dtype of each network from ``DTYPE`` or ``NETWORK=DTYPE,...``; the VAE is never int8."""
    if "=" not in text:
        return {network: "float32" if network == "vae" and text == "int8" else text for network in NETWORKS}
    chosen = dict(part.partition("=")[::2] for part in text.split(","))
    if unknown := chosen.keys() - set(NETWORKS):
        raise ValueError(f"--dtype names {', '.join(sorted(unknown))}; expected {', '.join(NETWORKS)}.")
    return {network: chosen.get(network, "float32") for network in NETWORKS}


def _verify(options: argparse.Namespace) -> int:
    faults = verify(
        options.directory, source=options.source, network=options.network, options=_source_options(options), note=print
    )
    for network, found in faults.items():
        count = len(open_network(options.directory, network).parameters)
        print(
            f"{network}: {count} arrays, " + (f"{len(found)} faults" if found else "checksums, shapes and dtypes as recorded")
        )
        for fault in found:
            print(f"  {fault}", file=sys.stderr)
    failed = any(faults.values())
    if options.source and not failed:
        print(f"equal to {options.source}, bit for bit")
    return FAILED if failed else OK


def _to_torch(options: argparse.Namespace) -> int:
    networks = [options.network] if options.network else present_networks(options.directory) or NETWORKS
    for network in networks:
        path = to_torch(open_network(options.directory, network), options.out / network, overwrite=options.overwrite)
        print(f"{network}: {path}, {path.stat().st_size / 1e9:.3f} GB")
    return OK


def _upgrade(options: argparse.Namespace) -> int:
    manifests = outdated(options.directory)
    if manifests and not options.quiet:
        largest = max(manifests, key=upgraded_bytes)
        print(
            f"upgrading {', '.join(manifest.network for manifest in manifests)}, one after the other: needs "
            f"{upgraded_bytes(largest) / 1e9:.3f} GB of free disk space, for {largest.network}, until the old files are removed"
        )
    for manifest in manifests:
        started = time.monotonic()
        with _Bar(options.quiet) as bar:
            upgraded = upgrade(manifest, progress=functools.partial(bar.show, manifest.network))
        print(_summary(upgraded, time.monotonic() - started))
    if not manifests:
        print(f"{options.directory}: every network has the present format")
    return OK


def _summary(manifest: Manifest, seconds: float) -> str:
    nbytes = sum(parameter.nbytes for parameter in manifest.parameters.values())
    return (
        f"{manifest.path}: {len(manifest.parameters)} arrays, {nbytes / 1e9:.3f} GB as {manifest.dtype}, "
        f"{seconds:.1f} s, peak memory {peak_bytes() / 1e9:.2f} GB"
    )


class _Bar:
    """A progress bar of source bytes; begins anew with each network."""

    def __init__(self, quiet: bool):
        self._quiet, self._network = quiet, ""
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, network: str, done: int, total: int) -> None:
        if self._quiet:
            return
        if self._bar is None or network != self._network:
            self.__exit__()
            self._network = network
            self._bar = tqdm(total=total, desc=network, unit="B", unit_scale=True, disable=None)
        self._bar.update(min(done, total) - self._bar.n)
