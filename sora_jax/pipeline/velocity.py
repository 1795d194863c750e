"""STDiT3 and its conditions as the velocity of the sampler.

Invariant: everything that differs between two samplings of equal shapes is an array of this pytree, so that one compiled
program serves all prompts, sizes and weights.  Guidance, times, and when to merge or to reuse belong to the sampler.
"""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax import layout
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, Part, STDiT3
from sora_jax.streaming.network import StreamedSTDiT3


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """A `sampling.velocity.WatchedVelocity`: a network, a caption for each row, and the sizes of the video.

    Attributes:
      network: the transformer, in memory or streamed.
      caption_RLE: text features of every row; with guidance the null captions follow the prompts' captions.
      mask_BL: True where a caption token is real; shared by both halves of a guided batch.  None: all are real.
      fps: frames per second (120 for images), one value or one for each row; float32, as the sizes.
      height_px: height of the video.
      width_px: width of the video.
      merge: what merged steps merge; static.
    """

    network: STDiT3 | StreamedSTDiT3
    caption_RLE: Float[Array, "R L E"]
    mask_BL: Bool[Array, "B L"] | None
    fps: Float[Array, "N"]
    height_px: Float[Array, "N"]
    width_px: Float[Array, "N"]
    merge: Merge = dataclasses.field(default=Merge(), metadata={"static": True})

    def evaluate(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merged: bool = False,
    ) -> Float[Array, "R T H W C"]:
        """Returns the velocity of the latents, float32; fewer rows than captions use the first captions."""
        v, _ = self._computed(z, t_B, frame_mask_BT, merged=merged)
        return v

    def evaluate_keeping(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merged: bool = False,
    ) -> tuple[Float[Array, "R T H W C"], Float[Array, "R T S D"]]:
        """Returns the same, and what the block stack added to its tokens; on a mesh, with padded places (`layout.padded`)."""
        v, residual = self._computed(z, t_B, frame_mask_BT, merged=merged, keep=True)
        assert residual is not None
        return v, residual

    def reuse(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        residual: Float[Array, "R T S D"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
    ) -> Float[Array, "R T H W C"]:
        """Returns the velocity with ``residual`` added to the embedded tokens in place of the block stack."""
        v, _ = self._computed(z, t_B, frame_mask_BT, residual)
        return v

    def _computed(
        self,
        z: Array,
        t_R: Array,
        frame_mask_RT: Array | None,
        residual: Array | None = None,
        *,
        merged: bool = False,
        keep: bool = False,
    ) -> tuple[Array, Array | None]:
        """Returns the velocity of all rows, and on request the residual; on a mesh each device computes its part of both."""
        num_rows = len(z)
        spec, kept = layout.rows(num_rows), layout.tokens(num_rows)

        def compute(velocity: "Velocity", given: dict[str, Any]) -> tuple[Array, Array | None]:
            v, added = velocity._forward(**given, merged=merged, keep=keep)
            return layout.all_rows(v, spec), added

        spread = dict.fromkeys(("z", "t_R", "frame_mask_RT"), spec) | {"residual": kept}
        given = {**layout.everywhere({"z": z, "t_R": t_R, "frame_mask_RT": frame_mask_RT}), "residual": residual}
        return layout.over_mesh(
            compute,
            (self._of_rows(num_rows), given),
            (self._specs(spec), {name: None if given[name] is None else one for name, one in spread.items()}),
            (layout.NOWHERE, kept if keep else None),
        )

    def _forward(
        self,
        z: Array,
        t_R: Array,
        frame_mask_RT: Array | None,
        residual: Array | None,
        *,
        merged: bool,
        keep: bool,
    ) -> tuple[Array, Array | None]:
        tokens_RTSD, conditioning = self._embed(z, t_R, frame_mask_RT)
        if residual is None:
            out_RTSD = self.network.stack(tokens_RTSD, conditioning, merge=self.merge if merged else None)
        else:
            out_RTSD = tokens_RTSD + residual
        return self._final(z, out_RTSD, conditioning), out_RTSD - tokens_RTSD if keep else None

    def _of_rows(self, count: int) -> "Velocity":
        """Returns the velocity of the first rows; on a mesh, with conditions that are given for every row, to be spread."""
        if not layout.sizes():
            return self
        mask = None if self.mask_BL is None else jnp.tile(self.mask_BL, (-(-count // len(self.mask_BL)), 1))[:count]
        fps = jnp.tile(self.fps, -(-count // len(self.fps)))[:count]
        return dataclasses.replace(self, caption_RLE=self.caption_RLE[:count], mask_BL=mask, fps=fps)

    def _specs(self, spec: Any) -> "Velocity":
        """Returns how every array of the velocity is spread where rows are spread by ``spec``."""
        specs: dict[str, Any] = {"height_px": layout.NOWHERE, "width_px": layout.NOWHERE}
        return dataclasses.replace(
            self,
            **specs,
            network=layout.parameters(self.network),
            caption_RLE=spec,
            mask_BL=None if self.mask_BL is None else spec,
            fps=spec,
        )

    def modulated_input(
        self, z: Float[Array, "R T H W C"], t_B: Float[Array, "R"], *, frame_mask_BT: Bool[Array, "R T"] | None = None
    ) -> Float[Array, "R T S D"]:
        """Returns what the self attention of the first block would see."""
        return self.network.modulated_input(*self._embed(z, t_B, frame_mask_BT))

    def first_block(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merged: bool = False,
    ) -> tuple[Float[Array, "R T S D"], Float[Array, "R T S D"]]:
        """Returns the tokens after the first block, and what it added to them."""
        tokens_RTSD, conditioning = self._embed(z, t_B, frame_mask_BT)
        out_RTSD = self._stack(tokens_RTSD, conditioning, merged=merged, part="first")
        return out_RTSD, out_RTSD - tokens_RTSD

    def rest(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        tokens: Float[Array, "R T S D"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merged: bool = False,
    ) -> tuple[Float[Array, "R T H W C"], Float[Array, "R T S D"]]:
        """Returns the velocity from the tokens after the first block, and what the other blocks added to them."""
        _, conditioning = self._embed(z, t_B, frame_mask_BT)
        out_RTSD = self._stack(tokens, conditioning, merged=merged, part="rest")
        return self._final(z, out_RTSD, conditioning), out_RTSD - tokens

    def first_block_share(self) -> float:
        """Returns which part of an evaluation the first block is: one of all blocks."""
        return 1 / (2 * self.network.config.depth)

    def _embed(self, z: Array, t_R: Array, frame_mask_RT: Array | None) -> tuple[Array, Conditioning]:
        rows = len(z)
        return layout.after(z, self.network.embed)(
            z,
            t_R,
            self.caption_RLE[:rows],
            None if self.mask_BL is None else self.mask_BL[:rows],
            fps_B=self.fps[:rows],
            height_px_B=self.height_px[:rows],
            width_px_B=self.width_px[:rows],
            frame_mask_BT=frame_mask_RT,
        )

    def _stack(self, tokens_RTSD: Array, conditioning: Conditioning, *, merged: bool, part: Part = "all") -> Array:
        return self.network.stack(tokens_RTSD, conditioning, merge=self.merge if merged else None, part=part)

    def _final(self, z: Array, tokens_RTSD: Array, conditioning: Conditioning) -> Array:
        final = layout.after(tokens_RTSD, self.network.final)
        return final(tokens_RTSD, conditioning, height=z.shape[2], width=z.shape[3])[..., : z.shape[-1]]
