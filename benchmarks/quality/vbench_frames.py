"""Videos in the folder and with the names that VBench expects, for people who have its networks.

Command:  python -m benchmarks.quality.vbench_frames VBench_full_info.json OUT --model MODEL_DIR [--preset recommended]
          then, with VBench installed:  vbench evaluate --videos_path OUT --dimension DIMENSION
Needs:    VBench's own list of prompts (vbench/VBench_full_info.json of its repository), a model that follows them.
Writes:   OUT/<prompt>-<number>.mp4, number 0 to 4 (0 to 24 for temporal flickering); OUT/study.json says how.

VBench finds a video by its prompt and number; each video has its own noise.  Existing videos are skipped, so an interrupted
command continues.  FVD needs only the folder: its networks read any video.

Source: Vchitect/VBench prompts/README.md (arXiv 2311.17982).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks._support.machine import write_report
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.shell import describe

SAMPLES, FLICKERING_SAMPLES = 5, 25
_FORBIDDEN = "/\0"


def main() -> None:
    """Generates the missing videos; exits with one line if it cannot."""
    options = parse()
    try:
        jobs = list(enumerate(videos(read_list(options.prompts), options.dimension, options.samples)))
        missing = [(at, job) for at, job in jobs if not (options.out / file_name(*job)).exists()]
        print(f"{len(jobs)} videos, {len(missing)} to make")
        if options.dry_run or not missing:
            return
        pipe = Pipeline.from_pretrained(options.model)
        names = ("preset", "num_steps", "leap", "merge_steps", "plan", "num_frames", "height", "width", "resolution", "dtype")
        given = {name: getattr(options, name) for name in (*names, "aspect_ratio")}
        write_report({"model": pipe.model_id, "settings": pipe.resolve(given).to_dict()}, options.out / "study.json")
        for at, job in missing:
            pipe(job[0], seed=options.seed + at, **given).save(options.out / file_name(*job))
            print(file_name(*job), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"vbench_frames: error: {describe(error)}")


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.vbench_frames", description=__doc__.splitlines()[0])
    parser.add_argument("prompts", metavar="VBench_full_info.json", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--model", type=Path, help="default: the embedded model, which knows none of these prompts")
    parser.add_argument("--dimension", action="append", help="only prompts of this dimension; repeatable")
    parser.add_argument(
        "--samples", type=int, help=f"videos for each prompt (default {SAMPLES}; {FLICKERING_SAMPLES} for flickering)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only count")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first video; video n of the list has seed + n")
    parser.add_argument("--preset", metavar="exact|recommended")
    parser.add_argument("--leap", type=lambda text: int(text) if text.isdigit() else text)
    for name, kind in (("num-steps", int), ("merge-steps", int), ("plan", Path), ("num-frames", str), ("dtype", str)):
        parser.add_argument(f"--{name}", type=kind)
    for name, kind in (("height", int), ("width", int), ("resolution", str), ("aspect-ratio", str)):
        parser.add_argument(f"--{name}", type=kind)
    return parser.parse_args()


def read_list(path: Path) -> list[dict[str, Any]]:
    """Returns VBench's entries: ``prompt_en`` and the ``dimension`` list each of them serves.

    Raises:
      ValueError: the file is something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry["prompt_en"], str) and isinstance(entry["dimension"], list) for entry in entries):
            raise TypeError("prompt_en or dimension of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not VBench's list of prompts ({error}); expected VBench_full_info.json.") from error
    return entries


def videos(
    entries: Sequence[dict[str, Any]], dimensions: Sequence[str] | None, samples: int | None
) -> Iterator[tuple[str, int]]:
    """Yields (prompt, number) of every video, each once.

    Raises:
      ValueError: a dimension is not in the list, or a prompt cannot be a file name.
    """
    known = {dimension for entry in entries for dimension in entry["dimension"]}
    strange = sorted(set(dimensions or ()) - known)
    if strange:
        raise ValueError(f"dimension {strange[0]!r} is not in the list; expected of {', '.join(sorted(known))}.")
    counts: dict[str, int] = {}
    for entry in entries:
        serves = set(entry["dimension"]) & set(dimensions or known)
        if serves:
            wanted = samples or (FLICKERING_SAMPLES if "temporal_flickering" in serves else SAMPLES)
            counts[entry["prompt_en"]] = max(wanted, counts.get(entry["prompt_en"], 0))
    for prompt, count in counts.items():
        if any(character in prompt for character in _FORBIDDEN):
            raise ValueError(f"prompt {prompt!r} cannot be a file name, which VBench's convention asks for.")
        for number in range(count):
            yield prompt, number


def file_name(prompt: str, number: int) -> str:
    """Returns the name by which VBench looks for a video."""
    return f"{prompt}-{number}.mp4"


if __name__ == "__main__":
    main()
