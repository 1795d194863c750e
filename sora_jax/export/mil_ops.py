"""The MIL operations that exported programs consist of, in NumPy.

Invariant: a function is named by `OPERATIONS` as its operation and takes the operation's parameters by their MIL names and
with their MIL defaults, so an unexpected parameter is an error.  Floats arrive as float32 whatever is declared, sums are
float32; the interpreter rounds the result to the declared dtype.

Source: coremltools' documentation of the MIL operations, opset iOS 18.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Scalar = np.ndarray | np.generic | float | bool  # of MIL: a tensor of rank 0
Result = np.ndarray | np.generic  # NumPy makes scalars of arrays of rank 0


# Shape.


def reshape(x: Array, shape: Array) -> Array:
    """Returns the elements in a new shape, one of whose axes may be -1."""
    return x.reshape(tuple(shape))


def transpose(x: Array, perm: Array) -> Array:
    """Returns the axes in another order."""
    return np.transpose(x, perm)


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Returns ``x`` without axes of length 1."""
    return np.squeeze(x, None if axes is None else tuple(axes))


def expand_dims(x: Array, axes: Array) -> Array:
    """Returns ``x`` with axes of length 1 where the result has them."""
    return np.expand_dims(x, tuple(axes))


def concat(values: Sequence[Array], axis: Scalar, interleave: Scalar = False) -> Array:
    """Returns arrays joined along an axis."""
    if interleave:
        raise NotImplementedError("interleave=True")
    return np.concatenate(values, int(axis))


def tile(x: Array, reps: Array) -> Array:
    """Returns ``x`` repeated as a whole along its axes."""
    return np.tile(x, tuple(reps))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Returns ``x[begin:end:stride]`` of every axis; masked bounds are open, squeezed axes are indexed by ``begin``."""
    return x[_slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """Returns ``x`` with the part that `slice_by_index` selects replaced."""
    out = x.copy()
    out[_slices(begin, end, stride, begin_mask, end_mask, squeeze_mask)] = update
    return out


def _slices(
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    rank = len(begin)
    masks = [[False] * rank if mask is None else list(mask) for mask in (begin_mask, end_mask, squeeze_mask)]
    steps = [1] * rank if stride is None else list(stride)
    axes = zip(begin, end, steps, *masks, strict=True)
    return tuple(
        int(first) if squeezed else slice(None if open_begin else int(first), None if open_end else int(last), int(step))
        for first, last, step, open_begin, open_end, squeezed in axes
    )


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """Returns ``size`` elements from ``begin`` along every axis; -1 is all that are left."""
    return x[tuple(slice(int(b), None if s == -1 else int(b + s)) for b, s in zip(begin, size, strict=True))]


def gather(
    x: Array,
    indices: Array,
    axis: Scalar = 0,
    batch_dims: Scalar = 0,
    validate_indices: Scalar = False,
) -> Array:
    """Returns the entries of an axis that ``indices`` name; one that does not exist is an error in any case."""
    if batch_dims:
        raise NotImplementedError(f"batch_dims={batch_dims}")
    return np.take(x, indices.astype(np.int64), axis=int(axis))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Scalar = 0.0) -> Array:
    """Returns ``x`` with a border around its last axes."""
    widths = np.asarray(pad).reshape(-1, 2)
    widths = np.concatenate([np.zeros((x.ndim - len(widths), 2), widths.dtype), widths])
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    return np.pad(x, widths, mode="edge" if mode == "replicate" else "reflect")


# One element at a time.


def cast(x: Array, dtype: str) -> Result:
    """Returns ``x``: the declared type of the result converts it."""
    return x


def select(cond: Array, a: Array, b: Array) -> Result:
    """Returns ``a`` where the condition holds, else ``b``."""
    return np.where(cond, a, b)


def rsqrt(x: Array, epsilon: Scalar = 1e-12) -> Result:
    """Returns the inverse square root of ``x + epsilon``."""
    return 1 / np.sqrt(x + np.float32(epsilon))


def gelu(x: Array, mode: str = "EXACT") -> Result:
    """Returns the GELU in one of its approximations."""
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return x / (1 + np.exp(np.float32(-1.702) * x))
    raise NotImplementedError(f"mode={mode!r}")


def _unary(function: Callable[[Array], Result]) -> Callable[..., Result]:
    def operation(x: Array) -> Result:
        return function(x)

    return operation


def _binary(function: Callable[[Array, Array], Result]) -> Callable[..., Result]:
    def operation(x: Array, y: Array) -> Result:
        return function(x, y)

    return operation


# Sums.


def _reduction(function: Callable[..., Result]) -> Callable[..., Result]:
    def operation(x: Array, axes: Array | None = None, keep_dims: Scalar = False) -> Result:
        return function(x, axis=None if axes is None else tuple(axes), keepdims=bool(keep_dims))

    return operation


def matmul(x: Array, y: Array, transpose_x: Scalar = False, transpose_y: Scalar = False) -> Array:
    """Returns the product of the last two axes."""
    x = np.swapaxes(x, -1, -2) if transpose_x else x
    y = np.swapaxes(y, -1, -2) if transpose_y else y
    return x @ y


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Returns ``x @ weight.T + bias``; the weight is stored (out, in)."""
    return x @ weight.T if bias is None else x @ weight.T + bias


def softmax(x: Array, axis: Scalar = -1) -> Array:
    """Returns exponentials that sum to 1 along an axis."""
    shifted = np.exp(x - x.max(int(axis), keepdims=True))
    return shifted / shifted.sum(int(axis), keepdims=True)


