"""Samplings on meshes of eight virtual devices against the same on one: a process of its own, as devices are counted at start.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.devices.meshes NAME...

prints one JSON object a case of `CASES`; ``MESH:OPTION`` names any pair of the product.  Weights are random, of a toy width;
latents are compared before they are decoded.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sora_jax.config import STDiT3Config
from sora_jax.devices.axes import parse_axes
from sora_jax.devices.mesh import make_mesh, place, place_parameters
from sora_jax.networks import registry
from sora_jax.networks.merging import Merge
from sora_jax.pipeline import open_model
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.velocity import Velocity
from sora_jax.planning.compiled_text import CompiledText
from sora_jax.process import Timings
from sora_jax.sampling import sampler as compiled
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan
from sora_jax.sampling.sampler import Result, Sampler, finish
from sora_jax.sampling.schedule import Schedule
from sora_jax.sampling.velocity import opened
from sora_jax.storage.checkpoint import flatten, unflatten
from sora_jax.storage.quantisation import dequantise, is_quantised, quantise
from tests.support.tiny_model import CONFIG, random_flat, write_model

STEPS, WIDTH_PX, HEIGHT_PX = 6, 80, 48
MESHES = (
    "data=2",
    "guidance=2",
    "sequence=2",
    "sequence=4",
    "sequence=8",
    "guidance=2,sequence=4",
    "data=2,guidance=2,sequence=2",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What is sampled: options of the sampler, latent frames and cells, and how weights are stored."""

    sampler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    merge: Merge = dataclasses.field(default=Merge())
    frames: int = 4
    cells: tuple[int, int] = (4, 8)  # 8 places
    stored: str = "float32"


OPTIONS: Mapping[str, Option] = {
    "plain": Option(),
    "dynamic leap": Option(sampler={"leap": Leap.dynamic()}),
    "merging": Option(sampler={"merge_steps": 3}),
    "merged keys and values": Option(sampler={"merge_steps": 3}, merge=Merge(keys_values_only=True)),
    "reuse plan with half steps": Option(sampler={"plan": Plan(codes=(0, 1, 2, 1, 0, 2))}),
    "frame weights": Option(sampler={"frame_weights": np.array([[0, 1, 0.5, 1], [1, 1, 1, 1]], np.float32)}),
    "heun": Option(sampler={"solver": "heun"}),
    "image": Option(frames=1),
    "odd frames, uneven places": Option(frames=5, cells=(6, 10)),  # 15 places
    "int8 weights": Option(stored="int8"),
    "bfloat16 weights": Option(stored="bfloat16"),
}
# Every mesh and every option at least once, several options of which can be had together.
CASES: Mapping[str, tuple[str, Option, str]] = {
    "data=2, int8 weights": ("data=2", OPTIONS["int8 weights"], "replicated"),
    "guidance=2, heun": ("guidance=2", OPTIONS["heun"], "replicated"),
    "sequence=2, odd frames merged, uneven places": (
        "sequence=2",
        dataclasses.replace(OPTIONS["merging"], frames=5, cells=(6, 10)),
        "replicated",
    ),
    "sequence=4, merged keys and values": ("sequence=4", OPTIONS["merged keys and values"], "replicated"),
    "sequence=8, dynamic leap, image, bfloat16 weights": (
        "sequence=8",
        dataclasses.replace(OPTIONS["dynamic leap"], frames=1, stored="bfloat16"),
        "replicated",
    ),
    "guidance=2, sequence=4, frame weights": ("guidance=2,sequence=4", OPTIONS["frame weights"], "replicated"),
    "all three, plan, spread": ("data=2,guidance=2,sequence=2", OPTIONS["reuse plan with half steps"], "spread"),
    "guidance=2, sequence=4, plain": ("guidance=2,sequence=4", OPTIONS["plain"], "replicated"),
}


def weights_of(option: Option, config: STDiT3Config) -> dict[str, np.ndarray]:
    """Returns random parameters by flat name, as a model stored in the option's dtype has them in memory."""
    flat = random_flat("stdit3", config)
    if option.stored == "int8":
        return {name: dequantise(name, *quantise(name, x)) if is_quantised(name, x.shape) else x for name, x in flat.items()}
    return {name: x.astype(jax.numpy.dtype(option.stored)) for name, x in flat.items()}


@contextlib.contextmanager
def sampled(
    option: Option, axes: str | None, weights: str = "replicated", config: STDiT3Config = CONFIG.stdit3
) -> Iterator[tuple[Sampler, jax.Array]]:
    """Yields the sampler of an option on a mesh, or on one device, and its noise."""
    used = 1 if axes is None else int(np.prod(list(parse_axes(axes).values())))
    mesh = None if axes is None else _mesh_of(axes, used)
    put = jax.numpy.asarray if mesh is None else lambda x: place(x, mesh)
    flat = weights_of(option, config)
    abstract = registry.abstract("stdit3", config)
    rng = np.random.default_rng(1)
    if mesh is None:
        network = unflatten(abstract, {name: put(x) for name, x in flat.items()})
    else:
        placed = place_parameters(flat, mesh, weights)
        network = jax.tree.unflatten(jax.tree.structure(abstract), [placed[name] for name in flatten(abstract)])
    mask_BL = np.arange(12) < np.array([[12], [7]])
    velocity = Velocity(
        network=network,
        caption_RLE=put(rng.standard_normal((4, 12, CONFIG.stdit3.caption_channels)).astype(np.float32)),
        mask_BL=put(mask_BL),
        fps=put(np.array([8], np.float32)),
        height_px=put(np.array([HEIGHT_PX], np.float32)),
        width_px=put(np.array([WIDTH_PX], np.float32)),
        merge=option.merge,
    )
    z = rng.standard_normal((2, option.frames, *option.cells, CONFIG.stdit3.in_channels)).astype(np.float32)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        schedule = Schedule.open_sora(STEPS, height_px=HEIGHT_PX, width_px=WIDTH_PX, num_frames=17)
        yield Sampler.create(velocity, schedule, guidance=3.0, **option.sampler), put(z)


