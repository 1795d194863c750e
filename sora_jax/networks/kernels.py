"""A matrix that stays int8 in memory and is multiplied out a few columns at a time, where it is used.

Invariant: the product is that with the float32 matrix, and no more than ``TILE_ELEMENTS`` of that are in memory at a time: a
compiler would otherwise multiply out every matrix of a program before the first product.
"""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

TILE_ELEMENTS = 2**22


@jax.tree_util.register_dataclass
@no_type_check  # a pytree also holds shapes and paths in place of arrays
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """The kernel ``values_IO * scale_O`` of a linear map."""

    values_IO: Int8[Array, "I O"]
    scale_O: Float[Array, "O"]

    def __getitem__(self, key: object) -> "Int8Matrix":
        """Returns the whole matrix for ``[...]``, which is how the value of a parameter is read; other indices are refused."""
        if key is not Ellipsis:
            raise TypeError(f"an int8 matrix has no part {key!r}; only [...], the whole, is defined.")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Features in and out."""
        return self.values_IO.shape

    def product(
        self, x_MI: Float[Array, "M I"], *, precision: jax.lax.Precision | None, dtype: DTypeLike
    ) -> Float[Array, "M O"]:
        """Returns ``x @ matrix`` in float32, the matrix rounded to ``dtype``."""
        features, outputs = self.shape
        count = _tiles(features, outputs)
        width = outputs // count

        def tile(first: Array) -> Array:
            values = jax.lax.dynamic_slice_in_dim(self.values_IO, first, width, axis=1).astype(jnp.float32)
            kernel = values * jax.lax.dynamic_slice_in_dim(self.scale_O, first, width)[None, :]
            return jnp.matmul(x_MI, kernel.astype(dtype), precision=precision, preferred_element_type=jnp.float32)

        return rearrange(jax.lax.map(tile, width * jnp.arange(count)), "n m o -> m (n o)")


def _tiles(features: int, outputs: int) -> int:
    """Returns the smallest number of equal tiles of columns that are small enough."""
    least = -(-features * outputs // TILE_ELEMENTS)
    return next(count for count in range(max(1, least), outputs + 1) if outputs % count == 0)
