"""Which forms a network computes in: by platform, compute dtype and the bytes of the arrays that a form would make.

A name (see ``names``) becomes `Forms`, which reach the networks as a static field; the bytes of the logits are compared while a
program is traced, for each attention of it.

Invariant: the choice depends on what is named here and on shapes, never on what a machine did before, so equal requests make
equal programs.  On a CPU everything up to one guided clip of 51 frames at 256p is computed whole.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sora_jax.devices.names import check_attention
from sora_jax.networks.attention import DENSE, LEAST_QUERIES, Attention, Chunked, Dense
from sora_jax.networks.attention_kernels import CuDNN, Flash
from sora_jax.networks.forms import Forms

KERNELS: Mapping[str, tuple[str, Attention]] = {"cudnn": ("gpu", CuDNN()), "flash": ("tpu", Flash())}

# Most bytes of the logits of one attention, or of a block's hidden units, that are made at once.
IN_MEMORY_BYTES = 2**28  # CPU: at 256p the most is 147 MB (cross attention of both rows)
STREAMED_BYTES = 80_000_000  # CPU with a memory budget: about a block's weights, or one row of the batch at 256p
ACCELERATOR_BYTES = 2**30
KERNEL_BYTES = 2**28  # up to here, at 256p and over time, a kernel gains nothing
MOST_QUERIES = 1024  # of a chunk: more do not make it faster

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class ByLogits:
    """Dense while the logits take at most ``dense_bytes``, else in chunks of that size.

    Where they take more than ``kernel_bytes``, the first of ``kernels`` that can do it comes before both.  ``unrolled`` and
    ``breaker`` as in `Chunked`.
    """

    dense_bytes: int
    kernels: tuple[Attention, ...] = ()
    kernel_bytes: int = 0
    unrolled: bool = False
    breaker: bool = False

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
        """Returns the averages of the values, see `attention.Attention`; a form that refuses is passed over.

        Where an export leaves lengths symbolic, their logits cannot be counted, and the form is dense.
        """
        options: dict[str, Any] = {"scale": scale, "bias": bias, "mask": mask, "half_range": half_range}
        shape = (*q_BNSK.shape[:3], k_BNLK.shape[2])
        if not all(isinstance(size, int) for size in shape):
            return Dense(self.breaker)(q_BNSK, k_BNLK, v_BNLK, **options)
        for kernel in self.asked(*shape):
            try:
                return kernel(q_BNSK, k_BNLK, v_BNLK, **options)
            except NotImplementedError:
                continue
        at_once = self.queries(*shape)
        form: Attention = Dense(self.breaker)
        if at_once < shape[2]:
            form = Chunked(at_once, unrolled=self.unrolled, breaker=self.breaker)
        return form(q_BNSK, k_BNLK, v_BNLK, **options)

    def asked(self, batch: int, heads: int, queries: int, keys: int) -> tuple[Attention, ...]:
        """Returns the kernels that come before plain XLA, if they can do it."""
        return self.kernels if FLOAT_BYTES * batch * heads * queries * keys > self.kernel_bytes else ()

    def queries(self, batch: int, heads: int, queries: int, keys: int) -> int:
        """Returns how many queries are taken at a time where no kernel is."""
        fitting = self.dense_bytes // (FLOAT_BYTES * batch * heads * keys)
        return queries if queries <= fitting else min(queries, max(LEAST_QUERIES, min(fitting, MOST_QUERIES)))


def choose_forms(attention: str, *, platform: str, dtype: str, streamed: bool = False) -> Forms:
    """Returns the forms that a name stands for.

    Args:
      attention: ``auto``, or a form by name.  A kernel that is named computes what it can (cuDNN and flash take no position
        bias and heads of up to 128 channels), chunks the rest.
      platform: the device's platform, ``cpu``, ``gpu`` or ``tpu``.
      dtype: compute dtype.
      streamed: whether there is a memory budget.

    Raises:
      ValueError: the name is unknown, or its form does not run on the platform or in the dtype.
    """
    check_attention(attention)
    most = ACCELERATOR_BYTES if platform != "cpu" else STREAMED_BYTES if streamed else IN_MEMORY_BYTES
    if attention in KERNELS:
        needed, kernel = KERNELS[attention]
        if platform != needed or dtype != "bfloat16":
            raise ValueError(
                f"attention {attention} needs a {needed} and bfloat16, got {platform} and {dtype}; use auto, chunked or dense."
            )
        return Forms(attention=ByLogits(most, (kernel,)), hidden_bytes=most)
    if attention == "auto":
        # Flash attention on a TPU holds no less memory than chunks and was never timed here: it has to be named.
        kernels = (CuDNN(),) if (platform, dtype) == ("gpu", "bfloat16") else ()
        return Forms(attention=ByLogits(most, kernels, KERNEL_BYTES), hidden_bytes=most)
    return Forms(attention=DENSE if attention == "dense" else Chunked(), hidden_bytes=most)


def queries_at_once(form: Attention, batch: int, heads: int, queries: int, keys: int) -> int:
    """Returns the queries whose logits a form of plain XLA holds at a time."""
    if isinstance(form, ByLogits):
        return form.queries(batch, heads, queries, keys)
    return min(queries, form.queries) if isinstance(form, Chunked) else queries


def form_name(
    form: Attention,
    shape: tuple[int, int, int, int],
    *,
    head_size: int,
    dtype: str,
    biased: bool = False,
    masked: bool = False,
) -> str:
    """Returns what computes an attention: ``dense``, ``chunked`` with the queries of a chunk, or the name of a kernel.

    Args:
      form: what the network was given.
      shape: entries of the batch, heads, queries and keys.
      head_size: channels of a head.
      dtype: compute dtype.
      biased: whether its logits have a bias.
      masked: whether keys are masked.
    """
    batch, heads, queries, keys = shape
    for kernel in form.asked(*shape) if isinstance(form, ByLogits) else ():
        q, k = (jax.ShapeDtypeStruct((batch, heads, length, head_size), dtype) for length in (queries, keys))
        bias = jax.ShapeDtypeStruct((1, heads, queries, keys), jnp.float32) if biased else None
        mask = jax.ShapeDtypeStruct((batch, 1, 1, keys), jnp.bool_) if masked else None
        try:
            jax.eval_shape(lambda q, k, b, m, kernel=kernel: kernel(q, k, k, scale=1.0, bias=b, mask=m), q, k, bias, mask)
            return _KERNEL_NAMES[type(kernel)]
        except NotImplementedError:
            continue
    at_once = queries_at_once(form, *shape)
    return "dense" if at_once == queries else f"chunked {at_once}"


_KERNEL_NAMES = {type(kernel): name for name, (_, kernel) in KERNELS.items()}
