"""Whole samplings against the PyTorch reference, on the STDiT3 of the folder beside this one.

Invariant: every per-step record is read from the sampler's carry, one step at a time; the only numbers taken from a
fixture besides its inputs are the recorded noise draws, which no other generator can repeat.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sora_jax.networks.merging import Merge
from sora_jax.pipeline.velocity import Velocity
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.schedule import Schedule
from tests.parity import limits, stdit3
from tests.parity.fixtures import read_json, read_tensors

_TIMES = "timesteps"


def cases(folder: Path) -> dict[str, Path]:
    config = read_json(folder / "config.json")
    names = [*config["cases"], *config.get("ods_cases", {})]
    return {_TIMES: folder / f"{_TIMES}.json", **{name: folder / f"{name}.safetensors" for name in names}}


def check(folder: Path, case: str) -> list[str]:
    """Returns one line for every row of timesteps.json that differs; rows of bfloat16 sizes are emulated."""
    table = read_json(folder / f"{case}.json")["table"]
    differences = [] if table else [f"{case}.json holds nothing to compare"]
    for row in table:
        expected = np.asarray(row["timesteps"])
        visited = _schedule(row, row["num_frames"], size_dtype=getattr(ml_dtypes, row["info_dtype"], np.float32)).visited
        if not limits.compare(visited, expected, limits.limit_for("rflow", case, "out.timesteps")).passed:
            wanted = {key: value for key, value in row.items() if key != "timesteps"}
            differences.append(f"{wanted}: got {visited[:4]}, expected {expected[:4]}")
    return differences


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    tensors = read_tensors(folder / f"{case}.safetensors")
    config = read_json(folder / "config.json")
    entry = {**config["cases"], **config.get("ods_cases", {})}[case]
    sampler = _sampler(folder, entry, tensors)
    carries = list(sampler.steps(jnp.asarray(np.moveaxis(tensors["in.z"], 1, -1))))
    times = carries[-1].trace.time_N[: len(carries)]
    computed = {
        "out.timesteps": np.repeat(np.asarray(times)[:, None], len(tensors["in.z"]), axis=1),
        "out.v": np.stack([_channels_second(carry.v) for carry in carries]),
        "out.z_in": np.stack([_channels_second(carry.z_in) for carry in carries]),
        "out.z_after": np.stack([_channels_second(carry.z) for carry in carries]),
        "out.final": _channels_second(carries[-1].z),
    }
    if carries[-1].active_BT is not None:
        computed["out.x_mask"] = np.stack([np.asarray(carry.active_BT) for carry in carries])
        computed["out.noise"] = tensors["out.noise"]
    if "out.pred0" in tensors:
        computed["out.pred0"] = _first_prediction(sampler, tensors["in.z"], times[0])
    return {key: computed[key] for key in tensors if key in computed}


def _sampler(folder: Path, entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> Sampler:
    network = stdit3.load_network(folder.parent / "stdit3")
    caption_BLE = jnp.asarray(tensors["in.y"][:, 0])
    null_BLE = jnp.broadcast_to(network.null_caption_LE, caption_BLE.shape)
    merge_steps = entry.get("merge_steps")
    velocity = Velocity(
        network=network,
        caption_RLE=jnp.concatenate([caption_BLE, null_BLE]),
        mask_BL=jnp.asarray(tensors["in.mask"] != 0),
        fps=jnp.asarray(tensors["in.arg.fps"]),
        height_px=jnp.asarray(tensors["in.arg.height"]),
        width_px=jnp.asarray(tensors["in.arg.width"]),
        merge=Merge(odd="released"),
    )
    return Sampler.create(
        velocity,
        _schedule(entry, int(tensors["in.arg.num_frames"][0])),
        guidance=entry["cfg_scale"],
        leap=_leap(entry),
        merge_steps=merge_steps or None,
        frame_weights=tensors.get("in.frame_mask"),
        noise_per_step=None if "out.noise" not in tensors else np.moveaxis(tensors["out.noise"], 2, -1),
    )


def _leap(entry: dict[str, Any]) -> Leap | None:
    if entry.get("lpl") == "dynamic":
        return Leap.released()
    index = entry.get("lpl", entry.get("leap_index"))
    return None if index is None else Leap.static(index)


def _schedule(entry: dict[str, Any], num_frames: int, size_dtype: Any = np.float32) -> Schedule:
    return Schedule.open_sora(
        entry["num_sampling_steps"],
        height_px=entry["height"],
        width_px=entry["width"],
        num_frames=num_frames,
        transform=entry["use_timestep_transform"],
        discrete=entry["use_discrete_timesteps"],
        size_dtype=size_dtype,
    )


def _first_prediction(sampler: Sampler, z_BCTHW: np.ndarray, t: jax.Array) -> np.ndarray:
    """Returns both halves of the guided batch at the first step, before guidance joins them."""
    rows = jnp.tile(jnp.asarray(np.moveaxis(z_BCTHW, 1, -1)), (2, 1, 1, 1, 1))
    return _channels_second(jax.jit(Velocity.evaluate)(sampler.velocity, rows, jnp.full(len(rows), t)))


def _channels_second(value: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(value), -1, 1)
