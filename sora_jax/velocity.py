"""STDiT3 and its conditions as the velocity of the sampler.

Invariant: everything that differs between two samplings of equal shapes is an array of this pytree, so that one compiled
program serves all prompts, sizes and weights.  Guidance, times and the decision to merge belong to the sampler.
"""

import dataclasses
from typing import no_type_check

import jax
from jaxtyping import Array, Bool, Float

from sora_jax.merging import Merge
from sora_jax.stdit3 import STDiT3


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True, kw_only=True)
class Velocity:
    """A ``velocity_fn`` for `sampler.sample`: a network, a caption for each row, and the sizes of the video.

    Attributes:
      network: the transformer.
      caption_RLE: text features of every row; with guidance the null captions follow the prompts' captions.
      mask_BL: True where a caption token is real; shared by both halves of a guided batch.  None: all are real.
      fps: frames per second (120 for images), one value or one for each row; float32, as the sizes.
      height_px: height of the video.
      width_px: width of the video.
      merge: what merged steps merge; static.
    """

    network: STDiT3
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
    ) -> Float[Array, "R T H W C"]:
        """Returns the velocity of the latents, float32; fewer rows than captions use the first captions."""
        rows, channels = len(z_RTHWC), z_RTHWC.shape[-1]
        out = self.network(
            z_RTHWC,
            t_R,
            self.caption_RLE[:rows],
            None if self.mask_BL is None else self.mask_BL[:rows],
            fps_B=self.fps[:rows],
            height_px_B=self.height_px[:rows],
            width_px_B=self.width_px[:rows],
            frame_mask_BT=frame_mask_BT,
            merge=self.merge if merge else None,
        )
        return out[..., :channels]
