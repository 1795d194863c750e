"""Mutations of a model directory, and what loading, ``inspect`` and ``convert verify`` make of them.

The parts of a directory are found by what they are (JSON files, the files of values), not by how a reader names them, so that
the mutations outlive a change of the format.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sora_jax.networks import registry
from sora_jax.storage.checkpoint import load_network, unflatten
from tests.adversarial import bases, hostile
from tests.adversarial.command import run_command
from tests.adversarial.verdicts import MUTATION, Verdict

SEED = 20261116
NETWORKS = ("t5", "stdit3")
Mutation = Callable[[Path, np.random.Generator], str]


@functools.cache
def pristine() -> Path:
    """Returns a model directory of two networks and a tokenizer; lives as long as the process."""
    import atexit
    import tempfile

    from convert_weights.checkpoint import convert_checkpoint

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for network in NETWORKS:
        convert_checkpoint(network, bases.base(network).write(folder / "sources" / network, "safetensors"), folder / "model")
    return folder / "model"


def _network(model: Path, draw: np.random.Generator) -> Path:
    return model / hostile.pick(draw, NETWORKS)


def _values_file(model: Path, draw: np.random.Generator) -> Path:
    """Returns a file of values: one that is no JSON."""
    network = _network(model, draw)
    return hostile.pick(draw, sorted(path for path in network.rglob("*") if path.is_file() and path.suffix != ".json"))


def manifest_values(model: Path, draw: np.random.Generator) -> str:
    """Puts a hostile value into network.json."""
    path = _network(model, draw) / "network.json"
    return f"{path.parent.name}: {hostile.mutate_json(path, draw)}"


def manifest_numbers(model: Path, draw: np.random.Generator) -> str:
    """Puts a hostile number into the configuration or a parameter's entry."""
    path = _network(model, draw) / "network.json"
    tree = json.loads(path.read_text())
    part = tree["config"] if draw.integers(2) else hostile.pick(draw, list(tree["parameters"].values()))
    numeric = [(c, k) for c, k in hostile.places(part) if isinstance(c[k], int | float) and not isinstance(c[k], bool)]
    container, key = hostile.pick(draw, numeric)
    container[key] = hostile.pick(draw, [*hostile.NUMBERS, container[key] + 1, 10**7, -container[key]])
    path.write_text(json.dumps(tree))
    return f"{path.parent.name}: {key} = {container[key]}"


def manifest_bytes(model: Path, draw: np.random.Generator) -> str:
    """Changes bytes of network.json, or puts something else there."""
    path = _network(model, draw) / "network.json"
    content, done = hostile.mutate_bytes(path.read_bytes(), draw) if draw.integers(4) else hostile.instead(draw)
    path.write_bytes(content)
    return f"{path.parent.name}: {done}"


def manifest_names(model: Path, draw: np.random.Generator) -> str:
    """Renames a parameter, also to what lies outside the folder."""
    path = _network(model, draw) / "network.json"
    tree = json.loads(path.read_text())
    name = hostile.pick(draw, list(tree["parameters"]))
    new = hostile.pick(
        draw, ["../../x", "/etc/passwd", "embed/../../x", "embed.../../x", name + "\x1b[2J", "embed.x", "", name + "_scale"]
    )
    tree["parameters"][new] = tree["parameters"].pop(name)
    path.write_text(json.dumps(tree))
    return f"{name} is {new!r}"


def manifest_exchanged(model: Path, draw: np.random.Generator) -> str:
    """Exchanges the entries of two parameters of one shape, or one value of them."""
    path = _network(model, draw) / "network.json"
    tree = json.loads(path.read_text())
    parameters = tree["parameters"]
    first = hostile.pick(draw, list(parameters))
    alike = [name for name in parameters if name != first and parameters[name]["shape"] == parameters[first]["shape"]]
    if not alike:
        return manifest_exchanged(model, draw)
    second = hostile.pick(draw, alike)
    if draw.integers(2):
        parameters[first], parameters[second] = parameters[second], parameters[first]
    else:
        parameters[first]["sha256"] = parameters[second]["sha256"]
    path.write_text(json.dumps(tree))
    return f"{first} and {second}"


