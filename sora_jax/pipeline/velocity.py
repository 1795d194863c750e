"""STDiT3 and its conditions as the velocity of the sampler.

Invariant: everything that differs between two samplings of equal shapes is an array of this pytree, so that one compiled
program serves all prompts, sizes and weights.  Guidance, times, and when to merge or to reuse belong to the sampler.
"""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Bool, Float

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
        tokens_RTSD, conditioning = self._embed(z, t_B, frame_mask_BT)
        return self._final(z, self._stack(tokens_RTSD, conditioning, merged=merged), conditioning)

    def evaluate_keeping(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merged: bool = False,
    ) -> tuple[Float[Array, "R T H W C"], Float[Array, "R T S D"]]:
        """Returns the same, and what the block stack added to its tokens."""
        tokens_RTSD, conditioning = self._embed(z, t_B, frame_mask_BT)
        out_RTSD = self._stack(tokens_RTSD, conditioning, merged=merged)
        return self._final(z, out_RTSD, conditioning), out_RTSD - tokens_RTSD

    def reuse(
        self,
        z: Float[Array, "R T H W C"],
        t_B: Float[Array, "R"],
        residual: Float[Array, "R T S D"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
    ) -> Float[Array, "R T H W C"]:
        """Returns the velocity with ``residual`` added to the embedded tokens in place of the block stack."""
        tokens_RTSD, conditioning = self._embed(z, t_B, frame_mask_BT)
        return self._final(z, tokens_RTSD + residual, conditioning)

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
        return self.network.embed(
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
        return self.network.final(tokens_RTSD, conditioning, height=z.shape[2], width=z.shape[3])[..., : z.shape[-1]]
