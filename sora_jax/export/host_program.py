"""The reference host program of an exported model: token ids in, frames out, from the manifest and the artefacts alone.

This is all that a phone's program has to do, apart from cleaning and splitting the prompt; ``docs/host_program.md`` says the
same for other languages.
It keeps one dictionary of named arrays, loads stages in the manifest's order, runs them, unloads them, and does the
loop's arithmetic itself: schedule, guidance, leap and merge switch, in NumPy.  These rules stand in the sampler too; they are
written a second time on purpose, as its independent check, and a test holds the two against each other.

Invariant: every number comes from ``manifest.json``, every byte that is run was compared with its checksum (`contents`); no
configuration, network, sampler or checkpoint of this package is imported.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float, Int

from sora_jax.export import manifest as manifests
from sora_jax.export.contents import Contents
from sora_jax.export.entries import ChunkEntry, LeapEntry, PhaseEntry, SamplingEntry, SizeEntry
from sora_jax.export.opening import Runner, open_function
from sora_jax.export.phases import stage_function
from sora_jax.export.rows import each_call
from sora_jax.process import Timings

TINY = 1e-8
MAX_STEPS = 100_000
MAX_GUIDANCE = 10_000.0

Values = dict[str, np.ndarray]
VelocityFn = Callable[[np.ndarray, np.float32, bool], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run: frames in [-1, 1] (not clipped), latents, and the number of velocity evaluations."""

    frames_Bthw3: Float[np.ndarray, "B t h w 3"]
    latents_BTHWC: Float[np.ndarray, "B T H W C"]
    evaluations: int


