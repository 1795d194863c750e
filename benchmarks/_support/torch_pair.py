"""A pair of STDiT3 blocks in PyTorch, written with torch.nn.functional: what the same arithmetic costs there.

Invariant: the numbers are those of `STDiT3Block` on the same parameters, up to rounding; who times it compares them first.
Every matrix has PyTorch's layout, and tensors stay on the device they are on.
"""

import jax
import numpy as np
import torch  # noqa: TID251  # the rival
from torch.nn import functional  # noqa: TID251

from sora_jax.networks.positions import MAX_PERIOD


def to_torch(value: jax.Array) -> torch.Tensor:
    """Returns a tensor of the same dtype; matrices in PyTorch's layout (out, in)."""
    wide = torch.from_numpy(np.array(value, np.float32))
    return (wide.T.contiguous() if wide.ndim == 2 else wide).to(getattr(torch, str(value.dtype)))


def torch_pair(flats: dict[str, dict[str, torch.Tensor]], arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the tokens after a spatial and a temporal block."""
    x = arrays["x"]
    for kind in ("spatial", "temporal"):
        x = torch_block(flats[kind], x, arrays, temporal=kind == "temporal")
    return x


def torch_block(
    p: dict[str, torch.Tensor], x: torch.Tensor, arrays: dict[str, torch.Tensor], *, temporal: bool
) -> torch.Tensor:
    """Returns the tokens after one block; every matrix has PyTorch's layout."""
    width = x.shape[-1]
    table = p["scale_shift_table"].T.float()  # to_torch transposed it
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[None] + arrays["mod"]).to(x.dtype)[:, :, None, None].unbind(1)
    normed = functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift
    x = x + gate * torch_self_attention(p, normed, temporal=temporal)
    x = x + torch_cross_attention(p, x, arrays["caption"], arrays["mask"])
    normed = functional.layer_norm(x, (width,), eps=1e-6) * (1 + scale_mlp) + shift_mlp
    hidden = functional.gelu(functional.linear(normed, p["mlp.fc1.kernel"], p["mlp.fc1.bias"]), approximate="tanh")
    return x + gate_mlp * functional.linear(hidden, p["mlp.fc2.kernel"], p["mlp.fc2.bias"])


def torch_self_attention(p: dict[str, torch.Tensor], x: torch.Tensor, *, temporal: bool) -> torch.Tensor:
    """Returns attention within frames, or along time."""
    size = p["attn.q_norm.scale"].shape[0]
    heads = x.shape[-1] // size
    rows = x.transpose(1, 2) if temporal else x  # [B, outer, sequence, D]
    batch, outer, length, width = rows.shape
    qkv = functional.linear(rows.reshape(batch * outer, length, width), p["attn.qkv.kernel"], p["attn.qkv.bias"])
    q, k, v = qkv.view(batch * outer, length, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = (functional.rms_norm(part, (size,), p[f"attn.{name}_norm.scale"], eps=1e-6) for part, name in ((q, "q"), (k, "k")))
    if temporal:
        q, k = torch_rotate(q), torch_rotate(k)
    out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, outer, length, width)
    out = functional.linear(out, p["attn.proj.kernel"], p["attn.proj.bias"])
    return out.transpose(1, 2) if temporal else out


def torch_rotate(x: torch.Tensor) -> torch.Tensor:
    """Returns queries or keys [..., T, K] rotated by frame index."""
    places, channels = torch.arange(x.shape[-2], device=x.device), torch.arange(0, x.shape[-1], 2, device=x.device)
    angle = places[:, None] * MAX_PERIOD ** -(channels / x.shape[-1])
    cosine, sine = (part.repeat_interleave(2, dim=-1).to(x.dtype) for part in (angle.cos(), angle.sin()))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cosine + turned * sine


def torch_cross_attention(
    p: dict[str, torch.Tensor], x: torch.Tensor, caption: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Returns attention to the caption's real tokens."""
    size = p["attn.q_norm.scale"].shape[0]
    heads = x.shape[-1] // size
    batch, frames, places, width = x.shape
    q = functional.linear(x, p["cross_attn.q_linear.kernel"], p["cross_attn.q_linear.bias"])
    q = q.reshape(batch, frames * places, heads, size).transpose(1, 2)
    kv = functional.linear(caption, p["cross_attn.kv_linear.kernel"], p["cross_attn.kv_linear.bias"])
    k, v = kv.view(batch, -1, 2, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    out = out.transpose(1, 2).reshape(batch, frames, places, width)
    return functional.linear(out, p["cross_attn.proj.kernel"], p["cross_attn.proj.bias"])
