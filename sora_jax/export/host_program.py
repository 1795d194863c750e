"""The host program of an exported model: token ids in, frames out, from the manifest and the artefacts alone.

What a phone's host program does, in NumPy: it keeps one dictionary of named arrays, loads stages in the manifest's order, runs
them, lets them go, and does the loop's arithmetic (guidance, steps, leap) itself.

Invariant: every number comes from ``manifest.json``; no configuration, network or checkpoint of this package is read.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from sora_jax.export import manifest as manifests
from sora_jax.export.targets import Runner, target_module

TINY = 1e-8

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run made: frames in [-1, 1] (not clipped), latents, and the number of velocity evaluations."""

    frames_Bthw3: Float[np.ndarray, "B t h w 3"]
    latents_BTHWC: Float[np.ndarray, "B T H W C"]
    evaluations: int


class ExportedModel:
    """An exported folder, opened.

    ``keep`` keeps stages loaded between steps; without it every stage is let go where the manifest says it may be.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: bool = True):
        self.folder, self.keep = Path(folder), keep
        self.manifest = manifests.read(self.folder)
        self.target = target_module(self.manifest["target"])
        self.stages = {stage["name"]: stage for stage in self.manifest["stages"]}
        self.loaded: dict[tuple[str, str], Runner] = {}

    def __call__(
        self,
        ids_BL: Int[np.ndarray, "B L"],
        mask_BL: np.ndarray,
        noise_BTHWC: Float[np.ndarray, "B T H W C"],
        *,
        size: str | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        merge_steps: int | None = None,
        leap: Mapping[str, Any] | None = None,
        frame_mask_BT: Float[np.ndarray, "B T"] | None = None,
        loop: Literal["stages", "sampler"] = "stages",
    ) -> Result:
        """Returns the video of padded token ids and their mask (1 real), from standard normal noise.

        Args:
          ids_BL: token ids, padded to the manifest's length.
          mask_BL: 1 where a token is real.
          noise_BTHWC: of the size's latent shape.
          size: key of one of the manifest's sizes; None: the first.
          num_steps: in place of the manifest's, as are the others.
          guidance: scale.
          merge_steps: first steps that use merged functions.
          leap: the manifest's entry with some fields replaced, for example ``{"mode": "static", "index": 20}``.
          frame_mask_BT: 1 where a latent frame is sampled, 0 where it stays as ``noise_BTHWC`` has it (see `encode`).
          loop: ``sampler`` runs the whole loop as one program, where the manifest has one.

        Raises:
          ValueError: the manifest has no such size, phase or sampler, frames cannot be given, or a value is out of range.
        """
        if loop not in ("stages", "sampler"):
            raise ValueError(f"loop is {loop!r}; expected stages or sampler.")
        at = self._size(size)
        sampling = self._sampling(num_steps, guidance, merge_steps, leap)
        values: Values = {"ids_BL": np.asarray(ids_BL, np.int32), "mask_BL": np.asarray(mask_BL, np.float32)}
        values |= {name: np.full(len(values["ids_BL"]), value, np.float32) for name, value in at["conditions"].items()}
        values = self._phase("text", at["key"], values)
        values["frame_mask_BT"] = self._frame_mask(frame_mask_BT, noise_BTHWC.shape[:2], loop)
        sample = self._sample if loop == "stages" else self._sample_resident
        z, evaluations = sample(at, np.asarray(noise_BTHWC, np.float32), values, sampling)
        return Result(frames_Bthw3=self.decode(z, at["key"]), latents_BTHWC=z, evaluations=evaluations)

    def decode(self, z_BTHWC: Float[np.ndarray, "B T H W C"], size: str | None = None) -> Float[np.ndarray, "B t h w 3"]:
        """Returns the frames of latents: chunk by chunk, then frame by frame."""
        at = self._size(size)
        frames, start = [], 0
        for chunk in at["chunks"]:
            given = {"z_BTHWC": z_BTHWC[:, start : start + chunk["latents"]]}
            x_BtHWC = self._phase("decode_chunk", at["key"], given, chunk["variant"])["x_BtHWC"]
            start += chunk["latents"]
            self._end_phase("decode_chunk")
            each = np.split(x_BtHWC, chunk["frames"], axis=1)
            frames += [self._phase("decode_frame", at["key"], {"x_BtHWC": x})["frames_Bthw3"] for x in each]
        self._end_phase("decode_frame")
        return np.concatenate(frames, axis=1).astype(np.float32)

    def encode(self, frames_Bthw3: Float[np.ndarray, "B t h w 3"], size: str | None = None) -> Float[np.ndarray, "B T H W C"]:
        """Returns the latents of an image (one frame), or of a clip of the size's length, in [-1, 1]."""
        at = self._size(size)
        chunks: list[dict[str, Any]] = at["chunks"] if frames_Bthw3.shape[1] > 1 else [{"frames": 1, "variant": "frames_1"}]
        latents, start = [], 0
        for chunk in chunks:
            each = np.split(frames_Bthw3[:, start : start + chunk["frames"]], chunk["frames"], axis=1)
            x = [self._phase("encode_frame", at["key"], {"frames_Bthw3": frame})["x_BtHWC"] for frame in each]
            given = {"x_BtHWC": np.concatenate(x, axis=1)}
            latents.append(self._phase("encode_chunk", at["key"], given, chunk["variant"])["z_BTHWC"])
            start += chunk["frames"]
        self._end_phase("encode_frame")
        self._end_phase("encode_chunk")
        return np.concatenate(latents, axis=1).astype(np.float32)

    def velocity(
        self, z_BTHWC: np.ndarray, time: float, values: Values, *, guidance: float, merged: bool, size: str | None = None
    ) -> np.ndarray:
        """Returns the guided velocity: one pass through all stages of the phase ``step``."""
        values = values | {"z_BTHWC": z_BTHWC, "t_B": np.full(len(z_BTHWC), time, np.float32)}
        values = self._phase("step", self._size(size)["key"], values, "merged" if merged else "full")
        conditional, unconditional = np.split(values["v_RTHWC"].astype(np.float32), 2)
        return unconditional + np.float32(guidance) * (conditional - unconditional)

    def _sample(
        self, at: Mapping[str, Any], z: np.ndarray, values: Values, sampling: Mapping[str, Any]
    ) -> tuple[np.ndarray, int]:
        """Returns latents and the number of evaluations; equal steps of flow time, unless a leap ends them."""
        times = np.append(schedule_times(self.manifest, at, sampling["num_steps"]), np.float32(0))
        unit = times / np.float32(self.manifest["sampling"]["num_timesteps"])
        state = LeapState(sampling["leap"], sampling["num_steps"])
        sampled = values["frame_mask_BT"][:, :, None, None, None] > 0
        before = None
        for step in range(sampling["num_steps"]):
            if step == sampling["merge_steps"]:
                before, state = None, LeapState(sampling["leap"], sampling["num_steps"])
            v = self.velocity(
                z,
                float(times[step]),
                values,
                guidance=sampling["guidance"],
                merged=step < sampling["merge_steps"],
                size=at["key"],
            )
            v = np.where(sampled, v, np.float32(0))
            leaps = state.leaps(step, v, before)
            z = z + v * (unit[step] if leaps else unit[step] - unit[step + 1])
            before = v
            if leaps:
                break
        self._end_phase("step")
        return z, step + 1

    def _sample_resident(
        self, at: Mapping[str, Any], z: np.ndarray, values: Values, sampling: Mapping[str, Any]
    ) -> tuple[np.ndarray, int]:
        """Returns the same from the sampler program, which holds all stages at once."""
        from sora_jax.export import stablehlo_sampler

        leap = sampling["leap"]
        mode = "dynamic" if leap["mode"] == "dynamic" else "static"
        functions = self.manifest["sampler"]["functions"] if self.manifest["sampler"] else []
        chosen = [function for function in functions if function["variant"] == mode and at["key"] in function["sizes"]]
        if not chosen:
            raise ValueError(f"{self.folder} has no sampler program; it was exported for {self.manifest['target']}.")
        padded = np.zeros(chosen_length(chosen[0], "times"), np.float32)
        if sampling["num_steps"] >= len(padded):
            raise ValueError(f"num_steps is {sampling['num_steps']}; the sampler program takes at most {len(padded) - 1}.")
        padded[: sampling["num_steps"]] = schedule_times(self.manifest, at, sampling["num_steps"])
        artefact = chosen[0]["artefact"]
        run = stablehlo_sampler.open_sampler(self.folder, artefact)
        params = stablehlo_sampler.read_params(self.folder, artefact)
        index = leap["index"] if leap["mode"] == "static" else sampling["num_steps"] - 1
        numbers = {
            "times": padded,
            "num_steps": sampling["num_steps"],
            "guidance": sampling["guidance"],
            "merge_steps": sampling["merge_steps"],
            "leap_index": index,
            "leap_first": first_comparison(leap, sampling["num_steps"]),
            "leap_tolerance": leap["tolerance"],
            "leap_patience": leap["patience"],
        }
        made = run(params, values | {"z_BTHWC": z, **{name: np.asarray(value) for name, value in numbers.items()}})
        return made["z_BTHWC"], int(made["evaluations_B"][0])

    def _phase(self, name: str, size: str, values: Values, variant: str = "main") -> Values:
        """Returns the values after every stage of a phase has run once."""
        phase = self._find_phase(name)
        for stage in phase["stages"]:
            function = stage_function(self.stages[stage], size, variant)
            key = (stage, function["name"])
            if key not in self.loaded:
                self.loaded[key] = self.target.open_function(self.folder, function["artefact"])
            values = values | self.loaded[key]({tensor["name"]: values[tensor["name"]] for tensor in function["inputs"]})
            if phase["unload"] == "after_use" and not self.keep:
                del self.loaded[key]
        return values

    def _end_phase(self, name: str) -> None:
        if not self.keep:
            stages = self._find_phase(name)["stages"]
            self.loaded = {key: runner for key, runner in self.loaded.items() if key[0] not in stages}

    def _frame_mask(self, mask_BT: np.ndarray | None, shape: tuple[int, ...], loop: str) -> np.ndarray:
        """Returns the frame mask as an input: all ones unless frames are given."""
        if mask_BT is None:
            return np.ones(shape, np.float32)
        inputs = {tensor["name"] for tensor in self.stages["stdit3_front"]["functions"][0]["inputs"]}
        if loop == "sampler":
            raise ValueError("the sampler program takes no frames; run loop 'stages'.")
        if "frame_mask_BT" not in inputs:
            raise ValueError(f"{self.folder} cannot take frames; export it with the stage vae_encoder.")
        return np.asarray(mask_BT, np.float32)

    def _find_phase(self, name: str) -> Mapping[str, Any]:
        found = [phase for phase in self.manifest["phases"] if phase["name"] == name]
        if not found:
            raise ValueError(f"{self.folder} was exported without the stages of phase {name}; export them too.")
        return found[0]

    def _size(self, key: str | None) -> Mapping[str, Any]:
        sizes = {size["key"]: size for size in self.manifest["sizes"]}
        key = key or next(iter(sizes))
        if key not in sizes:
            raise ValueError(f"{self.folder} was not exported for size {key}; it has {', '.join(sizes)}.")
        return sizes[key]

    def _sampling(
        self, num_steps: int | None, guidance: float | None, merge_steps: int | None, leap: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Returns the manifest's numbers with those given in their place."""
        base = self.manifest["sampling"]
        given = {"num_steps": num_steps, "guidance": guidance, "merge_steps": merge_steps}
        chosen: dict[str, Any] = {name: base[name] if value is None else value for name, value in given.items()}
        chosen["leap"] = {**base["leap"], **(leap or {})}
        mode, index = chosen["leap"]["mode"], chosen["leap"]["index"]
        if mode not in ("off", "static", "dynamic"):
            raise ValueError(f"leap mode is {mode!r}; expected off, static or dynamic.")
        if chosen["num_steps"] < 1 or chosen["merge_steps"] < 0:
            raise ValueError(
                f"num_steps {chosen['num_steps']}, merge_steps {chosen['merge_steps']}; expected at least 1 and 0."
            )
        if mode == "static" and not (isinstance(index, int) and 0 <= index < chosen["num_steps"]):
            raise ValueError(f"leap index is {index!r}; expected a step from 0 to {chosen['num_steps'] - 1}.")
        return chosen


class LeapState:
    """Whether a step leaps; for the dynamic rule, the best cosine so far and the patience left."""

    def __init__(self, leap: Mapping[str, Any], num_steps: int):
        self.leap, self.first = leap, first_comparison(leap, num_steps)
        self.best, self.patience = -1.0, leap["patience"]

    def leaps(self, step: int, v: np.ndarray, before: np.ndarray | None) -> bool:
        """Returns whether this step leaps; ``before`` is the guided velocity of the step before, None where not comparable."""
        if self.leap["mode"] == "static":
            return bool(step == self.leap["index"])
        if self.leap["mode"] == "off" or before is None or step < self.first:
            return False
        norms = np.linalg.norm(v.ravel()) * np.linalg.norm(before.ravel())
        cosine = float(np.dot(v.ravel(), before.ravel()) / max(norms, TINY))
        if cosine > self.best + self.leap["tolerance"]:
            self.best, self.patience = cosine, self.leap["patience"]
        else:
            self.patience -= 1
        return bool(self.patience <= 0)


def first_comparison(leap: Mapping[str, Any], num_steps: int) -> int:
    """Returns the first step whose velocity is compared with the one before (1e-9: rounding of the product must not count)."""
    return max(1, math.ceil(leap["min_share"] * num_steps - 1e-9) - 1)


def schedule_times(manifest: Mapping[str, Any], size: Mapping[str, Any], num_steps: int) -> np.ndarray:
    """Returns the float32 times of so many steps: the manifest's own, or by its rule where the number differs."""
    if num_steps == manifest["sampling"]["num_steps"]:
        return np.asarray(size["times"], np.float32)
    end, ratio = np.float32(manifest["sampling"]["num_timesteps"]), np.float32(size["shift"])
    unit = ((1.0 - np.arange(num_steps) / num_steps) * float(end)).astype(np.float32) / end
    return np.minimum(ratio * unit / (np.float32(1) + (ratio - np.float32(1)) * unit) * end, end)


def chosen_length(function: Mapping[str, Any], name: str) -> int:
    """Returns the length of a function's one-dimensional input."""
    return int(next(tensor["shape"][0] for tensor in function["inputs"] if tensor["name"] == name))


def stage_function(stage: Mapping[str, Any], size: str, variant: str) -> Mapping[str, Any]:
    """Returns the stage's function for a size: the variant asked for, or the only one there is."""
    mine = [function for function in stage["functions"] if size in function["sizes"]]
    matching = [function for function in mine if function["variant"] == variant] or [
        function for function in mine if function["variant"] == "main"
    ]
    if not matching:
        have = ", ".join(function["variant"] for function in mine)
        raise ValueError(f"stage {stage['name']} has no function {variant} for size {size}; it has {have}.")
    return matching[0]