class ExportedModel:
    """An exported folder, opened.

    ``keep`` keeps stages loaded between steps; without it every stage is unloaded as soon as the manifest allows it.
    ``attention`` names one of the manifest's forms of attention, where it has any (None: the first).
    ``timings`` has the seconds so far: of loading, of every phase, and of the sampler program.

    Raises:
      ExportFileError: the folder is no finished export, a file is missing, or the manifest was changed or is wrong.
      ValueError: the manifest has no such form of attention.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: bool = True, attention: str | None = None):
        self.folder, self.keep = Path(folder), keep
        self.manifest = manifests.read(self.folder)
        self.contents = Contents(self.folder, self.manifest["files"])
        self.stages = {stage["name"]: stage for stage in self.manifest["stages"]}
        self.loaded: dict[tuple[str, str], Runner] = {}
        self.timings = Timings()
        forms = [form["name"] for form in self.manifest.get("attention", {}).get("forms", [])]
        if attention is not None and attention not in forms:
            raise ValueError(f"{self.folder} has no attention form {attention!r}; it has {', '.join(forms) or 'one'}.")
        self.attention = attention or (forms[0] if forms else None)
        for size in self.manifest["sizes"]:
            self._check_times(size)

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
          noise_BTHWC: noise in the latent shape of the size.
          size: key of one of the manifest's sizes; None: the first.
          num_steps: replaces the manifest's number, as do the following arguments.
          guidance: guidance scale.
          merge_steps: first steps that use merged functions.
          leap: the manifest's entry with some fields replaced, for example ``{"mode": "static", "index": 20}``.
          frame_mask_BT: 1 where a latent frame is sampled, 0 where it stays as ``noise_BTHWC`` has it (see `encode`).
          loop: ``sampler`` runs the whole loop as one program, where the manifest has one.

        Raises:
          ValueError: the manifest has no such size, phase or sampler, the export takes no reference frames, or a value is out
          of range.
          ExportFileError: a file is damaged, or not what the manifest says.
        """
        if loop not in ("stages", "sampler"):
            raise ValueError(f"loop is {loop!r}; expected stages or sampler.")
        at = self.size(size)
        sampling = self.sampling(num_steps=num_steps, guidance=guidance, merge_steps=merge_steps, leap=leap)
        frame_mask = self._frame_mask(frame_mask_BT, noise_BTHWC.shape[:2], loop)
        values = self.text(ids_BL, mask_BL, at["key"]) | {"frame_mask_BT": frame_mask}
        run = self._sample if loop == "stages" else self._sample_resident
        z, evaluations = run(at, np.asarray(noise_BTHWC, np.float32), values, sampling)
        return Result(frames_Bthw3=self.decode(z, at["key"]), latents_BTHWC=z, evaluations=evaluations)

    def text(self, ids_BL: np.ndarray, mask_BL: np.ndarray, size: str | None = None) -> Values:
        """Returns the arrays that the loop takes as they are: features of the caption, its mask, and a size's conditions."""
        at = self.size(size)
        values: Values = {"ids_BL": np.asarray(ids_BL, np.int32), "mask_BL": np.asarray(mask_BL, np.float32)}
        values |= {name: np.full(len(values["ids_BL"]), value, np.float32) for name, value in at["conditions"].items()}
        values = self._phase("text", at["key"], values)
        alone = any(phase["name"] == "caption" for phase in self.manifest["phases"])
        return self._phase("caption", at["key"], values) if alone else values

    def decode(self, z_BTHWC: Float[np.ndarray, "B T H W C"], size: str | None = None) -> Float[np.ndarray, "B t h w 3"]:
        """Returns the frames of latents: chunk by chunk, then frame by frame."""
        at = self.size(size)
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
        at = self.size(size)
        image: list[ChunkEntry] = [{"frames": 1, "latents": 1, "variant": "frames_1"}]
        latents, start = [], 0
        for chunk in at["chunks"] if frames_Bthw3.shape[1] > 1 else image:
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
        """Returns the guided velocity: one pass through the stages of the phase ``step``, where one may run for each row."""
        values = values | {"z_BTHWC": z_BTHWC, "t_B": np.full(len(z_BTHWC), time, np.float32)}
        calls = list(each_call(values, self.manifest.get("guidance_rows", 2)))
        calls = self._phase_of_calls("step", self.size(size)["key"], calls, "merged" if merged else "full")
        return guided(np.concatenate([call["v_RTHWC"] for call in calls]), guidance)

    def size(self, key: str | None = None) -> SizeEntry:
        """Returns a size by its key (None: the first).

        Raises:
          ValueError: the model was not exported for it.
        """
        sizes = {size["key"]: size for size in self.manifest["sizes"]}
        key = key or next(iter(sizes))
        if key not in sizes:
            raise ValueError(f"{self.folder} was not exported for size {key}; it has {', '.join(sizes)}.")
        return sizes[key]

    def sampling(
        self,
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        merge_steps: int | None = None,
        leap: Mapping[str, Any] | None = None,
    ) -> SamplingEntry:
        """Returns the manifest's numbers with those given in their place; loads nothing.

        Raises:
          ValueError: a number is out of its range.
        """
        own = self.manifest["sampling"]
        chosen: SamplingEntry = {
            **own,
            "num_steps": own["num_steps"] if num_steps is None else num_steps,
            "guidance": own["guidance"] if guidance is None else guidance,
            "merge_steps": own["merge_steps"] if merge_steps is None else merge_steps,
            "leap": cast(LeapEntry, {**own["leap"], **(leap or {})}),
        }
        mode, index, last = chosen["leap"]["mode"], chosen["leap"]["index"], chosen["num_steps"] - 1
        for name, value, least in (("num_steps", chosen["num_steps"], 1), ("merge_steps", chosen["merge_steps"], 0)):
            if type(value) is not int or not least <= value <= MAX_STEPS:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {least} to {MAX_STEPS}.")
        if not (isinstance(chosen["guidance"], int | float) and abs(chosen["guidance"]) <= MAX_GUIDANCE):
            raise ValueError(f"guidance is {chosen['guidance']!r}; expected a number, at most {MAX_GUIDANCE:g}.")
        if mode not in ("off", "static", "dynamic"):
            raise ValueError(f"leap mode is {mode!r}; expected off, static or dynamic.")
        if mode == "static" and not (type(index) is int and 0 <= index <= last):
            raise ValueError(f"leap index is {index!r}; expected a step from 0 to {last}.")
        return chosen

    def tokenizer(self) -> Path:
        """Returns the verified file of the tokenizer.

        Raises:
          ValueError: the text encoder was not exported.
        """
        name = self.manifest["tokens"]["file"]
        if name is None:
            raise ValueError(f"{self.folder} has no tokenizer; export it with the stage t5.")
        return self.contents.path(name)

    def times(self, size: SizeEntry, num_steps: int) -> Float[np.ndarray, "n"]:
        """Returns the times of so many steps: the manifest's own, or by its rule where the number differs."""
        own = self.manifest["sampling"]
        if num_steps == own["num_steps"]:
            return np.asarray(size["times"], np.float32)
        return schedule_times(num_steps, size["shift"], own["num_timesteps"])

    def _check_times(self, size: SizeEntry) -> None:
        """Refuses times that are not those of the rule; the schedule which made them rounds once or twice less."""
        own = self.manifest["sampling"]
        rule = schedule_times(own["num_steps"], size["shift"], own["num_timesteps"])
        if not np.allclose(np.asarray(size["times"], np.float32), rule, rtol=1e-6, atol=0):
            path = self.folder / manifests.MANIFEST_FILE
            raise manifests.ManifestError(
                f"{path} has times of size {size['key']} that are not those of shift {size['shift']}."
            )

    def _sample(self, at: SizeEntry, z: np.ndarray, values: Values, sampling: SamplingEntry) -> tuple[np.ndarray, int]:
        """Returns latents and the number of evaluations."""

        def velocity(z: np.ndarray, time: np.float32, merged: bool) -> np.ndarray:
            return self.velocity(z, float(time), values, guidance=sampling["guidance"], merged=merged, size=at["key"])

        made = sample(velocity, z, self.times(at, sampling["num_steps"]), sampling, values["frame_mask_BT"])
        self._end_phase("step")
        return made

    def _sample_resident(self, at: SizeEntry, z: np.ndarray, values: Values, sampling: SamplingEntry) -> tuple[np.ndarray, int]:
        """Returns the same from the sampler program, which holds all stages at once."""
        from sora_jax.export import resident

        mode = "dynamic" if sampling["leap"]["mode"] == "dynamic" else "static"
        functions = self.manifest["sampler"]["functions"] if self.manifest["sampler"] else []
        matching = [one for one in functions if one["variant"] == mode and at["key"] in one["sizes"]]
        if not matching:
            raise ValueError(f"{self.folder} has no sampler program; it was exported for {self.manifest['target']}.")
        stages = [stage for stage in self.manifest["stages"] if stage["network"] == "stdit3"]
        times, first = self.times(at, sampling["num_steps"]), first_comparison(sampling["leap"], sampling["num_steps"])
        numbers = resident.sampler_numbers(times, resident.capacity(matching[0]), sampling, first=first)
        with self.timings.measure("sampler"):
            made = resident.run(self.contents, matching[0], stages, values | {"z_BTHWC": z} | numbers)
        return made["z_BTHWC"], int(made["evaluations_B"][0])

    def _phase(self, name: str, size: str, values: Values, variant: str = "main") -> Values:
        """Returns the values after every stage of a phase has run once."""
        (values,) = self._phase_of_calls(name, size, [values], variant)
        return values

    def _phase_of_calls(self, name: str, size: str, calls: list[Values], variant: str) -> list[Values]:
        """Returns the values of every call after every stage of a phase has run for each of them, loaded once for all."""
        phase = self._find_phase(name)
        for stage in phase["stages"]:
            function = stage_function(self.stages[stage], size, variant, self.attention)
            key = (stage, function["name"])
            if key not in self.loaded:
                with self.timings.measure("load"):
                    self.loaded[key] = open_function(self.manifest["target"], self.contents, self.stages[stage], function)
            with self.timings.measure(name):
                run, names = self.loaded[key], [tensor["name"] for tensor in function["inputs"]]
                calls = [values | run({each: values[each] for each in names}) for values in calls]
            if phase["unload"] == "after_use" and not self.keep:
                del self.loaded[key]
        return calls

    def _end_phase(self, name: str) -> None:
        if not self.keep:
            stages = self._find_phase(name)["stages"]
            self.loaded = {key: runner for key, runner in self.loaded.items() if key[0] not in stages}

    def _frame_mask(self, mask_BT: np.ndarray | None, shape: tuple[int, ...], loop: str) -> np.ndarray:
        """Returns the frame mask as an input: all ones unless the caller passes frames."""
        if mask_BT is None:
            return np.ones(shape, np.float32)
        self.refuse_frames(loop)
        return np.asarray(mask_BT, np.float32)

    def refuse_frames(self, loop: str) -> None:
        """Refuses a loop, or an export, that takes no frames; loads nothing.

        Raises:
          ValueError: says what would take them.
        """
        if loop == "sampler":
            raise ValueError("the sampler program takes no frames; run loop 'stages'.")
        front = self._find_phase("step")["stages"][0]
        if "frame_mask_BT" not in {tensor["name"] for tensor in self.stages[front]["functions"][0]["inputs"]}:
            raise ValueError(f"{self.folder} cannot take frames; export it with the stage vae_encoder.")

    def _find_phase(self, name: str) -> PhaseEntry:
        found = [phase for phase in self.manifest["phases"] if phase["name"] == name]
        if not found:
            raise ValueError(f"{self.folder} was exported without the stages of phase {name}; export them too.")
        return found[0]


