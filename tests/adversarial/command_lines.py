"""Hostile command lines for ``generate``, ``calibrate``, ``inspect`` and ``convert``: each has at least one impossible value.

Invariant: a line is refused before any work, in one printable line, with the exit code of bad input or of a failure.
"""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.adversarial import hostile
from tests.adversarial.command import run_command
from tests.adversarial.verdicts import MUTATION, Verdict

SEED = 20261117

_COUNT = ("0", "-1", "x", "1.5", "nan", "", "1e3", "0x10", "\u0663x", "--", "9" * 5000)
_NUMBER = ("nan", "inf", "-inf", "x", "", "1,5", "1e999", "--")
_POSITIVE = ("0", "-1", *_NUMBER)
_SAMPLING: Mapping[str, tuple[str, ...]] = {
    "--steps": _COUNT,
    "--guidance": _NUMBER,
    "--seed": ("x", "1.5", "nan", "", "9" * 5000),
    "--height": ("0", "-16", "x", "63", "nan", ""),
    "--width": ("0", "-16", "x", "63", "nan", ""),
    "--num-frames": ("0", "-1", "x", "2h", "nans", "infs", "", "-2s"),
    "--resolution": ("x", "", "9999p", "../240p"),
    "--fps": _POSITIVE,
    "--dtype": ("float16", "x", "", "FLOAT32"),
    "--memory-budget": ("0", "-3GB", "x", "nanGB", "", "GB", "1e999GB", "3.3 potatoes"),
}
_GENERATE = _SAMPLING | {
    "--num-sample": ("0", "-1", "x", ""),
    "--aes": ("nan", "x", "", "inf"),
    "--flow": ("nan", "x", "", "inf"),
    "--loop": ("0", "-1", "x", "1.5", ""),
    "--condition-frame-edit": ("2", "-1", "nan", "x"),
    "--align": ("0", "-1", "x", ""),
    "--batch-size": ("0", "-1", "x", ""),
    "--preset": ("x", "", "Exact", "recommended\n"),
    "--solver": ("x", "", "EULER", "../euler"),
    "--shift": _POSITIVE,
    "--leap": ("-1", "1.5", "x", "", "nan"),
    "--plan": ("/nonexistent/plan.json", "/dev/null", "FOLDER", "JUNK", "DEEP", "BIG"),
    "--merge-steps": ("-1", "x", "1.5", ""),
    "--merge-odd": ("x", "", "ALONE"),
    "--merge-attentions": ("x", "spatial,x", ","),
    "--merge-positions": ("x", ""),
    "-o": ("clip.txt", "/nonexistent\n/clip.xyz", "JUNK/clip.mp4", "clip.mp4.exe", "/proc/clip.mp4"),
    "--format": ("avi", "", "MP4"),
    "--save-latents": ("latents.mp4", "latents", "/proc/x.npz"),
    "--model": ("/nonexistent", "JUNK", "FOLDER", "/dev/null", "\udcff", "x" * 5000, "a\x1b[2J"),
    "--from-latents": ("/nonexistent.npz", "JUNK", "FOLDER", "/dev/null"),
    "--prompt-path": ("/nonexistent", "FOLDER", "JUNK"),
    "--unknown": ("1",),
    "--steps=": ("",),
}
_CALIBRATE = _SAMPLING | {
    "--evaluations": _COUNT,
    "--keep": ("x", "", "VELOCITY"),
    "--merge-steps": ("-1", "x", ""),
    "--shift": _POSITIVE,
    "--prompt-path": ("/nonexistent", "FOLDER"),
    "--unknown": ("1",),
}
_INSPECT = {name: _SAMPLING[name] for name in ("--height", "--num-frames", "--dtype", "--memory-budget")} | {
    "--bandwidth": ("0", "-1GB", "x", "nan", ""),
    "--gflops": ("0", "-1", "nan", "inf", "x"),
    "--batch-size": ("0", "-1", "x", ""),
    "--unknown": ("1",),
}
_PATHS = (
    "/nonexistent",
    "JUNK",
    "DEEP",
    "BIG",
    "/dev/null",
    "/dev/zero",
    "FOLDER",
    "",
    "\udcff",
    "x" * 5000,
    "a\x1b[2J",
    "PIPE",
    "LOOP",
)
_PROMPTS = ("a red circle", "x" * 100, "\u202e\x1b[2J", "|0| a |1| b", '{"a": 1}', "\ud800", "a\0b", "-", "\n")


