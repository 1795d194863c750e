"""How far is every solver from the flow itself?  Against an adaptive solution by diffrax, in float64.

Command:  python -m benchmarks.quality.solver_oracle --work oracle [MODEL_DIR] [--prompts 3]
Needs:    diffrax (the test extra); any model directory, its prompts one a line (--prompt-file).
Writes:   OUT, a JSON file; WORK holds the adaptive solutions, from which an interrupted run goes on.
Expect:   a few hundred evaluations in float64 for each tolerance, a quarter of an hour for each prompt of the embedded model
          on two cores.
Rival:    Dormand and Prince's method of order 8 with adaptive steps.

Halving test: the adaptive solution is computed at falling tolerances; the distance of each from the tightest says how far it
is trusted.  Distances are ``-20 log10(|z - exact| / |exact|)`` of the final latents in dB; the sampler computes in float32.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks._support.machine import environment, write_report
from benchmarks._support.study_clips import read_prompts
from sora_jax.pipeline.make_sampler import make_sampler
from sora_jax.pipeline.model_file import POCKET
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Generation
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.velocity import Velocity
from sora_jax.process import Timings
from sora_jax.sampling.schedule import resolution_shift
from sora_jax.sampling.solvers import SOLVERS

RESULTS = Path(__file__).parents[1] / "results" / "solver_oracle.json"
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
EVALUATIONS = (16, 24, 32, 48, 64)
TOTAL_SHIFTS = (1.6, 2.4)


def main() -> None:
    """Solves, samples, compares, prints and writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.solver_oracle", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--work", type=Path, required=True, help="folder of the adaptive solutions; the run goes on from it")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-file", type=Path, help="one prompt a line (default: captions of the embedded model)")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise")
    parser.add_argument("--num-frames", help="default: the model's")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    pipeline = Pipeline.from_pretrained(options.model)
    settings = pipeline.resolve({"preset": "exact", "seed": options.seed, "num_frames": options.num_frames})
    texts = [prompt.text for prompt in read_prompts(options.prompt_file, options.prompts, options.seed)]
    generation = Generation(pipeline.networks, pipeline.tokenizer, settings, Timings(), None)
    captions, mask, z, _ = generation.prepare(pipeline.read(texts, settings))
    rows: list[dict[str, Any]] = []
    halvings = []
    with generation.transformer() as stdit3:
        for i in range(len(texts)):
            velocity = generation.velocity(stdit3, captions[i : i + 1], mask[i : i + 1])
            noise = jnp.asarray(z[i : i + 1])
            folder = options.work / f"prompt{i}"
            solutions = solved(options.model or POCKET, folder, velocity, noise, settings, options.tolerances)
            halvings.append(halving(solutions))
            exact = solutions[min(solutions)][0]
            for name, count, ways in methods(settings):
                sampler = make_sampler(velocity, ways)
                reached = np.asarray(sampler.run(sampler.start(noise), ways.num_steps).z)
                rows.append({"name": name, "evaluations": count, "prompt": i, "error_db": closeness(reached, exact)})
    report = {
        "command": " ".join(["python -m benchmarks.quality.solver_oracle --work oracle", *said(options)]),
        "model": pipeline.model_id,
        "settings": {name: getattr(settings, name) for name in ("guidance", "seed", "num_frames", "height", "width", "fps")},
        "environment": environment(),
        "prompts": texts,
        "adaptive": halvings,
        "methods": summarised(rows),
    }
    write_report(report, options.out, show=True)


def said(options: argparse.Namespace) -> list[str]:
    """Returns the options that decide the figures, as they are written."""
    words = [f"--prompts {options.prompts}"]
    words += [f"--num-frames {options.num_frames}"] if options.num_frames else []
    tolerances = " ".join(f"{one:g}" for one in options.tolerances)
    return words + ([f"--tolerances {tolerances}"] if tuple(options.tolerances) != TOLERANCES else [])


def solved(
    model: Path, folder: Path, velocity: Velocity, noise: Any, settings: Settings, tolerances: Any
) -> dict[float, tuple[np.ndarray, int]]:
    """Returns the adaptive solutions and their numbers of steps, by tolerance, computed in a process of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {
        name: np.asarray(getattr(velocity, name)) for name in ("caption_RLE", "mask_BL", "fps", "height_px", "width_px")
    }
    problem = {**conditions, "z": np.asarray(noise), "guidance": np.asarray(settings.guidance)}
    path = folder / "problem.npz"
    if path.exists() and any(not np.array_equal(value, problem[name]) for name, value in np.load(path).items()):
        raise SystemExit(f"solver_oracle: error: {path} is of another model or other settings; choose another --work.")
    np.savez(path, **problem)
    child = [sys.executable, "-m", "benchmarks._support.float64_solution", str(model), str(folder), "--tolerances"]
    subprocess.run([*child, *map(str, tolerances)], check=True)
    known = dict(np.load(folder / "solutions.npz"))
    return {one: (known[f"z_{one:g}"], int(known[f"steps_{one:g}"])) for one in tolerances if f"z_{one:g}" in known}


def halving(solutions: dict[float, tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
    """Returns for every tolerance how close its solution comes to the tightest one's."""
    tightest = solutions[min(solutions)][0]
    return [
        {
            "tolerance": tolerance,
            "steps": steps,
            "error_db": None if tolerance == min(solutions) else closeness(z, tightest),
        }
        for tolerance, (z, steps) in solutions.items()
    ]


def methods(settings: Settings) -> Iterator[tuple[str, int, Settings]]:
    """Yields name, evaluations and settings of 200 Euler steps and of every solver, at shifts in all."""
    own = float(resolution_shift(height_px=settings.height, width_px=settings.width, num_frames=settings.num_frames))
    yield "euler, own times", 200, dataclasses.replace(settings, num_steps=200)
    for total in TOTAL_SHIFTS:
        moved = dataclasses.replace(settings, shift=total / own)
        yield f"ab2, shift {total:g}", 128, dataclasses.replace(moved, num_steps=128, solver="ab2")
        yield f"euler, shift {total:g}", 200, dataclasses.replace(moved, num_steps=200)
        for solver in SOLVERS:
            for count in EVALUATIONS:
                steps = count // 2 if solver == "heun" else count  # heun's last step evaluates once
                yield f"{solver}, shift {total:g}", count, dataclasses.replace(moved, num_steps=steps, solver=solver)


def closeness(z: np.ndarray, exact: np.ndarray) -> float:
    """Returns by how many dB the distance lies below the size of the exact latents."""
    return round(-20 * float(np.log10(np.linalg.norm(z - exact) / np.linalg.norm(exact))), 3)


def summarised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each method and number of evaluations: errors by prompt, and their median."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["evaluations"]), []).append(row["error_db"])
    return [
        {"name": name, "evaluations": count, "median_db": round(float(np.median(errors)), 3), "error_db": errors}
        for (name, count), errors in groups.items()
    ]


if __name__ == "__main__":
    main()
