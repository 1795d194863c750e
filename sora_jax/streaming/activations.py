"""Bytes and operations of each network's activations, from shapes alone.

Invariant: a bound on what a compiled program holds in addition to its arguments, checked against XLA's own account of small
programs in the tests.  The terms are the live arrays at the widest place of each network; attention inside XLA's CPU
kernels holds logits that the account does not show (measured, peak of the process).  Parameters are not counted here.
"""

import math

from sora_jax.config import SpatialVAEConfig, STDiT3Config, T5Config, TemporalVAEConfig
from sora_jax.devices.attention_choice import queries_at_once
from sora_jax.networks.forms import WHOLE, Forms
from sora_jax.networks.merge_rule import Merge
from sora_jax.networks.portions import portions

FLOAT_BYTES = 4
LOGIT_COPIES = 2.2  # of attention logits inside the fused kernel, for each row it works on
ROWS_AT_A_TIME = 2  # rows of a batch whose attention is computed at the same time
ATTENDED = 6  # arrays of tokens in a block's attention: its input, normed, queries, keys, values, output
CARRIED = 2.4  # arrays of tokens beside a block: its input and output, and those of the velocity (measured at 480p and 720p)


def text_bytes(config: T5Config, batch: int, length: int) -> int:
    """Returns the bytes of a block half over ``batch`` sequences of ``length`` tokens."""
    tokens = batch * length * config.d_model
    inner = batch * length * config.num_heads * config.d_kv
    logits = config.num_heads * length * length
    attended = 3 * inner + 2 * tokens + (batch + LOGIT_COPIES) * logits
    fed_forward = 3 * batch * length * config.d_ff + tokens
    return int(FLOAT_BYTES * (max(attended, fed_forward) + 2 * tokens + logits))  # input, output, position bias


def text_flops(config: T5Config, batch: int, length: int) -> float:
    """Returns the floating-point operations of the encoder."""
    inner = config.num_heads * config.d_kv
    matrices = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return config.num_layers * batch * length * (2.0 * matrices + 4.0 * length * inner)


def block_bytes(config: STDiT3Config, rows: int, frames: int, places: int, forms: Forms = WHOLE) -> int:
    """Returns the temporary bytes of one transformer block that computes ``rows`` x ``frames`` x ``places`` tokens at once.

    The MLP holds its hidden units twice; cross attention its logits with the mask in place of them.
    """
    tokens = rows * frames * places
    length = config.model_max_length
    hidden = (2 * config.mlp_ratio + 1) * tokens * config.hidden_size
    at_once = queries_at_once(forms.attention, rows, config.num_heads, frames * places, length)
    crossed = 4 * tokens * config.hidden_size + rows * at_once * config.num_heads * length
    return int(FLOAT_BYTES * max(hidden, crossed))


def denoise_bytes(
    config: STDiT3Config, rows: int, frames: int, places: int, forms: Forms = WHOLE, merge: Merge | None = None
) -> int:
    """Returns the bytes of an evaluation without parameters: a block, what its attention hides, tokens and caption.

    A block computes the tokens that ``forms`` lets it, so the tokens into and out of it may be most of this.  Frames that
    are merged stay together: a portion of them is at least two frames, or three.
    """
    tokens = rows * frames * places
    caption = rows * config.model_max_length * (config.caption_channels + 3 * config.hidden_size)
    widest = 0.0
    for temporal in (False, True):
        portion = _portion(config, (rows, frames, places), forms, temporal=temporal, merge=merge)
        widest = max(widest, _portion_bytes(config, portion, forms, temporal=temporal))
    return int(widest + FLOAT_BYTES * (CARRIED * tokens * config.hidden_size + caption))


def attention_shapes(
    config: STDiT3Config, rows: int, frames: int, places: int, forms: Forms = WHOLE, *, itemsize: int = FLOAT_BYTES
) -> dict[str, tuple[int, int, int, int]]:
    """Returns entries, heads, queries and keys of the attentions of a pair of blocks, over the tokens computed at once."""
    shapes = {}
    for temporal, name in ((False, "spatial"), (True, "temporal")):
        portion = _portion(config, (rows, frames, places), forms, temporal=temporal, itemsize=itemsize)
        shapes[name], shapes[f"{name} cross"] = _own_and_cross(config, portion, temporal=temporal)
    return shapes


