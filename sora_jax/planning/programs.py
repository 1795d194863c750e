"""The programs of a generation as functions of shapes: what the pipeline compiles, without a weight.

Invariant: every function is the pipeline's own, called with shapes in place of arrays.  One differs in form alone: an
evaluation is a scan over the pairs of blocks, whose weights are stacked, because it compiles in the time of one pair; the
sampler has the pairs written out, as a generation runs them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sora_jax import layout
from sora_jax.config import policy_of
from sora_jax.devices.attention_choice import choose_forms, form_name
from sora_jax.devices.axes import AXES, WEIGHTS, check_mesh_request, parse_axes
from sora_jax.devices.mesh import is_spread
from sora_jax.inputs import sizes
from sora_jax.networks import registry
from sora_jax.networks.vae.codec import chunks, latent_size
from sora_jax.pipeline import coders
from sora_jax.pipeline.make_sampler import make_sampling
from sora_jax.pipeline.velocity import Velocity
from sora_jax.planning.request import Model, Request
from sora_jax.planning.scanned import ScannedSTDiT3
from sora_jax.sampling.options import Sampling
from sora_jax.sampling.sampler import Carry, Sampler
from sora_jax.storage.arrays import STORED_DTYPES
from sora_jax.storage.checkpoint import flatten, unflatten
from sora_jax.storage.quantisation import is_scale
from sora_jax.streaming.activations import attention_shapes


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns the shape that stands in place of an array, and passes for one."""
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A function and the shapes of its arguments.

    Attributes:
      name: one of `request.PROGRAMS`.
      what: what it computes, for people.
      counted: what operations and bytes are counted of.
      times: how often a generation of one clip runs what is counted.
      attention: the form of every attention of a pair of blocks, by name; empty for other networks.
      function: what is compiled.
      arguments: shapes in place of arrays.
      spread: whether the devices of a mesh run it together; else each of them runs it by itself.
    """

    name: str
    what: str
    counted: str
    times: int
    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    spread: bool = False


def programs(request: Request, platform: str) -> Iterator[Program]:
    """Yields the programs that are asked for, in the order in which a generation runs them.

    Args:
      request: what is asked for.
      platform: as JAX names it: ``tpu`` or ``gpu``; attention depends on it.

    Raises:
      ValueError: the model, the clip or the attention is wrong.
    """
    parts = _Parts(request, platform)
    made = {"text": parts.text, "evaluation": parts.evaluation, "sampler": parts.sampler, "decode": parts.decode}
    for name, make in made.items():
        if name in request.programs:
            yield make()


class _Parts:
    """The networks as shapes, and the inputs of one clip."""

    def __init__(self, request: Request, platform: str):
        self.model = Model.read(request.model, request.options)
        self.settings, self.config = self.model.settings, self.model.config
        self.forms = choose_forms(request.attention, platform=platform, dtype=self.settings.dtype)
        self.compute = jnp.dtype(policy_of(self.settings.dtype).compute)
        self.rows, self.mesh = 2 if self.settings.guided else 1, request.mesh
        self.spread_over = request.hardware.num_devices if request.weights != WEIGHTS[0] else None
        if self.mesh is not None:
            check_mesh_request(parse_axes(self.mesh), guided=self.settings.guided, num_clips=1)

    def network(self, name: str) -> Any:
        """Returns a network of shapes, in the dtypes in which it lies in memory."""
        shell = registry.abstract(name, getattr(self.config, name), policy=policy_of(self.settings.dtype), forms=self.forms)
        if self.model.manifests is None:
            return shell
        stored = self.model.manifests[name].parameters
        flat = flatten(shell)
        for parameter, entry in stored.items():
            if not is_scale(parameter, stored):
                dtype = STORED_DTYPES["float32"] if entry.dtype == "int8" else entry.numpy_dtype  # int8 is multiplied out
                flat[parameter] = _array(tuple(entry.shape), dtype)
        return unflatten(shell, flat)

    @property
    def latents(self) -> Any:
        """The latents of one clip."""
        clip = self.settings
        frames, rows, columns = latent_size(self.config.vae, clip.num_frames, clip.height, clip.width)
        return _array((1, frames, rows, columns, self.config.stdit3.in_channels), jnp.float32)

    def transformer(self) -> Any:
        """Returns the transformer of shapes, those of spread weights as `devices.mesh` places them."""
        network, over = self.network("stdit3"), self.spread_over
        if over is None:
            return network
        leaves, structure = jax.tree.flatten(network)
        return jax.tree.unflatten(structure, [layout.Spread(leaf) if is_spread(leaf.shape, over) else leaf for leaf in leaves])

    def velocity(self) -> Velocity:
        """Returns the velocity of one clip, as `pipeline.run` makes it."""
        config, clip = self.config.stdit3, self.settings
        length = config.model_max_length
        given = sizes.size_conditions(1, height=clip.height, width=clip.width, num_frames=clip.num_frames, fps=clip.fps)
        fps, height_px, width_px = (_shape(given[name]) for name in ("fps_B", "height_px_B", "width_px_B"))
        return Velocity(
            network=self.transformer(),
            caption_RLE=_array((self.rows, length, config.caption_channels), self.compute),
            mask_BL=_array((1, length), jnp.bool_),
            fps=fps,
            height_px=height_px,
            width_px=width_px,
            merge=clip.merge,
        )

    def attention(self) -> dict[str, str]:
        """Returns what computes every attention of a pair of blocks."""
        config, (_, frames, rows, columns, _) = self.config.stdit3, self.latents.shape
        places = -(-rows // config.patch_size[1]) * -(-columns // config.patch_size[2])
        axes = parse_axes(self.mesh) if self.mesh else dict.fromkeys(AXES, 1)
        rows, each = -(-self.rows // axes["guidance"]), axes["sequence"]
        by_frame = attention_shapes(config, rows, -(-frames // each), places, self.forms)
        by_place = attention_shapes(config, rows, frames, -(-places // each), self.forms)
        shapes = {**by_place, "spatial": by_frame["spatial"]}
        options: dict[str, Any] = {"head_size": config.head_size, "dtype": self.settings.dtype}
        return {
            name: form_name(self.forms.attention, shape, masked="cross" in name, **options) for name, shape in shapes.items()
        }

    def text(self) -> Program:
        length = self.config.stdit3.model_max_length
        return Program(
            name="text",
            what=f"the text encoder on one caption of {length} tokens",
            counted="the whole program",
            times=1,
            function=coders.encode_text,
            arguments=(self.network("t5"), _array((1, length), jnp.int32), _array((1, length), jnp.bool_)),
        )

    def evaluation(self) -> Program:
        velocity, latents, depth = self.velocity(), self.latents, self.config.stdit3.depth
        network: Any = velocity.network
        scanned: Any = ScannedSTDiT3.of_shapes(network)
        rows = _array((self.rows, *latents.shape[1:]), latents.dtype)
        guided = "one guided evaluation" if self.settings.guided else "one evaluation"
        return Program(
            name="evaluation",
            what=f"{guided} of the transformer: a scan over its {depth} pairs of blocks, weights stacked",
            counted=f"one evaluation, all {depth} pairs",
            times=self.settings.num_steps,
            attention=self.attention(),
            spread=True,
            function=_evaluated,
            arguments=(dataclasses.replace(velocity, network=scanned), rows, _array((self.rows,), jnp.float32)),
        )

    def sampler(self) -> Program:
        velocity, latents = self.velocity(), self.latents
        sampling = make_sampling(self.settings)
        numbers, structure = jax.tree.flatten(sampling)
        start = jax.eval_shape(lambda velocity, z: Sampler.of(velocity, sampling).start(z), velocity, latents)
        depth = self.config.stdit3.depth
        return Program(
            name="sampler",
            what=f"the whole sampler, noise to latents: {depth} pairs of blocks written out in the body of its loop",
            counted="one step, each loop over steps once",
            times=self.settings.num_steps,
            attention=self.attention(),
            spread=True,
            function=functools.partial(_sampled, structure),
            arguments=(velocity, [_shape(number) for number in numbers], start, _array((), jnp.int32)),
        )

    def decode(self) -> Program:
        clip, vae = self.settings, self.config.vae
        parts = chunks(vae, clip.num_frames)
        frames = parts[0].num_frames
        latents = self.latents
        z = _array((1, parts[0].latents.stop, *latents.shape[2:]), latents.dtype)
        side = vae.spatial.downsampling
        batch = coders.frame_batch(latents.shape[2] * side, latents.shape[3] * side)
        return Program(
            name="decode",
            what=f"the decoder on a chunk of {frames} frames, {batch} at a time",
            counted="one chunk",
            times=len(parts),
            function=functools.partial(coders.decode_chunk, frames, None, batch),
            arguments=(self.network("vae"), z),
        )


def _shape(value: Any) -> Any:
    return _array(np.shape(value), np.asarray(value).dtype)


def _evaluated(velocity: Velocity, z: Array, t_R: Array) -> Array:
    return velocity.evaluate(z, t_R)


def _sampled(structure: Any, velocity: Velocity, numbers: list[Array], carry: Carry, until: Array) -> Carry:
    sampling: Sampling = jax.tree.unflatten(structure, numbers)
    return Sampler.of(velocity, sampling).run(carry, until)
