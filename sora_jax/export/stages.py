"""The stages a model is exported in: functions of a flat dictionary of weights and named arrays, in fixed shapes.

A stage is what a host program loads and unloads as one; several stages (all pairs of blocks, all T5 blocks) share a program
and differ in their weights only.  A host keeps one dictionary of named arrays, hands each function the inputs it names and
puts its outputs back, so an output named like an input replaces it.

Invariant: every function is a composition of the networks' own forward functions.  Masks are float32 (1 real or sampled,
0 not), because not every target has Boolean inputs; weights are float32 whatever the directory stores.

The transformer's rows R are [conditional, unconditional] of the batch B: the front appends the null caption itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sora_jax.config import FLOAT32, DTypePolicy, ModelConfig
from sora_jax.export import forwards
from sora_jax.export.size import Size
from sora_jax.networks import merging
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import RMSNorm
from sora_jax.networks.stdit3 import Embed, Final, STDiT3Block
from sora_jax.networks.t5 import T5Block, T5Embed
from sora_jax.networks.vae.codec import VAE, chunks
from sora_jax.pipeline.frame_size import check_multiple
from sora_jax.storage.checkpoint import flatten, read_layer
from sora_jax.storage.directory import Manifest
from sora_jax.storage.reader import Reader

PARTS = ("t5", "stdit3", "vae_decoder", "vae_encoder")
DEFAULT_PARTS = PARTS[:3]
MERGE = merging.Merge()

Specs = Mapping[str, jax.ShapeDtypeStruct]
_Variant = tuple[str, Size, Callable[..., dict[str, jax.Array]], Specs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """One fixed-shape function of a stage.

    Attributes:
      name: unique within the stage; the variant's name, for further sizes followed by the size.
      variant: what it computes: ``main``; ``full`` or ``merged`` of a pair; ``frames_17`` of a temporal codec.
      sizes: keys of the sizes it serves (see `Size`); of a text stage all of them.
      call: ``call(params, **inputs) -> outputs``, params by local name.
      inputs: shapes and dtypes by name, in order.
      outputs: likewise.
    """

    name: str
    variant: str
    sizes: tuple[str, ...]
    call: Callable[..., dict[str, jax.Array]]
    inputs: Specs
    outputs: Specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What stages of the same computation share.

    Attributes:
      name: for example ``stdit3_pair``.
      abstract: shape and dtype of every parameter by local name, as the functions expect them.
      functions: at least one.
      keep_float32: its arithmetic has no meaning in float16 (angles of times up to 1000).
    """

    name: str
    abstract: Specs
    functions: tuple[Function, ...]
    keep_float32: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A unit of loading: a program and the weights it runs on.

    Attributes:
      name: ``t5_block_00``, ``stdit3_pair_00``, ...; also the stem of its files.
      program: what it computes.
      network: ``t5``, ``stdit3`` or ``vae``: where its parameters are stored.
      layers: the layers of the network that hold its parameters.
      parameters: flat name in the network by local name.
    """

    name: str
    program: Program
    network: str
    layers: tuple[str, ...]
    parameters: Mapping[str, str]

    @property
    def functions(self) -> tuple[Function, ...]:
        """The functions of its program."""
        return self.program.functions

    def function(self, name: str) -> Function:
        """Returns the function of that name."""
        return next(function for function in self.functions if function.name == name)


def load_parameters(manifest: Manifest, stage: Stage) -> dict[str, np.ndarray]:
    """Returns a stage's parameters by local name, in the dtype it expects, reading its layers only; int8 is multiplied out.

    Raises:
      ModelDirectoryError: a parameter is missing or does not match its checksum.
    """
    reader, flat = Reader(manifest), {}
    for layer in stage.layers:
        flat.update(read_layer(reader, layer, dtype="float32"))
    return {
        local: flat[name].astype(stage.program.abstract[local].dtype, copy=False) for local, name in stage.parameters.items()
    }


def list_stages(
    config: ModelConfig,
    sizes: Sequence[Size],
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    policy: DTypePolicy = FLOAT32,
    forms: Forms = WHOLE,
) -> list[Stage]:
    """Returns the stages of ``parts`` in execution order: text, transformer, decoder, encoder.

    With ``vae_encoder`` the transformer also takes a frame mask, so that a host can pass reference frames.

    Raises:
      ValueError: a part is unknown, or a size is not one the model can make.
    """
    check_parts(parts)
    for size in sizes:
        check_multiple(config.vae, config.stdit3.patch_size[1], size.height, size.width)
    builder = _Builder(config, sizes, policy=policy, forms=forms, frame_mask="vae_encoder" in parts)
    stages: list[Stage] = []
    for part, build in zip(PARTS, (builder.t5, builder.stdit3, builder.vae_decoder, builder.vae_encoder), strict=True):
        stages += build() if part in parts else []
    return stages


def check_parts(parts: Sequence[str]) -> None:
    """Refuses a choice of parts that names none, or one that does not exist.

    Raises:
      ValueError: names what is unknown.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"stages {', '.join(unknown) or 'none'} cannot be exported; expected some of {', '.join(PARTS)}.")