def _mesh_of(axes: str, used: int) -> jax.sharding.Mesh:
    sizes = {name: size for name, size in parse_axes(axes).items() if size > 1}
    return make_mesh(jax.sharding.Mesh(np.array(jax.devices()[:used]).reshape(list(sizes.values())), tuple(sizes)))


def result_of(sampler: Sampler, z: jax.Array) -> Result:
    """Returns the result of all steps, each of them a call of the one program."""
    *_, last = sampler.steps(z)
    return finish(last)


_ALONE: dict[int, Result] = {}


def _alone(option: Option) -> Result:
    """Returns what one device makes, computed once a process."""
    if id(option) not in _ALONE:
        with sampled(option, None) as (sampler, z):
            _ALONE[id(option)] = result_of(sampler, z)
    return _ALONE[id(option)]


def compared(axes: str, option: Option, weights: str) -> dict[str, Any]:
    """Returns how a sampling on a mesh differs from the one on one device, and its program."""
    alone = _alone(option)
    with sampled(option, axes, weights) as (sampler, z):
        before = compiled._run._cache_size()
        result = result_of(sampler, z)
        programs = compiled._run._cache_size() - before
    expected, got = (np.asarray(each.z, np.float64) for each in (alone, result))
    return {
        "error": float(np.linalg.norm(got - expected) / np.linalg.norm(expected)),
        "evaluations": [result.evaluations_B.tolist(), alone.evaluations_B.tolist()],
        "leapt": bool((result.trace.leapt_NB == alone.trace.leapt_NB).all()),
        "programs": programs,
    }


def evaluation() -> dict[str, Any]:
    """Returns the collectives of one plain evaluation of two pairs of blocks, compiled as users have it, and what they move."""
    config = dataclasses.replace(CONFIG.stdit3, depth=2)
    mesh = _mesh_of("guidance=2,sequence=4", 8)
    with sampled(OPTIONS["odd frames, uneven places"], "guidance=2,sequence=4", config=config) as (sampler, z):
        velocity = opened(sampler.velocity)

        def evaluate(velocity: Any, z: jax.Array) -> jax.Array:
            return velocity.evaluate(jax.numpy.tile(z, (2, 1, 1, 1, 1)), jax.numpy.ones(4), frame_mask_BT=None, merged=False)

        text = CompiledText(jax.jit(evaluate).lower(velocity, z).compile().as_text())
    found = {one.kind: [one.number, one.nbytes] for one in text.collectives()}
    return {"collectives": found, "devices": mesh.size, "frames": 5, "places": 15, "width": config.hidden_size}


def spread() -> dict[str, Any]:
    """Returns where the sampler fetches spread weights: how many gatherings stand in its loop over steps, and before it."""
    with sampled(OPTIONS["plain"], "guidance=2,sequence=4", "spread") as (sampler, z):
        text = compiled._run.lower(sampler, sampler.start(z), np.int32(STEPS)).compile().as_text()
    before = text[text.index("\nENTRY ") :]
    everywhere, entry = (len(re.findall(r"\ball-gather(?:-start)?\(", part)) for part in (text, before))
    return {"in the loop": everywhere - entry, "before": entry}


def coders() -> dict[str, Any]:
    """Returns how captions, encoded and decoded videos on eight devices differ from those on one, and all collectives there."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        alone, spread = (Pipeline.from_pretrained(folder, mesh=mesh).networks for mesh in (None, "data=2,sequence=4"))
        rng = np.random.default_rng(0)
        video = rng.uniform(-1, 1, (2, 20, 32, 48, 3)).astype(np.float32)  # a whole chunk and a short one
        ids = rng.integers(1, 50, (3, 12)).astype(np.int32)
        mask = np.ones((3, 12), bool)
        results, counted = [], []
        compile_program = open_model._compiled.__wrapped__

        def counting(*key: Any) -> Any:
            executable = compile_program(*key)
            counted.append(sum(one.number for one in CompiledText(executable.as_text()).collectives()))
            return executable

        open_model._compiled = counting
        for networks in (alone, spread):
            coder = Coders(networks, "float32", Timings(), None)
            (latents,) = coder.encode_videos([video])
            decoded = [coder.decode(latents, 20), coder.decode(latents, 20, [0, 4, 16, 19])]
            results.append([coder.encode_text(ids, mask), latents, *decoded])
    errors = [float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) for expected, got in zip(*results, strict=True)]
    shapes = [[list(x.shape) for x in one] for one in results]
    return {"errors": errors, "shapes": shapes, "collectives": counted}


TOLD: Mapping[str, Callable[[], dict[str, Any]]] = {"evaluation": evaluation, "spread": spread, "coders": coders}


def main(names: list[str]) -> None:
    """Prints what is named: a case, a name of `TOLD`, or any other pair as MESH:OPTION[:WEIGHTS]."""
    for name in names:
        if name in TOLD:
            outcome = TOLD[name]()
        else:
            mesh, _, rest = name.partition(":")
            option, _, weights = rest.partition(":")
            outcome = compared(*(CASES[name] if name in CASES else (mesh, OPTIONS[option], weights or "replicated")))
        sys.stdout.write(json.dumps({"case": name, **outcome}) + "\n")


if __name__ == "__main__":
    if os.environ.get("MESH_LITTLE_OPTIMISED"):
        jax.config.update("jax_disable_most_optimizations", True)
    main(sys.argv[1:] or list(CASES))