def value_bit(model: Path, draw: np.random.Generator) -> str:
    """Flips a bit of a stored value."""
    path = _values_file(model, draw)
    content = bytearray(path.read_bytes())
    at = int(draw.integers(len(content)))
    content[at] ^= 1 << int(draw.integers(8))
    path.write_bytes(content)
    return f"bit {at} of {path.relative_to(model)}"


def value_bytes(model: Path, draw: np.random.Generator) -> str:
    """Changes, cuts, lengthens or empties a file of values."""
    path = _values_file(model, draw)
    content = path.read_bytes()
    action = int(draw.integers(4))
    changed = (hostile.mutate_bytes(content, draw)[0], content[:-1], content + bytes(4), b"")[action]
    path.write_bytes(changed)
    return f"{('changed', 'cut', 'longer', 'empty')[action]}: {path.relative_to(model)}"


def values_exchanged(model: Path, draw: np.random.Generator) -> str:
    """Exchanges two files of values of one size."""
    first = _values_file(model, draw)
    files = [path for path in model.rglob("*") if path.is_file() and path != first and path.suffix != ".json"]
    alike = [path for path in files if path.stat().st_size == first.stat().st_size]
    if not alike:
        return values_exchanged(model, draw)
    second = hostile.pick(draw, sorted(alike))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return f"{first.relative_to(model)} and {second.relative_to(model)}"


def no_values_file(model: Path, draw: np.random.Generator) -> str:
    """Removes a file of values, or puts in its place what is no regular file."""
    path = _values_file(model, draw)
    content = path.read_bytes()
    path.unlink()
    action = int(draw.integers(6))
    if action == 1:
        os.mkfifo(path)
    elif action == 2:
        path.mkdir()
    elif action == 3:
        path.symlink_to("/dev/zero")
    elif action == 4:
        path.symlink_to(path)
    elif action == 5:
        outside = model.parent / "outside"
        outside.write_bytes(content[:-4] + bytes(4))
        path.symlink_to(outside)
    done = ("removed", "pipe", "folder", "link to a device", "link to itself", "link to another file")[action]
    return f"{done}: {path.relative_to(model)}"


def metadata(model: Path, draw: np.random.Generator) -> str:
    """Changes the metadata of one array: a value, bytes, or all of it."""
    path = hostile.pick(draw, sorted(_network(model, draw).rglob("zarr.json")))
    action = int(draw.integers(3))
    if action == 0:
        return f"{path.relative_to(model)}: {hostile.mutate_json(path, draw)}"
    if action == 1:
        path.write_bytes(hostile.mutate_bytes(path.read_bytes(), draw)[0])
    else:
        path.unlink()
    return f"{('', 'bytes', 'removed')[action]} of {path.relative_to(model)}"


def index(model: Path, draw: np.random.Generator) -> str:
    """Changes model.json."""
    path = model / "model.json"
    action = int(draw.integers(4))
    if action == 0:
        path.unlink()
        return "model.json removed"
    if action == 1:
        content, done = hostile.mutate_bytes(path.read_bytes(), draw) if draw.integers(2) else hostile.instead(draw)
        path.write_bytes(content)
        return f"model.json: {done}"
    if action == 2:
        return f"model.json: {hostile.mutate_json(path, draw)}"
    fields = json.loads(path.read_text())
    fields["tokenizer"] = hostile.pick(
        draw, ["../outside.json", "/etc/passwd", "t5/network.json", "", "tokenizer.json\x1b[2J", "x" * 300]
    )
    path.write_text(json.dumps(fields))
    return f"model.json: tokenizer {fields['tokenizer']!r:.40}"


def tokenizer(model: Path, draw: np.random.Generator) -> str:
    """Loses or replaces the tokenizer."""
    path = model / "tokenizer.json"
    path.unlink()
    action = int(draw.integers(4))
    if action == 1:
        path.write_bytes(hostile.instead(draw)[0])
    elif action == 2:
        path.symlink_to("/dev/zero")
    elif action == 3:
        path.mkdir()
    return ("lost", "replaced", "a device", "a folder")[action]