class _Builder:
    """What the stages of one export have in common."""

    def __init__(self, config: ModelConfig, sizes: Sequence[Size], *, policy: DTypePolicy, forms: Forms, frame_mask: bool):
        self.config, self.sizes, self.policy, self.forms = config, sizes, policy, forms
        self.frame_mask = frame_mask
        self.length = config.stdit3.model_max_length

    def t5(self) -> list[Stage]:
        """Returns embedding, blocks and final norm of the text encoder."""
        config = self.config.t5
        x = self._activation(1, self.length, config.d_model)
        bias = _float32(1, config.num_heads, self.length, self.length)
        ids = jax.ShapeDtypeStruct((1, self.length), jnp.int32)
        shells = {
            "t5_embed": _shell(lambda rngs: T5Embed(config, policy=self.policy, rngs=rngs)),
            "t5_block": _shell(lambda rngs: T5Block(config, policy=self.policy, forms=self.forms, rngs=rngs)),
            "t5_final": _shell(lambda _: RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, policy=self.policy)),
        }
        inputs: dict[str, dict[str, jax.ShapeDtypeStruct]] = {
            "t5_embed": {"ids_BL": ids},
            "t5_block": {"x_BLE": x, "bias_1NLL": bias, "mask_BL": _float32(1, self.length)},
            "t5_final": {"x_BLE": x},
        }
        bodies: dict[str, Callable[..., dict[str, jax.Array]]] = {
            "t5_embed": forwards.t5_embed,
            "t5_block": forwards.t5_block,
            "t5_final": forwards.t5_final,
        }
        embed, block, final = (
            _program(name, {"": shells[name]}, [("main", size, bodies[name], inputs[name]) for size in self.sizes])
            for name in shells
        )
        return [
            _stage("t5_embed", embed, "t5", {"embed": ""}),
            *(_stage(f"t5_block_{i:02}", block, "t5", {f"block.{i}": ""}) for i in range(config.num_layers)),
            _stage("t5_final", final, "t5", {"final": ""}),
        ]

    def stdit3(self) -> list[Stage]:
        """Returns front, pairs of blocks and final layer of the transformer."""
        config, policy, forms = self.config.stdit3, self.policy, self.forms
        embed = _shell(lambda rngs: Embed(config, policy=policy, rngs=rngs))
        blocks = {
            "spatial": _shell(lambda rngs: STDiT3Block(config, temporal=False, policy=policy, forms=forms, rngs=rngs)),
            "temporal": _shell(lambda rngs: STDiT3Block(config, temporal=True, policy=policy, forms=forms, rngs=rngs)),
        }
        last = _shell(lambda rngs: Final(config, policy=policy, rngs=rngs))
        front = _program(
            "stdit3_front",
            {"": embed},
            [("main", size, forwards.front, self._front_inputs(size)) for size in self.sizes],
            keep_float32=True,
        )
        pairs: list[_Variant] = []
        finals: list[_Variant] = []
        for size in self.sizes:
            made = next(function.outputs for function in front.functions if size.key in function.sizes)
            inputs = {name: made[name] for name in ("x_RTSD", "caption_RLD", "mask_RL", "mod_RF6D")}
            pairs.append(("full", size, functools.partial(forwards.pair, None), inputs))
            if made["x_RTSD"].shape[1] > 1:
                pairs.append(("merged", size, functools.partial(forwards.pair, MERGE), inputs))
            inputs = {name: made[name] for name in ("x_RTSD", "t_RD", "t0_RD", "frame_mask_RT") if name in made}
            latent = (*size.latents(self.config.vae)[1:], config.in_channels)
            finals.append(("main", size, functools.partial(forwards.final, latent), inputs))
        pair = _program("stdit3_pair", blocks, pairs)
        return [
            _stage("stdit3_front", front, "stdit3", {"embed": ""}),
            *(
                _stage(f"stdit3_pair_{i:02}", pair, "stdit3", {f"{kind}_blocks.{i}": kind for kind in blocks})
                for i in range(config.depth)
            ),
            _stage("stdit3_final", _program("stdit3_final", {"": last}, finals), "stdit3", {"final": ""}),
        ]

    def _front_inputs(self, size: Size) -> dict[str, jax.ShapeDtypeStruct]:
        config = self.config.stdit3
        frames, rows, columns = size.latents(self.config.vae)
        inputs = {
            "z_BTHWC": _float32(1, frames, rows, columns, config.in_channels),
            "t_B": _float32(1),
            "caption_BLE": self._activation(1, self.length, config.caption_channels),
            "mask_BL": _float32(1, self.length),
            "fps_B": _float32(1),
            "height_px_B": _float32(1),
            "width_px_B": _float32(1),
        }
        return inputs | ({"frame_mask_BT": _float32(1, frames)} if self.frame_mask else {})

    def vae_decoder(self) -> list[Stage]:
        """Returns the temporal decoder of chunks and the spatial decoder of single frames."""
        channels = self.config.vae.temporal.embed_dim
        temporal: list[_Variant] = []
        spatial: list[_Variant] = []
        for size in self.sizes:
            _, rows, columns = size.latents(self.config.vae)
            for length, latents in _chunk_lengths(self.config, size):
                z = {"z_BTHWC": _float32(1, latents, rows, columns, channels)}
                temporal.append((f"frames_{length}", size, functools.partial(forwards.decode_latents, length), z))
            spatial.append(("main", size, forwards.decode_frames, {"x_BtHWC": self._spatial_latents(1, size)}))
        return [
            self._vae("vae_temporal_decoder", ("temporal_decoder", "stats"), temporal),
            self._vae("vae_spatial_decoder", ("spatial_decoder",), spatial),
        ]

    def vae_encoder(self) -> list[Stage]:
        """Returns the spatial encoder of single frames and the temporal encoder of chunks and of single images."""
        spatial: list[_Variant] = []
        temporal: list[_Variant] = []
        for size in self.sizes:
            frames = {"frames_Bthw3": _float32(1, 1, size.height, size.width, 3)}
            spatial.append(("main", size, forwards.encode_frames, frames))
            for length in sorted({1} | {length for length, _ in _chunk_lengths(self.config, size)}, reverse=True):
                x = {"x_BtHWC": self._spatial_latents(length, size)}
                temporal.append((f"frames_{length}", size, forwards.encode_latents, x))
        return [
            self._vae("vae_spatial_encoder", ("spatial_encoder",), spatial),
            self._vae("vae_temporal_encoder", ("temporal_encoder", "stats"), temporal),
        ]

    def _spatial_latents(self, num_frames: int, size: Size) -> jax.ShapeDtypeStruct:
        _, rows, columns = size.latents(self.config.vae)
        return _float32(1, num_frames, rows, columns, self.config.vae.spatial.latent_channels)

    def _vae(self, name: str, layers: tuple[str, ...], variants: Sequence[_Variant]) -> Stage:
        def build(rngs: nnx.Rngs) -> VAE:
            vae = VAE(self.config.vae, policy=self.policy, forms=self.forms, rngs=rngs)
            for layer in self.config.vae.layers:
                if layer not in layers:
                    delattr(vae, layer)
            return vae

        return _stage(name, _program(name, {"": _shell(build)}, variants), "vae", {layer: layer for layer in layers})

    def _activation(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.policy.compute)