def sample(
    velocity: VelocityFn, z_BTHWC: np.ndarray, times: np.ndarray, sampling: SamplingEntry, frame_mask_BT: np.ndarray
) -> tuple[np.ndarray, int]:
    """Returns latents of one video and the number of evaluations: a step to each time, unless a leap ends them.

    Args:
      velocity: ``velocity(z, time, merged)``, guided.
      z_BTHWC: noise, B = 1.
      times: the time at which every step begins; the last step ends at 0.
      sampling: numbers of the loop.
      frame_mask_BT: 1 where a frame is sampled; the others stay.
    """
    num_steps = len(times)
    unit = np.append(times, np.float32(0)) / np.float32(sampling["num_timesteps"])
    sampled = frame_mask_BT[:, :, None, None, None] > 0
    state, before, z, evaluations = LeapState(sampling["leap"], num_steps), None, z_BTHWC, 0
    for step in range(num_steps):
        if step == sampling["merge_steps"]:  # velocities of merged and of full functions are not compared
            before, state = None, LeapState(sampling["leap"], num_steps)
        v = np.where(sampled, velocity(z, times[step], step < sampling["merge_steps"]), np.float32(0))
        evaluations += 1
        leaps = state.leaps(step, v, before)
        z = z + v * (unit[step] if leaps else unit[step] - unit[step + 1])
        before = v
        if leaps:
            break
    return z, evaluations


