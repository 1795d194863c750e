"""What each stage computes: a network's own forward, between named plain arrays.

Invariant: no arithmetic of a network is written here; a function receives modules and their inputs separately, and names what
the modules return. Functions take ``modules`` (by prefix of their parameters) and named inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, with_null_caption
from sora_jax.storage.checkpoint import unflatten

Modules = Mapping[str, Any]
Outputs = dict[str, Array]


def bound(body: Callable[..., Outputs], shells: Modules) -> Callable[..., Outputs]:
    """Returns ``call(params, **inputs)``: the body on modules filled from parameters by local name."""

    def call(params: Mapping[str, Array], **inputs: Array) -> Outputs:
        return body({prefix: unflatten(shell, _under(params, prefix)) for prefix, shell in shells.items()}, **inputs)

    return call


def t5_embed(modules: Modules, *, ids_BL: Array) -> Outputs:
    """Returns embedded tokens and the position bias that all blocks share."""
    x_BLE, bias_1NLL = modules[""](ids_BL)
    return {"x_BLE": x_BLE, "bias_1NLL": bias_1NLL}


def t5_block(modules: Modules, *, x_BLE: Array, bias_1NLL: Array, mask_BL: Array) -> Outputs:
    """Returns the hidden states after one block."""
    return {"x_BLE": modules[""](x_BLE, bias_1NLL, _is_real(mask_BL))}


def t5_final(modules: Modules, *, x_BLE: Array) -> Outputs:
    """Returns the caption features."""
    return {"caption_BLE": modules[""](x_BLE)}


def front(
    modules: Modules,
    *,
    z_BTHWC: Array,
    t_B: Array,
    caption_BLE: Array,
    mask_BL: Array,
    fps_B: Array,
    height_px_B: Array,
    width_px_B: Array,
    frame_mask_BT: Array | None = None,
) -> Outputs:
    """Returns tokens and conditioning of the rows [conditional, unconditional]; the latter have the null caption."""
    alone = front_alone(
        2,
        modules,
        z_BTHWC=z_BTHWC,
        t_B=t_B,
        fps_B=fps_B,
        height_px_B=height_px_B,
        width_px_B=width_px_B,
        frame_mask_BT=frame_mask_BT,
    )
    return {"x_RTSD": alone.pop("x_RTSD"), **caption(modules, caption_BLE=caption_BLE, mask_BL=mask_BL), **alone}


def caption(modules: Modules, *, caption_BLE: Array, mask_BL: Array) -> Outputs:
    """Returns the projections of the caption and of the null caption, and the mask of both."""
    embed = modules[""]
    both_RLE = with_null_caption(caption_BLE, embed.y_embedder.y_embedding[...])
    return {"caption_RLD": embed.caption(both_RLE), "mask_RL": _repeated(mask_BL, 2)}


def front_alone(
    rows: int,
    modules: Modules,
    *,
    z_BTHWC: Array,
    t_B: Array,
    fps_B: Array,
    height_px_B: Array,
    width_px_B: Array,
    frame_mask_BT: Array | None = None,
) -> Outputs:
    """Returns tokens and conditioning of one row, or of two equal ones: what is not the caption's."""
    embed = modules[""]
    x_RTSD, conditioning = embed.with_caption(
        _repeated(z_BTHWC, rows),
        _repeated(t_B, rows),
        jnp.zeros((rows, 0, embed.config.hidden_size), z_BTHWC.dtype),
        None,
        fps_B=fps_B,
        height_px_B=height_px_B,
        width_px_B=width_px_B,
        frame_mask_BT=None if frame_mask_BT is None else _is_real(_repeated(frame_mask_BT, rows)),
    )
    outputs = {"x_RTSD": x_RTSD, "mod_RF6D": conditioning.mod_BF6D, "t_RD": conditioning.t_BD}
    if frame_mask_BT is not None:
        outputs |= {"t0_RD": conditioning.t0_BD, "frame_mask_RT": _repeated(frame_mask_BT, rows)}
    return outputs


def pair(
    merge: Merge | None, modules: Modules, *, x_RTSD: Array, caption_RLD: Array, mask_RL: Array, mod_RF6D: Array
) -> Outputs:
    """Returns the tokens after the blocks, spatial and temporal ones alternately, which do not read the time itself."""
    conditioning = Conditioning(
        caption_BLD=caption_RLD,
        mask_BL=_is_real(mask_RL),
        mod_BF6D=mod_RF6D,
        t_BD=jnp.zeros((x_RTSD.shape[0], 0)),
        t0_BD=None,
        frame_mask_BT=None,
    )
    for block in modules.values():
        x_RTSD = block(x_RTSD, conditioning, merge=merge)
    return {"x_RTSD": x_RTSD}


def final(
    latent: tuple[int, int, int],
    modules: Modules,
    *,
    x_RTSD: Array,
    t_RD: Array,
    t0_RD: Array | None = None,
    frame_mask_RT: Array | None = None,
) -> Outputs:
    """Returns the velocity of all rows, its unused channels left out; ``latent`` is rows, columns and channels."""
    height, width, channels = latent
    conditioning = Conditioning(
        caption_BLD=jnp.zeros((x_RTSD.shape[0], 0, x_RTSD.shape[-1]), x_RTSD.dtype),
        mask_BL=None,
        mod_BF6D=jnp.zeros((x_RTSD.shape[0], 0, 6, x_RTSD.shape[-1])),
        t_BD=t_RD,
        t0_BD=t0_RD,
        frame_mask_BT=None if frame_mask_RT is None else _is_real(frame_mask_RT),
    )
    return {"v_RTHWC": modules[""](x_RTSD, conditioning, height=height, width=width)[..., :channels]}


def decode_latents(num_frames: int, modules: Modules, *, z_BTHWC: Array) -> Outputs:
    """Returns scaled spatial latents of one chunk."""
    return {"x_BtHWC": modules[""].decode_latents(z_BTHWC, num_frames)}


def decode_frames(modules: Modules, *, x_BtHWC: Array) -> Outputs:
    """Returns pixels."""
    return {"frames_Bthw3": modules[""].decode_frames(x_BtHWC)}


def encode_frames(modules: Modules, *, frames_Bthw3: Array) -> Outputs:
    """Returns scaled spatial latents, the means of their posterior."""
    return {"x_BtHWC": modules[""].encode_frames(frames_Bthw3)}


def encode_latents(modules: Modules, *, x_BtHWC: Array) -> Outputs:
    """Returns normalised latents of one chunk, the means of their posterior."""
    return {"z_BTHWC": modules[""].encode_latents(x_BtHWC)}


def _under(params: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    if not prefix:
        return dict(params)
    return {name[len(prefix) + 1 :]: array for name, array in params.items() if name.startswith(prefix + ".")}


def _is_real(mask: Array) -> Array:
    return mask > 0.5


def _repeated(x: Array, rows: int) -> Array:
    return jnp.concatenate([x] * rows)
