"""What a generation will need, by stage, before anything is loaded: from manifests and settings, no weight and no device.

Invariant: stages follow each other and nothing of one stays for the next, so a run's peak is its largest stage's.  A budget
below the minimum of the largest stage is refused, with that minimum and with sizes that would fit.  The numbers are
estimates, the transformer's corrected by measurement once it runs; ``activations`` has the terms of activations.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sora_jax.config import ModelConfig
from sora_jax.devices.attention_choice import choose_forms
from sora_jax.networks.forms import Forms
from sora_jax.networks.merge_rule import Merge
from sora_jax.networks.segment import Segment
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE, chunks, latent_size
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.buffers import group_bytes
from sora_jax.storage.directory import Manifest
from sora_jax.storage.location import Address
from sora_jax.storage.quantisation import SCALE_SUFFIX
from sora_jax.storage.site import FETCHING_BYTES
from sora_jax.streaming import activations
from sora_jax.streaming.host_loop import frame_batches
from sora_jax.streaming.stream import ENDS

BASELINE_BYTES = 255_000_000  # Python with JAX, measured, and tensorstore with what it has in flight
COMPILER_BYTES = {"text": 80_000_000, "encode": 110_000_000, "denoise": 150_000_000, "decode": 110_000_000}  # measured
# Of every block whose tokens are computed in portions: loops of its own, measured at 480p with 2 and 56 blocks.
PORTIONS_BYTES = 6_000_000
TILE_BYTES = 34_000_000  # of an int8 matrix that is multiplied out: a tile, and its product
# Of networks at an address: requests under way, each twice when it arrives, and what the first one loads.
NETWORK_BYTES = 2 * FETCHING_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is generated: ``batch`` clips of ``num_frames`` x ``height`` x ``width``, with or without guidance."""

    num_frames: int
    height: int
    width: int
    batch: int = 1
    guided: bool = True
    dtype: str = "float32"
    attention: str = "auto"
    merge: Merge | None = None  # of some evaluations
    num_steps: int = 30
    encodes: bool = False  # references or loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Bytes of one stage; their sum is its peak.

    Attributes:
      name: ``text``, ``encode``, ``denoise`` or ``decode``.
      baseline: the process with JAX, and programs compiled before.
      compiler: this stage's programs.
      parameters: must be in memory at once.
      activations: of the computation, and results on the host.
      staging: buffers that let reading overlap computing; the host loop does without them where memory is short.
      retained: parameters that stay because there is room.
      retained_layers: how many layers those are.
      num_layers: how many could stay.
      num_slots: segments in memory at a time (host loop).
      needs_staging: whether the stage cannot run without ``staging``.
      evaluations: how often the layers run.
      read: bytes of the layers' files that one evaluation reads, without retained ones.
      flops: floating-point operations of one evaluation.
    """

    name: str
    baseline: int
    compiler: int
    parameters: int
    activations: int
    staging: int
    retained: int = 0
    retained_layers: int = 0
    num_layers: int = 0
    num_slots: int = 1
    needs_staging: bool = False
    evaluations: int = 1
    read: int = 0
    flops: float = 0.0

    @property
    def peak(self) -> int:
        """Bytes that the process holds at most."""
        return self.fixed + self.retained

    @property
    def fixed(self) -> int:
        """Bytes without retained layers."""
        return self.baseline + self.compiler + self.parameters + self.activations + self.staging

    @property
    def minimum(self) -> int:
        """The least number of bytes with which the stage runs."""
        return self.fixed - (0 if self.needs_staging else self.staging)

    def seconds(self, bytes_per_s: float, flop_per_s: float) -> float:
        """Returns the time at a storage bandwidth and a speed: the longer of reading and computing where they overlap.

        Retained layers are read once, before the first evaluation has them.
        """
        compute, load = self.flops / flop_per_s, self.read / bytes_per_s
        share = 1 - self.retained_layers / self.num_layers if self.num_layers else 1.0
        overlapped = self.needs_staging or self.num_slots > 1
        once = max(share * compute, load) + (1 - share) * compute if overlapped else compute + load
        return self.evaluations * once + self.retained / bytes_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The stages of a generation under a budget; None: as much as there is."""

    workload: Workload
    budget: int | None
    stages: Sequence[StagePlan]

    def stage(self, name: str) -> StagePlan:
        """Returns the stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def peak(self) -> int:
        """Bytes that the process holds at most."""
        return max(stage.peak for stage in self.stages)

    @property
    def minimum(self) -> int:
        """The smallest budget that this generation runs with."""
        return max(stage.minimum for stage in self.stages)


def plan_memory(manifests: Mapping[str, Manifest], workload: Workload, budget: int | None = None) -> MemoryPlan:
    """Returns the plan of a generation by the networks of a model directory.

    Raises:
      ValueError: the budget is below what the generation needs; the message says how much that is, and what would fit.
    """
    plan = _plan(manifests, workload, budget)
    if budget is not None and budget < plan.minimum:
        largest = max(plan.stages, key=lambda stage: stage.minimum)
        raise ValueError(
            f"memory budget of {_gb(budget)} is too small: {_described(workload)} needs {_gb(plan.minimum)} at least, "
            f"for the stage {largest.name}; {_advice(manifests, workload, budget)}."
        )
    return plan


def _plan(manifests: Mapping[str, Manifest], workload: Workload, budget: int | None) -> MemoryPlan:
    config = ModelConfig(**{network: manifest.config for network, manifest in manifests.items()})
    if workload.num_frames < 1 or min(workload.height, workload.width) < config.vae.spatial.downsampling:
        raise ValueError(f"{_described(workload)} is no video; expected at least one frame of 8x8 pixels.")
    builders: list[Callable[..., StagePlan]] = [_text, *([_encode] if workload.encodes else []), _denoise, _decode]
    stages, compiled = [], 0
    reading = NETWORK_BYTES if any(isinstance(manifest.path, Address) for manifest in manifests.values()) else 0
    for build in builders:
        stage = build(manifests, config, workload, BASELINE_BYTES + reading + compiled, budget)
        compiled += stage.compiler
        stages.append(stage)
    return MemoryPlan(workload=workload, budget=budget, stages=stages)


def _text(
    manifests: Mapping[str, Manifest], config: ModelConfig, workload: Workload, baseline: int, budget: int | None
) -> StagePlan:
    manifest, length = manifests["t5"], config.stdit3.model_max_length
    sizes = _segment_bytes(manifest, T5Encoder.segments(config.t5))
    activation = activations.text_bytes(config.t5, workload.batch, length)
    stage = StagePlan(
        name="text",
        baseline=baseline,
        compiler=COMPILER_BYTES["text"],
        parameters=max(sizes),
        activations=activation + _conversion(manifest, T5Encoder.segments(config.t5), workload.dtype),
        staging=max(sizes),
        num_slots=2,
        read=sum(sizes),
        flops=activations.text_flops(config.t5, workload.batch, length),
    )
    return _within_budget(stage, budget)


def _denoise(
    manifests: Mapping[str, Manifest], config: ModelConfig, workload: Workload, baseline: int, budget: int | None
) -> StagePlan:
    manifest = manifests["stdit3"]
    rows, frames, places = token_shape(config, workload)
    blocks = [manifest.layer_bytes(layer) for layer in manifest.layers if layer not in ENDS]
    wide = 4 * max(_numbers(manifest, layer) for layer in manifest.layers if layer not in ENDS)
    divided = activations.in_portions(config.stdit3, (rows, frames, places), _forms(workload))
    stage = StagePlan(
        name="denoise",
        baseline=baseline,
        compiler=COMPILER_BYTES["denoise"] + divided * len(blocks) * PORTIONS_BYTES,
        parameters=4 * sum(_numbers(manifest, layer) for layer in ENDS) + max(blocks),
        activations=max(
            activations.denoise_bytes(config.stdit3, rows, frames, places, _forms(workload), merge)
            for merge in (None, workload.merge)
        ),
        staging=max(blocks) + wide,  # the block read ahead; the one in use, as the program takes it
        needs_staging=True,
        num_layers=len(blocks),
        num_slots=2,
        evaluations=workload.num_steps,
        flops=activations.denoise_flops(config.stdit3, rows, frames, places),
    )
    room = None if budget is None else budget - stage.fixed
    count = sum(1 for total in _running_sums(blocks) if room is None or total <= room)
    kept = sum(blocks[:count])
    return dataclasses.replace(stage, retained=kept, retained_layers=count, read=sum(blocks) - kept)


def _encode(
    manifests: Mapping[str, Manifest], config: ModelConfig, workload: Workload, baseline: int, budget: int | None
) -> StagePlan:
    by_frame, *over_time = VAE.encode_segments(config.vae)
    return _autoencoder(manifests["vae"], config, workload, baseline, budget, "encode", over_time, by_frame)


def _decode(
    manifests: Mapping[str, Manifest], config: ModelConfig, workload: Workload, baseline: int, budget: int | None
) -> StagePlan:
    *over_time, by_frame = VAE.decode_segments(config.vae, config.vae.micro_frame_size)
    return _autoencoder(manifests["vae"], config, workload, baseline, budget, "decode", over_time, by_frame)


def _autoencoder(
    manifest: Manifest,
    config: ModelConfig,
    workload: Workload,
    baseline: int,
    budget: int | None,
    name: str,
    over_time: Sequence[Segment],
    by_frame: Segment,
) -> StagePlan:
    """Returns the wider of the temporal part, streamed for every chunk, and the spatial one, which is read once."""
    decoder, vae, batch = name == "decode", config.vae, workload.batch
    _, rows, columns = latent_size(vae, workload.num_frames, workload.height, workload.width)
    pixels = rows * columns * vae.spatial.downsampling**2
    lengths = [chunk.num_frames for chunk in chunks(vae, workload.num_frames)]
    sizes, (spatial_bytes,) = _segment_bytes(manifest, over_time), _segment_bytes(manifest, [by_frame])
    at_a_time = max(part.stop - part.start for part in frame_batches(batch * max(lengths), pixels))
    held = activations.video_bytes(batch, workload.num_frames, pixels)
    cast = 4 * (spatial_bytes // _itemsize(manifest)) if workload.dtype != manifest.dtype else 0
    spatial_activations = max(
        activations.spatial_bytes(vae.spatial, at_a_time, pixels, decoder=decoder, forms=_forms(workload)), cast
    )
    common: dict[str, Any] = {"name": name, "baseline": baseline, "compiler": COMPILER_BYTES[name]}
    common["read"] = len(lengths) * sum(sizes) + spatial_bytes
    common["flops"] = batch * sum(
        activations.temporal_flops(vae.temporal, 1, frames, rows * columns)
        + activations.spatial_flops(vae.spatial, frames, pixels, decoder=decoder)
        for frames in lengths
    )
    temporal_half = StagePlan(
        **common,
        parameters=max(sizes),
        activations=activations.temporal_bytes(vae.temporal, batch, max(lengths), rows * columns) + held // 3,
        staging=max(sizes),
        num_slots=2,
    )
    spatial_half = StagePlan(**common, parameters=spatial_bytes, activations=spatial_activations + held, staging=0)
    temporal_half = _within_budget(temporal_half, budget)
    wider = max(temporal_half, spatial_half, key=lambda stage: stage.peak)
    return dataclasses.replace(wider, num_slots=temporal_half.num_slots)


def _forms(workload: Workload) -> Forms:
    """Returns the forms of a CPU with a budget; a kernel that is named holds no more than the automatic choice."""
    named = workload.attention if workload.attention in ("dense", "chunked") else "auto"
    return choose_forms(named, platform="cpu", dtype=workload.dtype, streamed=True)


def token_shape(config: ModelConfig, workload: Workload) -> tuple[int, int, int]:
    """Returns rows, latent frames and tokens of a frame that the transformer evaluates at once."""
    frames, rows, columns = latent_size(config.vae, workload.num_frames, workload.height, workload.width)
    _, down, across = config.stdit3.patch_size
    return workload.batch * (2 if workload.guided else 1), frames, -(-rows // down) * -(-columns // across)


def _within_budget(stage: StagePlan, budget: int | None) -> StagePlan:
    """Returns the stage of a host loop, without reading ahead where that does not fit."""
    if budget is None or stage.peak <= budget:
        return stage
    return dataclasses.replace(stage, staging=0, num_slots=1)


def _segment_bytes(manifest: Manifest, segments: Sequence[Segment]) -> list[int]:
    return [group_bytes({name: manifest.parameters[name] for name in _names(manifest, segment)}) for segment in segments]


def _names(manifest: Manifest, segment: Segment) -> list[str]:
    prefixes = tuple(f"{name}." for name in segment.names)
    return [name for name in manifest.parameters if name.startswith(prefixes)]


def _conversion(manifest: Manifest, segments: Sequence[Segment], dtype: str) -> int:
    """Returns the bytes of parameters in the compute dtype, where they are stored in another."""
    if manifest.dtype == dtype:
        return 0
    if manifest.dtype == "int8":
        return TILE_BYTES
    itemsize = STORED_DTYPES[dtype].itemsize
    return max(size // _itemsize(manifest) * itemsize for size in _segment_bytes(manifest, segments))


def _itemsize(manifest: Manifest) -> int:
    return STORED_DTYPES[manifest.dtype].itemsize


def _numbers(manifest: Manifest, layer: str) -> int:
    sizes = {name: manifest.parameters[name] for name in manifest.names(layer) if not name.endswith(SCALE_SUFFIX)}
    return sum(entry.nbytes // STORED_DTYPES[entry.dtype].itemsize for entry in sizes.values())


def _running_sums(sizes: Sequence[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


def _advice(manifests: Mapping[str, Manifest], workload: Workload, budget: int) -> str:
    """Returns what of one clip, fewer frames or smaller frames would fit into the budget."""
    kinds = _smaller(manifests, dataclasses.replace(workload, batch=1))
    fitting = [
        next((smaller for smaller in kind if _plan(manifests, smaller, budget).minimum <= budget), None) for kind in kinds
    ]
    described = dict.fromkeys(_described(smaller) for smaller in fitting if smaller is not None)
    if not described:
        return "no smaller video fits either; raise the budget, or store the networks as int8 (convert --dtype int8)"
    return "what fits: " + " or ".join(described)


def _smaller(manifests: Mapping[str, Manifest], workload: Workload) -> list[Iterator[Workload]]:
    """Returns fewer frames at the same size, and smaller frames of the same number, the largest first."""
    size = manifests["vae"].config.micro_frame_size
    step = manifests["vae"].config.spatial.downsampling * manifests["stdit3"].config.patch_size[1]
    counts = [workload.num_frames, *range((workload.num_frames - 1) // size * size, 0, -size), 1]
    sides = [
        [max(step, side * eighths // 8 // step * step) for side in (workload.height, workload.width)]
        for eighths in range(7, 0, -1)
    ]
    return [
        (dataclasses.replace(workload, num_frames=count) for count in counts),
        (dataclasses.replace(workload, height=height, width=width) for height, width in sides),
    ]


def _described(workload: Workload) -> str:
    clips = f"{workload.batch} clips of " if workload.batch > 1 else ""
    frames = f"{workload.num_frames} frames" if workload.num_frames > 1 else "1 frame"
    return f"{clips}{frames} at {workload.height}x{workload.width}"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e6 else f"{num_bytes:,} bytes"