def _own_and_cross(
    config: STDiT3Config, portion: tuple[int, int, int], *, temporal: bool
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Returns entries, heads, queries and keys of a block's self attention and of its cross attention."""
    (rows, frames, places), heads = portion, config.num_heads
    own = (rows * places, heads, frames, frames) if temporal else (rows * frames, heads, places, places)
    return own, (rows, heads, frames * places, config.model_max_length)


def in_portions(config: STDiT3Config, shape: tuple[int, int, int], forms: Forms) -> bool:
    """Returns whether a spatial block computes its rows, frames and places a portion at a time."""
    return _portion(config, shape, forms, temporal=False) != shape


def _portion(
    config: STDiT3Config,
    shape: tuple[int, int, int],
    forms: Forms,
    *,
    temporal: bool,
    merge: Merge | None = None,
    itemsize: int = FLOAT_BYTES,
) -> tuple[int, int, int]:
    """Returns the rows, frames and places that a block computes at once."""
    if forms.hidden_bytes is None:
        return shape
    most_tokens = forms.hidden_bytes // (itemsize * config.mlp_size)
    divided = portions((*shape, config.hidden_size), most_tokens, temporal=temporal, merge=merge)
    if divided is None:
        return shape
    largest = max(divided.length, divided.rest)
    return (1, shape[1], largest) if temporal else (1, largest, shape[2])


def _portion_bytes(config: STDiT3Config, portion: tuple[int, int, int], forms: Forms, *, temporal: bool) -> float:
    """Returns the bytes of a block over so many tokens: of its MLP, or of an attention and the logits that a product hides."""
    own, cross = _own_and_cross(config, portion, temporal=temporal)
    tokens = math.prod(portion) * config.hidden_size
    attending = ATTENDED * tokens + _hidden_logits(forms, LOGIT_COPIES, *own)
    crossing = ATTENDED * tokens + _hidden_logits(forms, LOGIT_COPIES, *cross)
    return float(max(block_bytes(config, *portion, forms), FLOAT_BYTES * max(attending, crossing)))


def _hidden_logits(forms: Forms, copies: float, batch: int, heads: int, queries: int, keys: int) -> float:
    at_once = queries_at_once(forms.attention, batch, heads, queries, keys)
    return copies * min(ROWS_AT_A_TIME, batch) * heads * at_once * keys


def denoise_flops(config: STDiT3Config, rows: int, frames: int, places: int) -> float:
    """Returns the floating-point operations of one evaluation."""
    width, tokens = config.hidden_size, rows * frames * places
    matrices = 3 * width**2 + width**2 + 2 * width**2 + 2 * width * config.mlp_size  # self, its output, cross q and output
    caption = rows * config.model_max_length * 2 * width**2
    attention = tokens * width * (4.0 * config.model_max_length + 2.0 * (places + frames))  # self: half the blocks each
    return 2 * config.depth * (2.0 * (tokens * matrices + caption) + attention)


def temporal_bytes(config: TemporalVAEConfig, batch: int, frames: int, cells: int) -> int:
    """Returns the bytes of the widest stretch of the temporal autoencoder over a chunk of ``frames`` x ``cells``.

    Each convolution over time is cut into its taps, whose kernels are copied.
    """
    widest, length = 0, -(-frames // config.downsampling) * config.downsampling
    widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
    halvings = [*config.temporal_downsample, False]
    for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
        positions = batch * cells * length
        block = positions * (2 * before + 5 * width) + 27 * (before * width + width * width)
        halved = positions * 3 * width + 27 * width * 2 * width if halvings[level] else 0
        widest = max(widest, block, halved)
        length //= 2 if halvings[level] else 1
    return FLOAT_BYTES * widest


def temporal_flops(config: TemporalVAEConfig, batch: int, frames: int, cells: int) -> float:
    """Returns the floating-point operations of the temporal decoder on one chunk; the encoder's are a little fewer."""
    total, length = 0.0, -(-frames // config.downsampling) * config.downsampling
    widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
    halvings = [*config.temporal_downsample, False]
    for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
        positions = batch * cells * length
        pairs = before * width + (2 * config.num_res_blocks - 1) * width * width
        total += 54.0 * positions * pairs
        length //= 2 if halvings[level] else 1
        total += 54.0 * batch * cells * length * 2 * width * width if halvings[level] else 0
    return total + 54.0 * batch * cells * length * 2 * config.num_res_blocks * widths[-1] ** 2


def spatial_bytes(config: SpatialVAEConfig, frames: int, pixels: int, *, decoder: bool, forms: Forms = WHOLE) -> int:
    """Returns the bytes of the spatial encoder or decoder over ``frames`` frames of ``pixels`` pixels.

    The decoder is widest where its last level begins, the encoder in its first; attention is at the smallest size.  In bands
    of rows the decoder holds the input of a convolution and two outputs, but no normalised input.
    """
    widths, banded = config.block_out_channels, 0
    before = widths[min(1, len(widths) - 1)]
    wide = 2 * before + widths[0] if decoder else 3 * widths[0]
    if decoder and forms.hidden_bytes is not None and FLOAT_BYTES * frames * pixels * before > forms.hidden_bytes:
        wide, banded = before + 2 * widths[0], forms.hidden_bytes // FLOAT_BYTES
    places = pixels // config.downsampling**2
    at_once = queries_at_once(forms.attention, frames, 1, places, places)
    attention = LOGIT_COPIES * at_once * places * min(ROWS_AT_A_TIME, frames) + 5 * frames * places * widths[-1]
    return int(FLOAT_BYTES * (1.01 * max(frames * pixels * wide + banded, attention) + 2**14))  # statistics of the norms


def spatial_flops(config: SpatialVAEConfig, frames: int, pixels: int, *, decoder: bool) -> float:
    """Returns the floating-point operations of the spatial encoder or decoder."""
    blocks = config.layers_per_block + (1 if decoder else 0)
    widths = config.block_out_channels
    total = 0.0
    for level, width in enumerate(widths):
        cells = pixels / 4**level
        before = widths[min(level + 1, len(widths) - 1)] if decoder else widths[max(level - 1, 0)]
        total += (
            18.0 * cells * (before * width + (2 * blocks - 1) * width**2 + (width**2 if level else 0) * (4 if decoder else 1))
        )
    places = pixels // config.downsampling**2
    middle = places * (4 * 18.0 * widths[-1] ** 2 + 8.0 * widths[-1] ** 2 + 4.0 * places * widths[-1])
    return frames * (total + middle + 18.0 * pixels * widths[0] * config.out_channels)


def video_bytes(batch: int, frames: int, pixels: int) -> int:
    """Returns the bytes of a decoded video on the host: its values, and the frames as bytes."""
    return math.prod((batch, frames, pixels, 3)) * (FLOAT_BYTES + 1)