def _shell(build: Callable[[nnx.Rngs], Any]) -> Any:
    return jax.eval_shape(lambda: build(nnx.Rngs(0)))


def _stage(name: str, program: Program, network: str, prefixes: Mapping[str, str]) -> Stage:
    """Returns a stage; ``prefixes`` maps its layers to the prefix their parameters have in the program."""
    parameters: dict[str, str] = {}
    for layer, prefix in prefixes.items():
        start = len(prefix) + 1 if prefix else 0
        mine = [local for local in program.abstract if local.startswith(prefix + "." if prefix else "")]
        parameters |= {local: f"{layer}.{local[start:]}" for local in mine}
    return Stage(name=name, program=program, network=network, layers=tuple(prefixes), parameters=parameters)


def _program(name: str, shells: Mapping[str, Any], variants: Sequence[_Variant], *, keep_float32: bool = False) -> Program:
    """Returns a program whose functions are the variants; sizes with the same shapes share one."""
    abstract = _abstract(shells)
    made: dict[Any, Function] = {}
    for variant, size, body, inputs in variants:
        key = (variant, *((name, spec.shape) for name, spec in inputs.items()))
        if key in made:
            made[key] = dataclasses.replace(made[key], sizes=(*made[key].sizes, size.key))
            continue
        taken = {function.name for function in made.values()}
        call = forwards.bound(body, shells)
        made[key] = Function(
            name=f"{variant}_{size.key}" if variant in taken else variant,
            variant=variant,
            sizes=(size.key,),
            call=call,
            inputs=inputs,
            outputs=jax.eval_shape(lambda params, given, call=call: call(params, **given), abstract, inputs),
        )
    return Program(name=name, abstract=abstract, functions=tuple(made.values()), keep_float32=keep_float32)


def _abstract(shells: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of every parameter by local name: that of its module below the module's prefix."""
    return {
        f"{prefix}.{name}" if prefix else name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for prefix, shell in shells.items()
        for name, leaf in flatten(shell).items()
    }


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _chunk_lengths(config: ModelConfig, size: Size) -> list[tuple[int, int]]:
    """Returns the different (frames, latent frames) of the chunks of a video, whole chunks first."""
    lengths = {(chunk.num_frames, chunk.latents.stop - chunk.latents.start) for chunk in chunks(config.vae, size.num_frames)}
    return sorted(lengths, reverse=True)
