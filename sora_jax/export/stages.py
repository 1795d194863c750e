"""The stages a model is exported in, in execution order: text, transformer, decoder, encoder.

Invariant: every function is a composition of the networks' own forward functions.  Masks are float32 (1 real or sampled,
0 not), because not every target has Boolean inputs; weights are float32 whatever the directory stores.

The transformer's rows R are [conditional, unconditional] of the batch B, and the null caption is appended here; or a function
computes one of the two rows, and a host calls it for each (`Cut.guidance_rows`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sora_jax.config import FLOAT32, DTypePolicy, ModelConfig
from sora_jax.export import forwards
from sora_jax.export.cut import WHOLE_CUT, Cut
from sora_jax.export.program import Function, Program, Stage, Variant, make_program, make_shell, make_stage
from sora_jax.export.size import Size
from sora_jax.networks import merging
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.layers import RMSNorm
from sora_jax.networks.stdit3 import Embed, Final, STDiT3Block
from sora_jax.networks.t5 import T5Block, T5Embed
from sora_jax.networks.vae.codec import VAE, chunks
from sora_jax.pipeline.frame_size import check_multiple

PARTS = ("t5", "stdit3", "vae_decoder", "vae_encoder")
DEFAULT_PARTS = PARTS[:3]
MERGE = merging.Merge()
PAIR, PAIRS = "stdit3_pair", "stdit3_pairs"  # programs of one pair of blocks, and of several

# Children of the layer ``embed`` that project the caption; the rest is the front's where that is a stage of its own.
_CAPTION = ("y_embedder",)
_VIDEO = ("x_embedder", "t_embedder", "fps_embedder", "t_block")
_PAIR_INPUTS = ("x_RTSD", "caption_RLD", "mask_RL", "mod_RF6D")
_FINAL_INPUTS = ("x_RTSD", "t_RD", "t0_RD", "frame_mask_RT")


def list_stages(
    config: ModelConfig,
    sizes: Sequence[Size],
    *,
    parts: Sequence[str] = DEFAULT_PARTS,
    policy: DTypePolicy = FLOAT32,
    forms: Forms = WHOLE,
    cut: Cut = WHOLE_CUT,
    pair_forms: Mapping[str | None, Forms] | None = None,
) -> list[Stage]:
    """Returns the stages of ``parts`` in execution order: text, transformer, decoder, encoder.

    With ``vae_encoder`` the transformer also takes a frame mask, so that a host can pass reference frames.

    Args:
      config: the model.
      sizes: sizes of video.
      parts: what is listed.
      policy: the dtypes.
      forms: the forms of all computations.
      cut: how the transformer is cut.
      pair_forms: the forms of a pair's functions by the name of the form of attention; None: ``forms``, without a name.

    Raises:
      ValueError: a part is unknown, or a size is not one the model can make.
    """
    check_parts(parts)
    for size in sizes:
        check_multiple(config.vae, config.stdit3.patch_size[1], size.height, size.width)
    builder = _Builder(config, sizes, policy=policy, forms=forms, frame_mask="vae_encoder" in parts)
    builds: Sequence[Callable[[], list[Stage]]] = (
        builder.t5,
        functools.partial(builder.stdit3, cut, pair_forms or {None: forms}),
        builder.vae_decoder,
        builder.vae_encoder,
    )
    stages: list[Stage] = []
    for part, build in zip(PARTS, builds, strict=True):
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
            "t5_embed": make_shell(lambda rngs: T5Embed(config, policy=self.policy, rngs=rngs)),
            "t5_block": make_shell(lambda rngs: T5Block(config, policy=self.policy, forms=self.forms, rngs=rngs)),
            "t5_final": make_shell(lambda _: RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, policy=self.policy)),
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
            make_program(name, {"": shells[name]}, [_main(size, bodies[name], inputs[name]) for size in self.sizes])
            for name in shells
        )
        return [
            make_stage("t5_embed", embed, "t5", {"embed": ""}),
            *(make_stage(f"t5_block_{i:02}", block, "t5", {f"block.{i}": ""}) for i in range(config.num_layers)),
            make_stage("t5_final", final, "t5", {"final": ""}),
        ]

    def stdit3(self, cut: Cut, pair_forms: Mapping[str | None, Forms]) -> list[Stage]:
        """Returns front, pairs of blocks and final layer of the transformer, and before them the caption's projection."""
        stages = [self._caption()] if cut.caption_once else []
        front = self._front(cut)
        known = {**(stages[0].functions[0].outputs if stages else {})}
        inputs = {size.key: {**known, **_serving(front.functions, size).outputs} for size in self.sizes}
        last = make_shell(lambda rngs: Final(self.config.stdit3, policy=self.policy, rngs=rngs))
        finals: list[Variant] = []
        for size in self.sizes:
            latent = (*size.latents(self.config.vae)[1:], self.config.stdit3.in_channels)
            taken = {name: inputs[size.key][name] for name in _FINAL_INPUTS if name in inputs[size.key]}
            finals.append(_main(size, functools.partial(forwards.final, latent), taken))
        return [
            *stages,
            make_stage("stdit3_front", front, "stdit3", {"embed": ""}),
            *self._pairs(cut, pair_forms, inputs),
            make_stage("stdit3_final", make_program("stdit3_final", {"": last}, finals), "stdit3", {"final": ""}),
        ]

    def _caption(self) -> Stage:
        """Returns the projection of the caption and of the null caption."""
        inputs = {
            "caption_BLE": self._activation(1, self.length, self.config.stdit3.caption_channels),
            "mask_BL": _float32(1, self.length),
        }
        variants = [_main(size, forwards.caption, inputs) for size in self.sizes]
        program = make_program("stdit3_caption", {"": self._embed(without=_VIDEO)}, variants)
        return make_stage("stdit3_caption", program, "stdit3", {"embed": ""})

    def _front(self, cut: Cut) -> Program:
        alone = functools.partial(forwards.front_alone, cut.guidance_rows)
        shell = self._embed(without=_CAPTION if cut.caption_once else ())
        variants = []
        for size in self.sizes:
            inputs = self._front_inputs(size, caption=not cut.caption_once)
            variants.append(_main(size, alone if cut.caption_once else forwards.front, inputs))
        return make_program("stdit3_front", {"": shell}, variants, keep_float32=True)

    def _embed(self, *, without: Sequence[str]) -> Any:
        """Returns the layer that precedes the blocks, without some of its children."""

        def build(rngs: nnx.Rngs) -> Embed:
            embed = Embed(self.config.stdit3, policy=self.policy, rngs=rngs)
            for child in without:
                delattr(embed, child)
            return embed

        return make_shell(build)

    def _pairs(
        self, cut: Cut, pair_forms: Mapping[str | None, Forms], inputs: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
    ) -> list[Stage]:
        """Returns the pairs, so many to a stage as the cut says; ``inputs`` are what precedes them, by size."""
        count = cut.pairs_per_package
        shells = {form: self._blocks(count, forms) for form, forms in pair_forms.items()}
        variants: list[Variant] = []
        for size in self.sizes:
            taken = {name: _rows(inputs[size.key][name], cut.guidance_rows) for name in _PAIR_INPUTS}
            merges = {"full": None, "merged": MERGE} if taken["x_RTSD"].shape[1] > 1 else {"full": None}
            for form in pair_forms:
                for name, merge in merges.items():
                    body = functools.partial(forwards.pair, merge)
                    variants.append(Variant(name=name, size=size, body=body, inputs=taken, shells=shells[form], form=form))
        name = PAIR if count == 1 else PAIRS
        program = make_program(name, next(iter(shells.values())), variants)
        return [
            make_stage(f"{name}_{number:02}", program, "stdit3", _layers(number * count, count))
            for number in range(self.config.stdit3.depth // count)
        ]

    def _blocks(self, count: int, forms: Forms) -> dict[str, Any]:
        """Returns the blocks of so many pairs, by the prefix of their parameters."""

        def block(temporal: bool) -> Any:
            config, policy = self.config.stdit3, self.policy
            return make_shell(lambda rngs: STDiT3Block(config, temporal=temporal, policy=policy, forms=forms, rngs=rngs))

        pair = {"spatial": block(False), "temporal": block(True)}
        return {prefix: pair[prefix.rpartition(".")[2]] for prefix in _layers(0, count).values()}

    def _front_inputs(self, size: Size, *, caption: bool) -> dict[str, jax.ShapeDtypeStruct]:
        config = self.config.stdit3
        frames, rows, columns = size.latents(self.config.vae)
        captions = {
            "caption_BLE": self._activation(1, self.length, config.caption_channels),
            "mask_BL": _float32(1, self.length),
        }
        return {
            "z_BTHWC": _float32(1, frames, rows, columns, config.in_channels),
            "t_B": _float32(1),
            **(captions if caption else {}),
            "fps_B": _float32(1),
            "height_px_B": _float32(1),
            "width_px_B": _float32(1),
            **({"frame_mask_BT": _float32(1, frames)} if self.frame_mask else {}),
        }

    def vae_decoder(self) -> list[Stage]:
        """Returns the temporal decoder of chunks and the spatial decoder of single frames."""
        channels = self.config.vae.temporal.embed_dim
        temporal: list[Variant] = []
        spatial: list[Variant] = []
        for size in self.sizes:
            _, rows, columns = size.latents(self.config.vae)
            for length, latents in _chunk_lengths(self.config, size):
                z = {"z_BTHWC": _float32(1, latents, rows, columns, channels)}
                body = functools.partial(forwards.decode_latents, length)
                temporal.append(Variant(name=f"frames_{length}", size=size, body=body, inputs=z))
            spatial.append(_main(size, forwards.decode_frames, {"x_BtHWC": self._spatial_latents(1, size)}))
        return [
            self._vae("vae_temporal_decoder", ("temporal_decoder", "stats"), temporal),
            self._vae("vae_spatial_decoder", ("spatial_decoder",), spatial),
        ]

    def vae_encoder(self) -> list[Stage]:
        """Returns the spatial encoder of single frames and the temporal encoder of chunks and of single images."""
        spatial: list[Variant] = []
        temporal: list[Variant] = []
        for size in self.sizes:
            frames = {"frames_Bthw3": _float32(1, 1, size.height, size.width, 3)}
            spatial.append(_main(size, forwards.encode_frames, frames))
            for length in sorted({1} | {length for length, _ in _chunk_lengths(self.config, size)}, reverse=True):
                x = {"x_BtHWC": self._spatial_latents(length, size)}
                temporal.append(Variant(name=f"frames_{length}", size=size, body=forwards.encode_latents, inputs=x))
        return [
            self._vae("vae_spatial_encoder", ("spatial_encoder",), spatial),
            self._vae("vae_temporal_encoder", ("temporal_encoder", "stats"), temporal),
        ]

    def _spatial_latents(self, num_frames: int, size: Size) -> jax.ShapeDtypeStruct:
        _, rows, columns = size.latents(self.config.vae)
        return _float32(1, num_frames, rows, columns, self.config.vae.spatial.latent_channels)

    def _vae(self, name: str, layers: tuple[str, ...], variants: Sequence[Variant]) -> Stage:
        def build(rngs: nnx.Rngs) -> VAE:
            vae = VAE(self.config.vae, policy=self.policy, forms=self.forms, rngs=rngs)
            for layer in self.config.vae.layers:
                if layer not in layers:
                    delattr(vae, layer)
            return vae

        program = make_program(name, {"": make_shell(build)}, variants)
        return make_stage(name, program, "vae", {layer: layer for layer in layers})

    def _activation(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.policy.compute)


def _main(size: Size, body: Callable[..., dict[str, jax.Array]], inputs: Mapping[str, jax.ShapeDtypeStruct]) -> Variant:
    return Variant(name="main", size=size, body=body, inputs=inputs)


def _serving(functions: Sequence[Function], size: Size) -> Function:
    return next(function for function in functions if size.key in function.sizes)


def _rows(spec: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of so many rows; the caption's projection makes both."""
    return jax.ShapeDtypeStruct((rows, *spec.shape[1:]), spec.dtype)


def _layers(first: int, count: int) -> dict[str, str]:
    """Returns the prefix of the parameters of every block of a stage, by its layer."""
    numbers = range(count)
    return {
        f"{kind}_blocks.{first + number}": kind if count == 1 else f"{number}.{kind}"
        for number in numbers
        for kind in ("spatial", "temporal")
    }


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _chunk_lengths(config: ModelConfig, size: Size) -> list[tuple[int, int]]:
    """Returns the different (frames, latent frames) of the chunks of a video, whole chunks first."""
    lengths = {(chunk.num_frames, chunk.latents.stop - chunk.latents.start) for chunk in chunks(config.vae, size.num_frames)}
    return sorted(lengths, reverse=True)
