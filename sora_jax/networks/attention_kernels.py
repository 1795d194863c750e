"""Forms of attention that are one platform's own kernels: cuDNN's on NVIDIA GPUs, Pallas flash attention on TPUs.

Invariant: no logits are written to the device's memory, and the result is that of ``attention.Dense`` up to the rounding of
the compute dtype.  Programs that hold a kernel cannot be exported, and its axes cannot be spread over a mesh.  Whether a
kernel pays is decided outside.
"""

import dataclasses
from typing import Literal, NoReturn

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

HALF_DTYPES = ("bfloat16", "float16")
LANES = 128  # of a TPU: the kernel's blocks are multiples of it


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """cuDNN's fused attention, through `jax.nn.dot_product_attention`.

    Takes bfloat16 and float16 and heads of up to 128 channels.  A mask must be one of keys: those that may be seen are moved
    to the front, because the kernel takes their number and not a mask (jax issue 28974); the order of keys does not matter.

    ``implementation`` is for tests: ``"xla"`` runs the same call anywhere, in any dtype.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"

    def __call__(
        self,
        q_BNSK: Float[Array, "B N S K"],
        k_BNLK: Float[Array, "B N L K"],
        v_BNLK: Float[Array, "B N L K"],
        *,
        scale: float,
        bias: Float[Array, "#B #N #S L"] | None = None,
        mask: Bool[Array, "#B #N #S L"] | None = None,
        half_range: bool = False,
    ) -> Float[Array, "B N S K"]:
        """Returns the averages of the values, see `attention.Attention`."""
        mask_BL = _key_mask("cuDNN", q_BNSK, k_BNLK, bias, mask, half_range)
        size = q_BNSK.shape[-1]
        if self.implementation == "cudnn" and str(q_BNSK.dtype) not in HALF_DTYPES:
            _refuse("cuDNN", f"{q_BNSK.dtype}; it computes in {' and '.join(HALF_DTYPES)}")
        if size % 8 or size > LANES:
            _refuse("cuDNN", f"heads of {size} channels; it takes multiples of 8 up to {LANES}")
        q, k, v = (rearrange(x, "b n s k -> b s n k") for x in (q_BNSK, k_BNLK, v_BNLK))
        lengths_B = None
        if mask_BL is not None:
            k, v, lengths_B = _visible_first(k, v, mask_BL)
        out_BSNK = jax.nn.dot_product_attention(
            q, k, v, scale=scale, key_value_seq_lengths=lengths_B, implementation=self.implementation
        )
        return rearrange(out_BSNK, "b s n k -> b n s k")


@dataclasses.dataclass(frozen=True)
class Flash:
    """Pallas flash attention of a TPU, from `jax.experimental.pallas.ops.tpu`.

    Takes bfloat16 (it would round float32 operands), at least 128 queries and 128 keys, and a mask of keys, as segments.
    Queries and keys are padded to whole blocks, of the size up to ``block`` that pads least.
    """

    block: int = 512

    def __call__(
        self,
        q_BNSK: Float[Array, "B N S K"],
        k_BNLK: Float[Array, "B N L K"],
        v_BNLK: Float[Array, "B N L K"],
        *,
        scale: float,
        bias: Float[Array, "#B #N #S L"] | None = None,
        mask: Bool[Array, "#B #N #S L"] | None = None,
        half_range: bool = False,
    ) -> Float[Array, "B N S K"]:
        """Returns the averages of the values, see `attention.Attention`."""
        from jax.experimental.pallas.ops.tpu import flash_attention as pallas  # takes a second to import

        mask_BL = _key_mask("flash", q_BNSK, k_BNLK, bias, mask, half_range)
        batch, _, queries, size = q_BNSK.shape
        keys = k_BNLK.shape[2]
        if q_BNSK.dtype != jnp.bfloat16:
            _refuse("flash", f"{q_BNSK.dtype}; it computes in bfloat16")
        if min(queries, keys) < LANES or size > LANES:
            _refuse(
                "flash", f"{queries} queries and {keys} keys of {size} channels; it takes {LANES} or more, of up to {LANES}"
            )
        block_q, block_k = self._block(queries), self._block(keys)
        q, k, v = _padded(q_BNSK, block_q), _padded(k_BNLK, block_k), _padded(v_BNLK, block_k)
        visible_BL = jnp.ones((batch, keys), bool) if mask_BL is None else mask_BL
        segments = pallas.SegmentIds(
            q=jnp.ones((batch, q.shape[2]), jnp.int32),
            kv=jnp.pad(visible_BL.astype(jnp.int32), ((0, 0), (0, k.shape[2] - keys))),
        )
        sizes = pallas.BlockSizes(block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1)
        out = pallas.flash_attention(q, k, v, segment_ids=segments, sm_scale=scale, block_sizes=sizes)
        return out[:, :, :queries]

    def _block(self, length: int) -> int:
        """Returns the block that pads least; of several the largest."""
        blocks = range(LANES, self.block + 1, LANES)
        return min(blocks, key=lambda block: (-(-length // block) * block, -block))


def _key_mask(
    form: str, q_BNSK: Array, k_BNLK: Array, bias: Array | None, mask: Array | None, half_range: bool
) -> Bool[Array, "B L"] | None:
    """Returns the mask as one of keys, for each entry of the batch; refuses what no kernel does."""
    if half_range:
        _refuse(form, "programs that must stay within float16's range")
    if bias is not None:
        _refuse(form, "a bias of the logits")
    if mask is None:
        return None
    if mask.shape[1:3] != (1, 1):
        _refuse(form, f"a mask of shape {mask.shape}; it takes one of keys alone, (batch, 1, 1, keys)")
    return jnp.broadcast_to(mask[:, 0, 0], (q_BNSK.shape[0], k_BNLK.shape[2]))


def _visible_first(
    k_BLNK: Array, v_BLNK: Array, mask_BL: Bool[Array, "B L"]
) -> tuple[Float[Array, "B L N K"], Float[Array, "B L N K"], Int[Array, "B"]]:
    """Returns keys and values with the visible ones in front, and how many those are."""
    order_BL11 = jnp.argsort(~mask_BL, axis=1, stable=True)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, order_BL11, axis=1) for x in (k_BLNK, v_BLNK))
    return k, v, jnp.sum(mask_BL, axis=1, dtype=jnp.int32)


def _padded(x_BNSK: Array, block: int) -> Array:
    return jnp.pad(x_BNSK, ((0, 0), (0, 0), (0, -x_BNSK.shape[2] % block), (0, 0)))


def _refuse(form: str, what: str) -> NoReturn:
    raise NotImplementedError(f"{form} attention cannot do {what}.")
