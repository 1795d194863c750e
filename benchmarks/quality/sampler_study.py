"""How good is each way of sampling at equal numbers of evaluations?  Every method gets the same prompts and noise.

Command:  python -m benchmarks.quality.sampler_study --work study [MODEL_DIR] [--prompts 32 --seeds 1]         the grid
          python -m benchmarks.quality.sampler_study --work study --frontier --prompts 64 --seeds 2            its best methods
Needs:    any model directory, its prompts one a line (--prompt-file); the embedded model brings captions and a judge.
Writes:   WORK/clips.jsonl, one line a clip; OUT.json, OUT.md and two pictures at the end (--report writes them alone).
Expect:   three quarters of an hour for the grid of the embedded model on two cores.

A clip is compared with those of a fine solution and of 30 Euler steps from the same noise (PSNR, SSIM), judged against its
caption where the model is the embedded one (colour, shape, direction, speed), and measured for flicker and motion.  A model's
own recipes take part.  Programs are compiled once for each kind of method: number of steps, times, leaps and plans are values.

The study goes on where it stopped: existing latents and lines are reused.  Plans are calibrated on captions that
the study does not ask for.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._support import study_report
from benchmarks._support.study_clips import Prompt, References, calibration_prompts, read_lines, read_prompts, scores
from benchmarks._support.study_methods import FINE_REFERENCE, REFERENCE, Method, chosen, frontier, methods, recipes
from sora_jax.pipeline import video
from sora_jax.pipeline.make_sampler import make_sampler
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.run import Generation
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.velocity import Velocity
from sora_jax.process import Timings
from sora_jax.sampling.calibration import Calibration
from sora_jax.sampling.sampler import Carry
from sora_jax.shell import describe

RESULTS = Path(__file__).parents[1] / "results" / "sampler_study"
PICTURES = Path(__file__).parents[2] / "docs"
SEED_STRIDE = 1_000_003  # between the noises of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study: its prompts, its model, and the folder of its results."""

    pipeline: Pipeline
    settings: Settings
    prompts: Sequence[Prompt]
    seeds: int
    batch: int
    work: Path
    prompt_file: Path | None
    calibration_prompts: int

    def calibration(self, shift: float) -> Calibration:
        """The cost of reuse in 30 steps at shifted times, measured once on captions that the study does not use."""
        path = self.work / ("calibration.npz" if shift == 1 else f"calibration-shift{shift:g}.npz")
        if not path.exists():
            texts = calibration_prompts(self.prompt_file, len(self.prompts), self.calibration_prompts, self.settings.seed)
            generation = self.generation(seed=(self.settings.seed + SEED_STRIDE * 1000) % 2**32, shift=shift)
            samples = self.pipeline.read(texts, generation.settings)
            np.savez(path, error_NN=generation.calibrate(samples, "residual").error_NN)
        return Calibration(error_NN=np.load(path)["error_NN"], keep="residual")

    def sampled_by(self, method: Method) -> Settings:
        """Returns the settings of a method."""
        given = dict(method.changes)
        if method.calibrated is not None:
            given["plan"] = self.calibration(given.get("shift", 1.0)).plan(method.calibrated)
        return dataclasses.replace(self.settings, **given)

    @property
    def lines(self) -> Path:
        """The file of measured clips."""
        return self.work / "clips.jsonl"

    def generation(self, *, seed: int, shift: float = 1.0) -> Generation:
        """Returns the stages, with the noise of a seed."""
        settings = dataclasses.replace(self.settings, seed=seed, shift=shift)
        return Generation(self.pipeline.networks, self.pipeline.tokenizer, settings, Timings(), None)

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (noise, indices of prompts); a batch always begins at the same prompt, however many are asked."""
        for noise in range(self.seeds):
            for start in range(0, len(self.prompts), self.batch):
                yield noise, list(range(start, min(start + self.batch, len(self.prompts))))


def main() -> None:
    """Runs what the command line asks for; exits with one line where it cannot."""
    options = parse()
    try:
        study = opened(options)
        every = [*methods(), *recipes(study.pipeline.model)]
        if options.frontier:
            every = chosen(every, frontier_names(study))
        elif options.methods:
            every = chosen(every, [method.name for method in every if re.search(options.methods, method.name)])
        for noise, indices in () if options.report else study.batches():
            run_batch(study, every, noise, indices)
        study_report.write(read_lines(study.lines), options.out, about(study), options.pictures)
    except (ValueError, OSError) as error:
        sys.exit(f"sampler_study: error: {describe(error)}")


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sampler_study", description=__doc__.splitlines()[0])
    add_options(parser, out=RESULTS, prompts=32, batch=16)
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the pictures")
    parser.add_argument(
        "--calibration-prompts",
        type=int,
        default=8,
        help="number of calibration prompts: the lines of the file after those of the study",
    )
    parser.add_argument("--methods", metavar="REGEX", help="only methods whose name it finds; references always")
    parser.add_argument("--frontier", action="store_true", help="only the best methods of the lines so far")
    parser.add_argument("--report", action="store_true", help="write the report alone")
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser, *, out: Path, prompts: int, batch: int) -> None:
    """Adds the options that decide what a study samples and where it writes; `opened` reads them."""
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="default: the embedded model")
    parser.add_argument("--work", type=Path, required=True, help="folder of latents and lines; the run goes on from it")
    parser.add_argument("--out", type=Path, default=out, help="results, without suffix")
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--seeds", type=int, default=1, help="noises for each prompt")
    parser.add_argument("--prompt-file", type=Path, help="one prompt a line (default: captions of the embedded model)")
    parser.add_argument("--batch", type=int, default=batch, help="clips in a batch; keep the number when the run goes on")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, kind in (("guidance", float), ("num-frames", str), ("height", int), ("width", int)):
        parser.add_argument(f"--{name}", type=kind, help="default: the model's")
    parser.add_argument("--compile-cache", type=Path, help="folder of compiled programs")


def opened(options: argparse.Namespace) -> Study:
    """Returns the study, after checking that its folder belongs to the same one.

    Raises:
      ValueError: the folder holds lines of another study.
    """
    if options.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(options.compile_cache))
    pipeline = Pipeline.from_pretrained(options.model)
    names = ("seed", "guidance", "num_frames", "height", "width", "dtype")
    settings = pipeline.resolve({"preset": "exact", **{name: getattr(options, name) for name in names}})
    prompts = read_prompts(options.prompt_file, options.prompts, options.seed)
    batch = min(options.batch, len(prompts))
    study = Study(
        pipeline=pipeline,
        settings=settings,
        prompts=prompts,
        seeds=options.seeds,
        batch=batch,
        work=options.work,
        prompt_file=options.prompt_file,
        calibration_prompts=options.calibration_prompts,
    )
    of = {**about(study)["settings"], "model": pipeline.model_id, "batch": batch, "prompt_file": str(options.prompt_file)}
    (options.work / "latents").mkdir(parents=True, exist_ok=True)
    identity = options.work / "study.json"
    if not identity.exists():
        identity.write_text(json.dumps(of, indent=1) + "\n")
    if json.loads(identity.read_text()) != json.loads(json.dumps(of)):
        raise ValueError(f"{identity} is of another model or other settings; choose another --work, or the same options.")
    return study


def about(study: Study) -> dict[str, Any]:
    """Returns model and settings that all methods share."""
    names = ("guidance", "seed", "num_frames", "height", "width", "fps", "dtype")
    return {"model": study.pipeline.model_id, "settings": {name: getattr(study.settings, name) for name in names}}


def frontier_names(study: Study) -> list[str]:
    """Returns the best methods so far by likeness to either reference, those that the paper names, and the recommended."""
    grid = study_report.summarise(study_report.shared(read_lines(study.lines)))
    rows = [row for row in grid if row["name"] != FINE_REFERENCE]
    best = {name for kind in ("ssim_30", "ssim_fine", "psnr_30", "psnr_fine") for name in frontier(rows, kind)}
    return sorted(best | {"Euler 16", "LPL 16", "LPL dynamic", "AB2 16", "AB2 shift 4 16", "TDTM 15"})


def run_batch(study: Study, every: Sequence[Method], noise: int, indices: Sequence[int]) -> None:
    """Generates and measures the clips of some prompts by every method, except those measured already."""
    known = {(line["method"], line["prompt"], line["noise"]) for line in read_lines(study.lines)}
    missing = [method for method in every if any((method.name, i, noise) not in known for i in indices)]
    if not missing:
        return
    began = time.perf_counter()
    generation = study.generation(seed=(study.settings.seed + SEED_STRIDE * noise + indices[0]) % 2**32)
    folder = study.work / "latents" / f"noise{noise}-prompt{indices[0]:04d}-batch{study.batch}"
    folder.mkdir(exist_ok=True)
    wanted = chosen(every, [method.name for method in missing])
    if any(not latents_path(folder, method.name).exists() for method in wanted):
        filled = [*indices, *[indices[-1]] * (study.batch - len(indices))]  # so that nothing compiles anew
        denoise(study, generation, [study.prompts[i].text for i in filled], wanted, folder)
    pairs = zip(decoded(generation, folder, REFERENCE), decoded(generation, folder, FINE_REFERENCE), strict=True)
    references = [References.of(short, long) for short, long in pairs]
    for method in missing:
        frames = decoded(generation, folder, method.name)
        rows = [(row, i) for row, i in enumerate(indices) if (method.name, i, noise) not in known]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            measured = list(pool.map(functools.partial(scored, study, frames, references), rows))
        with np.load(latents_path(folder, method.name)) as record, study.lines.open("a") as file:
            for (row, i), found in zip(rows, measured, strict=True):
                line = {"method": method.name, "family": method.family, "prompt": i, "noise": noise, **sampled(record, row)}
                file.write(json.dumps(line | found) + "\n")
    print(
        f"noise {noise}, prompts from {indices[0]}: {len(missing)} methods in {time.perf_counter() - began:.0f} s", flush=True
    )


def scored(study: Study, frames: np.ndarray, references: Sequence[References], at: tuple[int, int]) -> dict[str, Any]:
    """Returns the measures of the clip in a row of the batch, which shows a prompt: ``at`` names both."""
    row, prompt = at
    return scores(frames[row], references[row], study.prompts[prompt].attributes)


def denoise(study: Study, generation: Generation, texts: Sequence[str], wanted: Sequence[Method], folder: Path) -> None:
    """Writes the latents of all methods that have none yet."""
    missing = [method for method in wanted if not latents_path(folder, method.name).exists()]
    captions, mask, z, _ = generation.prepare(study.pipeline.read(texts, generation.settings))
    with generation.networks.use("stdit3", generation.settings.dtype, generation.timings) as stdit3:
        velocity = generation.velocity(stdit3, captions, mask)
        needed = chosen(wanted, [method.name for method in missing])
        samplings = [(method, study.sampled_by(method)) for method in needed]
        for method, carry, seconds in trajectories(velocity, jnp.asarray(z), samplings):
            path = latents_path(folder, method.name)
            if not path.exists():
                keep(path, carry, seconds)
                print(f"  {method.name}: {float(carry.batch_evaluations):g} evaluations, {seconds:.1f} s", flush=True)


def trajectories(
    velocity: Velocity, z: jax.Array, samplings: Sequence[tuple[Method, Settings]]
) -> Iterator[tuple[Method, Carry, float]]:
    """Yields each method's final state and the seconds it took, without compiling and without the steps before its fork."""
    forks: dict[tuple[str, int], Carry] = {}
    stops = {method.fork for method, _ in samplings if method.fork}
    for method, settings in samplings:
        sampler = make_sampler(velocity, settings)
        carry = forks[method.fork] if method.fork else sampler.start(z)
        carry = jax.block_until_ready(sampler.run(carry, 0))  # compiles
        began = time.perf_counter()
        for step in sorted(step for name, step in stops if name == method.name):
            carry = forks[method.name, step] = sampler.run(carry, step)
        carry = jax.block_until_ready(sampler.run(carry, settings.num_steps))
        yield method, carry, time.perf_counter() - began


