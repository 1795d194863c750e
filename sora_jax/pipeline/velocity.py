"""STDiT3 and its conditions as the velocity of the sampler.

Invariant: everything that differs between two samplings of equal shapes is an array of this pytree, so that one compiled
program serves all prompts, sizes and weights.  Guidance, times, and when to merge or to reuse belong to the sampler.
"""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Bool, Float

from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import STDiT3
from sora_jax.streaming.network import StreamedSTDiT3


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """A ``velocity_fn`` for `sampler.sample`: a network, a caption for each row, and the sizes of the video.

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

    def __call__(
        self,
        z_RTHWC: Float[Array, "R T H W C"],
        t_R: Float[Array, "R"],
        *,
        frame_mask_BT: Bool[Array, "R T"] | None = None,
        merge: bool = False,
        residual: Float[Array, "R T S D"] | None = None,
        keep_residual: bool = False,
    ) -> Float[Array, "R T H W C"] | tuple[Float[Array, "R T H W C"], Float[Array, "R T S D"]]:
        """Returns the velocity of the latents, float32; fewer rows than captions use the first captions.

        With ``keep_residual`` also what the block stack added to its tokens; ``residual`` is added in place of the stack.
        """
        rows, channels = len(z_RTHWC), z_RTHWC.shape[-1]
        tokens_RTSD, conditioning = self.network.embed(
            z_RTHWC,
            t_R,
            self.caption_RLE[:rows],
            None if self.mask_BL is None else self.mask_BL[:rows],
            fps_B=self.fps[:rows],
            height_px_B=self.height_px[:rows],
            width_px_B=self.width_px[:rows],
            frame_mask_BT=frame_mask_BT,
        )
        if residual is None:
            out_RTSD = self.network.stack(tokens_RTSD, conditioning, merge=self.merge if merge else None)
        else:
            out_RTSD = tokens_RTSD + residual
        v = self.network.final(out_RTSD, conditioning, height=z_RTHWC.shape[2], width=z_RTHWC.shape[3])[..., :channels]
        return (v, out_RTSD - tokens_RTSD) if keep_residual else v
