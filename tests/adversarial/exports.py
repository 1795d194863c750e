"""Mutants of an exported folder: what accidents do to its files, and what somebody does who means to fool a host.

An accident changes bytes.  Who means to fool writes the manifest anew, with right checksums of the files and of itself; what
such a manifest says without contradicting itself, its programs and its weights (another guidance, other weights of the right
stage) is another export, and no mutant here.  What only one target's programs can say is in `export_programs`.

Invariant: a mutation depends on its own seed and on the folder alone, so that a mutant can be made again.
"""

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.adversarial import export_programs
from tests.adversarial.export_programs import Change
from tests.support.exports import rewrite

Mutation = Callable[[Path, random.Random], None]
Manifest = dict[str, Any]

BAD_NUMBERS = [float("nan"), float("inf"), 1e30, -1e30, 2**62, -(2**62), "3", [], {}, True]
PAGES = (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", b"<!DOCTYPE html><html>404</html>\n")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of a target's files: of weights, of programs, and of those of two pairs that have the same shapes."""

    weights: str
    programs: str
    pair_weights: str
    pair_programs: str


LAYOUTS = {
    "stablehlo": Layout("*.safetensors", "*.jaxexport", "*pair_0?.safetensors", "*pair.*.jaxexport"),
    "onnx": Layout("*.safetensors", "*.onnx", "*pair_0?.safetensors", "*pair_0?.*.onnx"),
    "coreml": Layout(
        "*/Data/*/weights/*", "*/Data/*/*.mlmodel", "stdit3_pair_0?.*/Data/*/weights/*", "stdit3_pair_0?.*/Data/*/*.mlmodel"
    ),
}


class Folder:
    """An exported folder that is put back as it was after every mutant, times of change included."""

    def __init__(self, path: Path):
        self.path = path
        self.files = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files_of(path)}

    def restore(self) -> None:
        """Puts every file back that is no longer as it was."""
        folders = {folder for file in self.files for folder in file.parents}
        for path in [*self.path.rglob("*")]:
            if path.is_symlink() or not (path in folders if path.is_dir() else path in self.files and path.is_file()):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for file, (data, modified_ns) in self.files.items():
            if not file.exists() or file.stat().st_mtime_ns != modified_ns or file.read_bytes() != data:
                file.write_bytes(data)
                os.utime(file, ns=(modified_ns, modified_ns))


def mutations(target: str) -> Iterator[tuple[str, Mutation]]:
    """Yields all kinds of mutants of a target's exports by name; each may be made with any seed."""
    names = LAYOUTS[target]
    own = {"stablehlo": no_mutations, "onnx": export_programs.of_onnx, "coreml": export_programs.of_coreml}[target]
    yield from {
        **{f"a bit of {kind} flipped": flipped(kind) for kind in (names.weights, names.programs, "*.json", "manifest.json")},
        **{f"values of {kind} set to zero": zeroed(kind) for kind in (names.weights, names.programs)},
        **{f"two {kind} swapped": swapped(kind) for kind in (names.pair_weights, names.pair_programs, names.weights)},
        "a file cut": cut,
        "a file emptied": lambda folder, rng: any_file(folder, rng).write_bytes(b""),
        "a file deleted": lambda folder, rng: any_file(folder, rng).unlink(),
        "a folder in place of a file": folder_instead,
        "a pipe in place of a file": pipe_instead,
        "a link to a file outside": linked_outside,
        "a link to a file inside": linked_inside,
        "a page in place of a file": lambda folder, rng: any_file(folder, rng).write_bytes(rng.choice(PAGES)),
        "a file touched": lambda folder, rng: os.utime(any_file(folder, rng), (rng.random() * 1e9, 1e9)),
        "a file more": lambda folder, _: (folder / "stdit3_pair_02.safetensors").write_bytes(b"mine"),
    }.items()
    yield from {
        "programs of full and merged swapped": retold(swap_programs),
        "names of full and merged swapped": retold(swap_names),
        "weights of two pairs swapped": retold(swap_weights),
        "program of another stage": retold(other_program),
        "a path out of the folder": retold(path_outside),
        "a number out of range": retold(bad_number),
        "a tensor declared otherwise": retold(other_tensor),
        "stages, phases or functions otherwise": retold(other_structure),
        "a field missing or more": retold(other_fields),
        "a program that is none": no_program(names.programs),
        **({} if target == "coreml" else {"a header of weights that lies": lying_header}),
    }.items()
    for kind, change in own().items():
        yield kind, listed_change(names.programs if "program" in kind else names.weights, change)