def networks(model: Path, draw: np.random.Generator) -> str:
    """Exchanges the networks, loses the manifest of one, or puts something else in place of its folder."""
    first, second = (model / network for network in NETWORKS)
    action = int(draw.integers(5))
    if action == 0:
        first.rename(model / "x")
        second.rename(first)
        (model / "x").rename(second)
    elif action == 1:
        (second / "network.json").unlink()
    elif action == 2:
        shutil.copyfile(first / "network.json", second / "network.json")
    elif action == 3:
        shutil.rmtree(second)
        second.write_text("x")
    else:
        (second / "network.json").unlink()
        os.mkfifo(second / "network.json")
    return ("exchanged", "no manifest", "the other's manifest", "a file", "a pipe")[action]


def strays(model: Path, draw: np.random.Generator) -> str:
    """Adds a file that is not part of a network."""
    path = _network(model, draw) / "embed" / "stray"
    path.write_bytes(draw.bytes(100))
    return str(path.relative_to(model))


MUTATIONS: tuple[Mutation, ...] = (
    manifest_values, manifest_numbers, manifest_bytes, manifest_names, manifest_exchanged, value_bit, value_bytes,
    values_exchanged, no_values_file, metadata, index, tokenizer, networks, strays,
)  # fmt: skip


def run(number: int, folder: Path) -> tuple[str, Verdict, str]:
    """Returns what was done to the directory of this number, the worst verdict of all commands, and what was seen."""
    mutation = MUTATIONS[number % len(MUTATIONS)]
    model = folder / "model"
    shutil.copytree(pristine(), model)
    done = f"{mutation.__name__} {mutation(model, np.random.default_rng([SEED, number]))}"
    (folder / MUTATION).write_text(done)
    verified = run_command(["convert", "verify", str(model)])
    inspected = run_command(["inspect", str(model)])
    for ran in (verified, inspected):
        if ran.verdict is not None:
            return done, ran.verdict, ran.detail
    if inspected.code and not inspected.is_clean_refusal(str(folder)):
        return done, Verdict.UNCLEAN, f"inspect: exit {inspected.code}, said {inspected.err!r:.300}"
    if verified.code not in (0, 1, 2) or not all(line.isprintable() for line in verified.err.splitlines()):
        return done, Verdict.UNCLEAN, f"verify: exit {verified.code}, said {verified.err!r:.300}"
    other, refusals = _loaded(model)
    if refusals and not all(text.isprintable() and str(folder) in text for text in refusals):
        return done, Verdict.UNCLEAN, f"loading said {refusals!r:.300}"
    if not other:
        return (
            done,
            Verdict.REFUSED if refusals or verified.code else Verdict.EQUAL,
            "; ".join(refusals)[:200] or verified.err[:200],
        )
    # A configuration within its ranges that fits every shape: the manifest has no checksum of it, the source knows better.
    sources = [pristine().parent / "sources" / network for network in NETWORKS]
    seen = [run_command(["convert", "verify", str(model), "--source", str(source)]).code for source in sources]
    betrayed = all(text.endswith("the configuration") for text in other) and any(seen)
    return done, Verdict.BETRAYED if betrayed else Verdict.OTHER, f"{other[:3]}; verify gave {verified.code}, {seen}"


def _loaded(model: Path) -> tuple[list[str], list[str]]:
    """Returns the parameters that a load gives with other values, and what a load refused."""
    other: list[str] = []
    refusals: list[str] = []
    for network in NETWORKS:
        try:
            config, flat = load_network(model, network)
            unflatten(registry.abstract(network, config), flat)
            other += [f"{network} {name}" for name in bases.differing(model, bases.base(network))]
        except (ValueError, OSError) as error:
            refusals.append(f"{model}: {error}" if "do not fit" in str(error) else str(error))
    return other, refusals