def run(number: int, folder: Path) -> tuple[str, Verdict, str]:
    """Returns the line of this number, its verdict, and what was seen."""
    draw = np.random.default_rng([SEED, number])
    arguments = _line(number, draw, _places(folder))
    shown = " ".join(f"{argument!r:.30}" for argument in arguments)
    (folder / MUTATION).write_text(shown)
    before = set(folder.rglob("*"))
    ran = run_command(arguments)
    if ran.verdict is not None:
        return shown, ran.verdict, ran.detail
    if ran.code == 0:
        return shown, Verdict.OTHER, f"accepted: {ran.out!r:.200}"
    if not ran.is_clean_refusal() or (left := set(folder.rglob("*")) - before):
        return shown, Verdict.UNCLEAN, f"exit {ran.code}, said {ran.err!r:.300}, left {locals().get('left')!s:.100}"
    return shown, Verdict.REFUSED, ran.err[:200]


def _line(number: int, draw: np.random.Generator, places: Mapping[str, str]) -> list[str]:
    makers = (_generate, _generate, _calibrate, _inspect, _convert)
    arguments = makers[number % len(makers)](draw)
    return [places["FOLDER"] + "/out.json" if argument == "OUT" else _placed(argument, places) for argument in arguments]


def _placed(argument: str, places: Mapping[str, str]) -> str:
    head, _, tail = argument.partition("/")
    return places[head] + ("/" + tail if tail else "") if head in places else argument


def _options(draw: np.random.Generator, table: Mapping[str, tuple[str, ...]]) -> list[str]:
    names = [str(name) for name in draw.choice(list(table), int(draw.integers(1, 4)), replace=False)]
    return [argument for name in names for argument in (name, hostile.pick(draw, table[name]))]


def _generate(draw: np.random.Generator) -> list[str]:
    prompts = [hostile.pick(draw, _PROMPTS)] * int(draw.integers(0, 3))
    model = [] if draw.integers(2) else ["--model", "MODEL"]
    return ["generate", *prompts, *model, *_options(draw, _GENERATE), "--save-dir", "FOLDER"]


def _calibrate(draw: np.random.Generator) -> list[str]:
    return ["calibrate", *(["MODEL"] * int(draw.integers(2))), "-o", "OUT", "--evaluations", "4", *_options(draw, _CALIBRATE)]


def _inspect(draw: np.random.Generator) -> list[str]:
    if draw.integers(2):
        return ["inspect", hostile.pick(draw, _PATHS), *(["--json"] * int(draw.integers(2)))]
    return ["inspect", "MODEL", *_options(draw, _INSPECT)]


def _convert(draw: np.random.Generator) -> list[str]:
    verb = hostile.pick(draw, ["t5", "stdit3", "vae", "pipeline", "verify", "to-torch", "clip", ""])
    places = [hostile.pick(draw, _PATHS) for _ in range(int(draw.integers(1, 3)))]
    further = hostile.pick(
        draw,
        [
            [], ["--dtype", "float16"], ["--dtype", "int8"], ["--dtype", "t5=x"], ["--section", "x"], ["--network", "clip"],
            ["--config", "JUNK"], ["--config", "DEEP"], ["--spatial", "/nonexistent"], ["--unknown"], ["--source", "JUNK"],
        ],
    )  # fmt: skip
    return ["convert", verb, *places, *further]


def _places(folder: Path) -> dict[str, str]:
    """Makes files and folders for the names in the tables."""
    places = {name: folder / name.lower() for name in ("FOLDER", "JUNK", "DEEP", "BIG", "PIPE", "LOOP")}
    places["FOLDER"].mkdir()
    places["JUNK"].write_bytes(np.random.default_rng(0).bytes(3000))
    places["DEEP"].write_text("[" * 100_000)
    with open(places["BIG"], "wb") as file:
        file.truncate(3 << 30)
    import os

    os.mkfifo(places["PIPE"])
    places["LOOP"].symlink_to(places["LOOP"])
    return {name: str(path) for name, path in places.items()} | {"MODEL": str(_model())}


@functools.cache
def _model() -> Path:
    import atexit
    import tempfile

    from tests.support.tiny_model import write_model

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_model(folder / "model")