def no_mutations() -> dict[str, Change]:
    return {}


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    """Returns the files of a folder whose paths in it match a pattern, in order; ``*`` matches all, those of packages too."""
    return sorted(path for path in (folder.rglob("*") if pattern == "*" else folder.glob(pattern)) if not path.is_dir())


def any_file(folder: Path, rng: random.Random, pattern: str = "*") -> Path:
    return rng.choice(files_of(folder, pattern))


def flipped(pattern: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = any_file(folder, rng, pattern)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    return mutate


def zeroed(pattern: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = any_file(folder, rng, pattern)
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data) // 2
        data[start:] = bytes(len(data) - start)
        path.write_bytes(data)

    return mutate


def swapped(pattern: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        one, other = rng.sample(files_of(folder, pattern), 2)
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)

    return mutate


def cut(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def folder_instead(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    path.unlink()
    path.mkdir()


def pipe_instead(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    path.unlink()
    os.mkfifo(path)


def linked_outside(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    outside = folder.with_name(f"outside {path.name}")
    path.replace(outside)
    path.symlink_to(outside)


def linked_inside(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    inside = path.with_name(f"inside {path.name}")
    path.rename(inside)
    path.symlink_to(inside.name)


# What a manifest says, written and sealed anew.


def retold(change: Callable[[Manifest, random.Random], None]) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        rewrite(folder, lambda made: change(made, rng))

    return mutate


def pairs(made: Manifest) -> list[Manifest]:
    return [stage for stage in made["stages"] if stage["program"] == "stdit3_pair"]


def swap_programs(made: Manifest, rng: random.Random) -> None:
    full, merged = rng.choice(pairs(made))["functions"]
    full["artefact"], merged["artefact"] = merged["artefact"], full["artefact"]


def swap_names(made: Manifest, rng: random.Random) -> None:
    full, merged = rng.choice(pairs(made))["functions"]
    for field in rng.choice((("name", "variant"), ("variant",), ("name",))):
        full[field], merged[field] = merged[field], full[field]


def swap_weights(made: Manifest, rng: random.Random) -> None:
    one, other = pairs(made)
    for first, second in zip(one["functions"], other["functions"], strict=True):
        first, second = first["artefact"], second["artefact"]
        key = "weights" if "weights" in first else "file"
        first[key], second[key] = second[key], first[key]
        if rng.random() < 0.5:
            break


def other_program(made: Manifest, rng: random.Random) -> None:
    one, other = rng.sample(made["stages"], 2)
    one["functions"][0]["artefact"]["file"] = other["functions"][-1]["artefact"]["file"]
    if one["program"] == other["program"]:  # two pairs have the same program
        one["functions"][0]["artefact"]["file"] = "tokenizer.json"


def path_outside(made: Manifest, rng: random.Random) -> None:
    old = rng.choice(sorted(made["files"]))
    new = rng.choice((f"../{old}", f"/etc/{old}", f"a/../../{old}", f"./{old}", f"{old}\0", f"C:\\{old}", f"\x1b[2J{old}"))
    if rng.random() < 0.5:
        made["files"][new] = made["files"].pop(old)
    made["tokens"]["file"] = new if made["tokens"]["file"] == old else made["tokens"]["file"]
    for stage in made["stages"]:
        for function in stage["functions"]:
            function["artefact"] = {key: new if text == old else text for key, text in function["artefact"].items()}


def bad_number(made: Manifest, rng: random.Random) -> None:
    roots = [made["sampling"], *made["sizes"], made["tokens"], made["files"], made["stages"][0]["functions"][0]["checks"]]
    places = [place for root in roots for place in numbers(root)]
    inner, key = rng.choice([*places, (made, "total_bytes"), (made, "format_version")])
    inner[key] = rng.choice(BAD_NUMBERS)


def numbers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields where the numbers of a value are: what holds each, and under which key."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            yield value, key
        elif isinstance(inner, dict | list):
            yield from numbers(inner)


def other_tensor(made: Manifest, rng: random.Random) -> None:
    tensors = rng.choice([f[side] for s in made["stages"] for f in s["functions"] for side in ("inputs", "outputs")])
    tensor = rng.choice(tensors)
    match rng.randrange(6):
        case 0:
            tensor["name"] = rng.choice(("x", "z_BTHWC", "t_B", tensor["name"].lower()))
            tensor["name"] += "_" if tensor["name"] == "x" else "x"
        case 1:
            axis = rng.randrange(len(tensor["shape"]))
            tensor["shape"][axis] = rng.choice((tensor["shape"][axis] + 1, 2**31, 0, -1, "B"))
        case 2:
            tensor["dtype"] = rng.choice([d for d in ("float32", "float16", "int32", "int64", "") if d != tensor["dtype"]])
        case 3:
            tensor["shape"].append(1)
        case 4:
            tensors.remove(tensor)
        case _:
            tensors.append({**tensor, "name": "more"})


def other_structure(made: Manifest, rng: random.Random) -> None:
    stage = rng.choice(made["stages"])
    match rng.randrange(9):
        case 0:
            made["stages"].remove(stage)
        case 1:
            made["stages"].append(stage)
        case 2:
            made["stages"].reverse()
        case 3:
            rng.choice(made["phases"])["stages"].reverse()
        case 4:
            made["phases"].reverse()
        case 5:
            rng.choice(made["phases"])["unload"] = rng.choice(("after_phase", "never"))
        case 6:
            made["model"]["networks"]["stdit3"]["config"]["depth"] = rng.choice((1, 3, 10**9, -1, "2", None))
        case 7:
            stage["functions"].append(stage["functions"][0])
        case _:
            stage["functions"][0]["sizes"] = rng.choice((["1x1x1"], [], ["5x16x32", "5x16x32"]))


def other_fields(made: Manifest, rng: random.Random) -> None:
    place = rng.choice([made, made["sampling"], made["sizes"][0], made["tokens"], made["stages"][0], made["phases"][0]])
    if rng.random() < 0.5:
        del place[rng.choice([key for key in place if key != "sha256"])]
    else:
        place["more"] = 1


# Files that are listed with their right checksums, and are not what they should be.


def listed_anew(folder: Path, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def change(made: Manifest) -> None:
        made["files"][str(path.relative_to(folder))] = entry
        made["total_bytes"] = sum(one["bytes"] for one in made["files"].values())

    rewrite(folder, change)


def lying_header(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng, LAYOUTS["onnx"].weights)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    match rng.randrange(9):
        case 0:
            return listed_anew(folder, path, rng.choice((2**62, 2**63, 2**40, len(data))).to_bytes(8, "little") + data[8:])
        case 1:
            entry["shape"] = rng.choice(([2**62], [2**31, 2**31], [-1], [], [0], entry["shape"] + [2], "1", None))
        case 2:
            entry["data_offsets"] = rng.choice(([0, 2**62], [2**62, 2**62 + 4], [4, 4], [0], None))
        case 3:
            entry["dtype"] = rng.choice(("F64", "BF16", "U8", "F16", "", None, 3))
        case 4:
            header["more"] = header.pop(name)
        case 5:
            header["__metadata__"] = rng.choice(({"stage": "t5_block_07"}, {}, {"stage": 3}, None, []))
        case 6:
            values += bytes(rng.randrange(1, 9))
        case 7:
            values = values[: rng.randrange(len(values))]
        case _:
            header = rng.choice(([], 3, {name: []}, {}))
    text = json.dumps(header).encode()
    return listed_anew(folder, path, len(text).to_bytes(8, "little") + text + values)


def no_program(pattern: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = any_file(folder, rng, pattern)
        data = path.read_bytes()
        others = [other.read_bytes() for other in files_of(folder, pattern) if other != path]
        listed_anew(folder, path, rng.choice((b"", rng.randbytes(2000), data[: len(data) // 3], b"\0" * 64, *PAGES, *others)))

    return mutate


def listed_change(pattern: str, change: Change) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        path = any_file(folder, rng, pattern)
        listed_anew(folder, path, change(path.read_bytes(), rng))

    return mutate