def latents_path(folder: Path, name: str) -> Path:
    """Returns where the latents of a method lie."""
    return folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}.npz"


def keep(path: Path, carry: Carry, seconds: float) -> None:
    """Writes latents and the record of a sampling, whole or not at all."""
    taken = int(carry.step)
    leapt_NB = np.asarray(carry.trace.leapt_NB)[:taken]
    ended_NB = np.cumsum(leapt_NB, axis=0) - leapt_NB > 0
    temporary = path.with_suffix(".partial.npz")
    np.savez(
        temporary,
        z=np.asarray(carry.z),
        evaluations_B=np.asarray(carry.evaluations_B),
        cosine_NB=np.where(ended_NB, np.nan, np.asarray(carry.trace.cosine_NB)[:taken]),
        leap_B=np.where(leapt_NB.any(0), leapt_NB.argmax(0), -1),
        seconds=seconds,
    )
    temporary.replace(path)


def sampled(record: Mapping[str, np.ndarray], row: int) -> dict[str, Any]:
    """Returns what a clip's sampling took: evaluations, seconds of its batch, the step that leapt, cosines of the steps."""
    out: dict[str, Any] = {"evaluations": float(record["evaluations_B"][row]), "seconds": round(float(record["seconds"]), 3)}
    if record["leap_B"][row] >= 0:
        out["leap"] = int(record["leap_B"][row])
    cosine_N = record["cosine_NB"][:, row]
    return out | {"cosine": [round(float(value), 6) if np.isfinite(value) else None for value in cosine_N]}


def decoded(generation: Generation, folder: Path, name: str) -> np.ndarray:
    """Returns the clips of a method, uint8 [B, t, h, w, 3]."""
    with np.load(latents_path(folder, name)) as record:
        return video.quantise(generation.decode(record["z"]))


if __name__ == "__main__":
    main()
