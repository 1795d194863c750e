"""The transformer with the weights of its blocks stacked, so that a program holds one pair of blocks however many there are.

Invariant: embedding, block and final layer are those of `networks.stdit3`; only the loop over pairs is another, with the same
operations in the same order.  Weights are stacked as shapes only: nothing is copied here.
"""

import dataclasses
from typing import Any, Self, no_type_check

import jax
from jaxtyping import Array, Float

from sora_jax import layout
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, Embed, Final, STDiT3


@jax.tree_util.register_dataclass
@no_type_check  # the tree also holds shapes
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScannedSTDiT3:
    """A transformer for `pipeline.velocity.Velocity`.

    Attributes:
      embed: what comes before the blocks.
      spatial: a spatial block whose arrays have a first axis, one entry for each block.
      temporal: likewise.
      final: what comes after the blocks.
    """

    embed: Embed
    spatial: Any
    temporal: Any
    final: Final

    @classmethod
    def of_shapes(cls, network: STDiT3) -> Self:
        """Returns the shapes of a network of shapes, those of equal blocks stacked."""

        def stacked(blocks: Any) -> Any:
            def stack(leaf: Any) -> Any:
                if isinstance(leaf, layout.Spread):
                    return layout.Spread(stack(leaf.values), axis=1)
                return jax.ShapeDtypeStruct((len(blocks), *leaf.shape), leaf.dtype)

            return jax.tree.map(stack, blocks[0], is_leaf=lambda leaf: isinstance(leaf, layout.Spread))

        spatial, temporal = stacked(network.spatial_blocks), stacked(network.temporal_blocks)
        return cls(embed=network.embed, spatial=spatial, temporal=temporal, final=network.final)

    def stack(
        self, x_BTSD: Float[Array, "B T S D"], conditioning: Conditioning, *, merge: Merge | None = None
    ) -> Float[Array, "B T S D"]:
        """Returns the tokens after all blocks, as `STDiT3.stack` does."""

        def pair(x_BTSD: Array, blocks: tuple[Any, Any]) -> tuple[Array, None]:
            for block in blocks:
                x_BTSD = block(x_BTSD, conditioning, merge=merge)
            return x_BTSD, None

        return jax.lax.scan(pair, x_BTSD, (self.spatial, self.temporal))[0]