def scaled_dot_product_attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """Returns attention with logits over the root of the head size; a mask is Boolean (True: seen) or added."""
    logits = (query * np.float32(query.shape[-1] ** -0.5)) @ np.swapaxes(key, -1, -2)
    if attn_mask is not None:
        logits = np.where(attn_mask, logits, np.float32(-np.inf)) if attn_mask.dtype == np.bool_ else logits + attn_mask
    return softmax(logits) @ value


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Scalar = 1,
) -> Array:
    """Returns the convolution of [N, C, *space] with a weight [O, C / groups, *kernel]: a product for each kernel tap."""
    rank = x.ndim - 2
    kernel = weight.shape[2:]
    stride, dilation = ([1] * rank if given is None else [int(n) for n in given] for given in (strides, dilations))
    widths = _conv_padding(x.shape[2:], kernel, stride, dilation, pad_type, pad)
    x = np.pad(x, [(0, 0), (0, 0), *widths])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    out = np.zeros((len(x), len(weight), math.prod(sizes)), np.float32)
    parts = list(zip(np.split(x, int(groups), 1), np.split(weight, int(groups)), strict=True))
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, sizes, stride, strict=True))
        at: tuple[Any, ...] = (..., *tap)
        seen: tuple[Any, ...] = (..., *window)
        products = [w[at] @ part[seen].reshape(len(x), w.shape[1], -1) for part, w in parts]
        out += np.concatenate(products, axis=1)
    if bias is not None:
        out += bias[:, None]
    return out.reshape(len(x), len(weight), *sizes)


def _conv_padding(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], kind: str, pad: Array | None
) -> list[tuple[int, int]]:
    """Returns how many zeros come before and after each axis of space."""
    if kind == "valid":
        return [(0, 0)] * len(space)
    if kind == "custom":
        return [(int(before), int(after)) for before, after in np.asarray(pad).reshape(-1, 2)]
    if kind not in ("same", "same_lower"):
        raise NotImplementedError(f"pad_type={kind!r}")
    widths = []
    for n, k, s, d in zip(space, kernel, stride, dilation, strict=True):
        total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        less, more = total // 2, total - total // 2
        widths.append((less, more) if kind == "same" else (more, less))
    return widths


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Scalar = 1e-5,
) -> Array:
    """Returns ``gamma * (x - mean) / sqrt(variance + epsilon) + beta``, one value of each for every channel (axis 1)."""
    shape = (1, -1, *(1,) * (x.ndim - 2))
    gain = (1 if gamma is None else gamma) / np.sqrt(variance + np.float32(epsilon))
    offset = (0 if beta is None else beta) - mean * gain
    return x * gain.reshape(shape) + offset.reshape(shape)


# Compressed weights.


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Returns ``scale * (data - offset)``, one scale and offset for every block of ``data``."""
    wide = data.astype(np.float32)
    if offset is not None:
        wide = wide - _by_block(offset.astype(np.float32), data.shape)
    return wide * _by_block(scale.astype(np.float32), data.shape)


def _by_block(values: Array, shape: Sequence[int]) -> Array:
    """Returns ``values`` with each entry repeated over its block; axes of length 1 are left to broadcasting."""
    for axis, (count, size) in enumerate(zip(values.shape, shape, strict=True)):
        if count not in (1, size):
            values = np.repeat(values, size // count, axis)
    return values


def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: Scalar | None = None) -> Array:
    """Returns the table entries that ``indices`` name; tables are [*groups, entries, vector], a group for every block."""
    groups, (entries, vector) = lut.shape[:-2], lut.shape[-2:]
    group = np.zeros((1,) * indices.ndim, np.int64)
    for axis, (count, size) in enumerate(zip(groups, indices.shape, strict=True)):
        place = np.arange(size) // (size // count)
        group = group * count + place.reshape([-1 if a == axis else 1 for a in range(indices.ndim)])
    dense = lut.reshape(-1, vector)[group * entries + indices]
    if vector == 1:
        return dense[..., 0]
    axis = int(vector_axis) % indices.ndim  # type: ignore[arg-type]  # required with vectors
    shape = [n * vector if a == axis else n for a, n in enumerate(indices.shape)]
    return np.moveaxis(dense, -1, axis + 1).reshape(shape)


def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array) -> Array:
    """Returns zeros, and the given values in order where the mask is 1."""
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask.astype(np.bool_)] = nonzero_data
    return dense


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    **{function.__name__: function for function in (reshape, transpose, squeeze, expand_dims, concat, tile)},
    **{function.__name__: function for function in (slice_by_index, slice_update, slice_by_size, gather, pad)},
    **{function.__name__: function for function in (cast, select, rsqrt, gelu)},
    **{function.__name__: function for function in (matmul, linear, softmax, scaled_dot_product_attention, conv, batch_norm)},
    **{f.__name__: f for f in (constexpr_blockwise_shift_scale, constexpr_lut_to_dense, constexpr_sparse_to_dense)},
    **{name: _unary(getattr(np, name)) for name in ("abs", "cos", "exp", "logical_not", "sin", "sqrt", "tanh")},
    **{name: _binary(getattr(np, name)) for name in ("maximum", "minimum", "greater", "greater_equal", "less", "less_equal")},
    **{name: _binary(getattr(np, name)) for name in ("equal", "not_equal", "logical_and", "logical_or")},
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_min": _reduction(np.min),
    "reduce_sum": _reduction(np.sum),
}