def cosine_of(v: np.ndarray, before: np.ndarray) -> float:
    """Returns the cosine of two velocities over the whole latent."""
    norms = np.linalg.norm(v.ravel()) * np.linalg.norm(before.ravel())
    return float(np.dot(v.ravel(), before.ravel()) / max(norms, TINY))


class LeapState:
    """Whether a step leaps; for the dynamic rule, the best cosine so far and the patience left."""

    def __init__(self, leap: LeapEntry, num_steps: int):
        self.leap, self.first = leap, first_comparison(leap, num_steps)
        self.best, self.patience = -1.0, leap["patience"]

    def leaps(self, step: int, v: np.ndarray, before: np.ndarray | None) -> bool:
        """Returns whether this step leaps; ``before`` is the guided velocity of the step before, None where not comparable."""
        if self.leap["mode"] == "static":
            return bool(step == self.leap["index"])
        if self.leap["mode"] == "off" or before is None or step < self.first:
            return False
        cosine = cosine_of(v, before)
        if cosine > self.best + self.leap["tolerance"]:
            self.best, self.patience = cosine, self.leap["patience"]
        else:
            self.patience -= 1
        return bool(self.patience <= 0)


def first_comparison(leap: LeapEntry, num_steps: int) -> int:
    """Returns the first step whose velocity is compared with the one before (1e-9: rounding of the product must not count)."""
    return max(1, math.ceil(leap["min_share"] * num_steps - 1e-9) - 1)


def guided(v_RTHWC: np.ndarray, guidance: float) -> np.ndarray:
    """Returns the velocity of the batch, of the rows [conditional, unconditional]."""
    conditional, unconditional = np.split(v_RTHWC.astype(np.float32), 2)
    return np.asarray(unconditional + np.float32(guidance) * (conditional - unconditional))


def schedule_times(num_steps: int, shift: float, num_timesteps: float) -> Float[np.ndarray, "n"]:
    """Returns the float32 times of so many steps: equal ones, moved by the size's shift."""
    end, ratio = np.float32(num_timesteps), np.float32(shift)
    unit = ((1.0 - np.arange(num_steps) / num_steps) * float(end)).astype(np.float32) / end
    return np.minimum(ratio * unit / (np.float32(1) + (ratio - np.float32(1)) * unit) * end, end)
