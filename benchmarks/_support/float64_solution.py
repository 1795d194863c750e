"""The flow of a model, solved adaptively in float64 in a process of its own.

Command:  python -m benchmarks._support.float64_solution MODEL_DIR FOLDER --tolerances 1e-6 1e-7

Reads FOLDER/problem.npz (noise and conditions of one prompt), writes FOLDER/solutions.npz: the final latents of every tolerance
in turn, and how many steps each took; goes on where an interrupted run stopped.

The networks name float32 for statistics, angles and sums.  Here that name means float64 before they are imported, so that a
velocity is float64 throughout; frequencies of sinusoids keep their float32 values, which are numbers of the model.
"""
# ruff: noqa: E402 (what float32 means is settled before the networks are imported)

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import numpy as np

jnp.float32 = jnp.float64

import diffrax

from sora_jax.config import DTypePolicy
from sora_jax.networks import registry
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.pipeline.velocity import Velocity
from sora_jax.storage.checkpoint import load_network, unflatten

MOST_STEPS = 4096
FLOAT64 = DTypePolicy(param=np.float64, compute=np.float64)


def main() -> None:
    """Solves at every tolerance that is asked for and not solved yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks._support.float64_solution", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerances", type=float, nargs="+", required=True)
    options = parser.parse_args()
    path = options.folder / "solutions.npz"
    known = dict(np.load(path)) if path.exists() else {}
    problem = np.load(options.folder / "problem.npz")
    solve = solver_of(options.model, problem)
    for tolerance in options.tolerances:
        if f"z_{tolerance:g}" in known:
            continue
        began = time.perf_counter()
        solution = solve(jnp.asarray(tolerance))
        if solution.result != diffrax.RESULTS.successful:
            print(f"tolerance {tolerance:g}: more than {MOST_STEPS} steps", file=sys.stderr, flush=True)
            break
        known[f"z_{tolerance:g}"] = np.asarray(solution.ys[0])
        known[f"steps_{tolerance:g}"] = np.asarray(solution.stats["num_steps"])
        np.savez(path, **known)
        seconds = time.perf_counter() - began
        print(f"tolerance {tolerance:g}: {int(known[f'steps_{tolerance:g}'])} steps, {seconds:.0f} s", flush=True)


def solver_of(model: Path, problem: Any) -> Any:
    """Returns a function from a tolerance to diffrax's solution from noise to data, by Dormand and Prince's order 8."""
    config, flat = load_network(model, "stdit3")
    abstract = registry.abstract("stdit3", config, policy=FLOAT64)
    network: STDiT3 = unflatten(abstract, {name: np.asarray(value, np.float64) for name, value in flat.items()})
    conditions = {name: jnp.asarray(problem[name]) for name in ("mask_BL", "fps", "height_px", "width_px")}
    velocity = Velocity(network=network, caption_RLE=jnp.asarray(problem["caption_RLE"], jnp.float64), **conditions)
    scale = None if problem["guidance"] == 1 else float(problem["guidance"])

    def slope(time: jax.Array, z: jax.Array, velocity: Velocity) -> jax.Array:
        """Returns dz/ds, where s = 1 - t runs from noise to data."""
        t = 1000 * (1 - time)
        if scale is None:
            return velocity.evaluate(z, t[None])
        conditional, unconditional = velocity.evaluate(jnp.concatenate([z, z]), jnp.stack([t, t]))[:, None]
        return unconditional + scale * (conditional - unconditional)

    @jax.jit
    def solve(tolerance: jax.Array, velocity: Velocity) -> diffrax.Solution:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(slope),
            diffrax.Dopri8(),
            t0=0.0,
            t1=1.0,
            dt0=0.01,
            y0=jnp.asarray(problem["z"], jnp.float64),
            args=velocity,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            max_steps=MOST_STEPS,
            throw=False,
        )

    return lambda tolerance: solve(tolerance, velocity)


if __name__ == "__main__":
    main()
