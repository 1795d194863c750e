"""STDiT3 against the PyTorch reference: whole forwards with intermediates, and single parts.

Invariant: intermediates are what the modules return during the one forward that yields ``out``; nothing is recomputed but
the position embedding and the packed caption, which exist only as parts of larger expressions.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from sora_jax.config import STDiT3Config
from sora_jax.networks import positions, stdit3, stdit3_block
from sora_jax.networks.layers import Linear, RMSNorm
from sora_jax.networks.merging import Merge
from tests.parity.fixtures import FixtureError, is_input, read_json, read_tensors
from tests.parity.weights import build

_PARTS = ("rope", "timestep_embedding", "units")
_RECORDED = (
    stdit3.Embed,
    stdit3.PatchEmbedder,
    stdit3.ScalarEmbedder,
    stdit3.CaptionEmbedder,
    stdit3_block.STDiT3Block,
    stdit3_block.SelfAttention,
    stdit3_block.CrossAttention,
    stdit3_block.MLP,
    Linear,
    RMSNorm,
)
# Our name of a module whose reference name is another one than ours without the layer.
_RENAMED = {"blocks_input": "embed", "t_mlp": "embed.t_block", "final_layer": "final.linear"}

# The frames in the inputs of units.safetensors, which the file does not tell; sample 0 has the shorter caption.
_UNITS_FRAMES = 3


def cases(folder: Path) -> dict[str, Path]:
    names = [*read_json(folder / "config.json")["cases"], *_PARTS]
    return {name: folder / f"{name}.safetensors" for name in names}


def compute(folder: Path, case: str) -> dict[str, np.ndarray]:
    tensors = read_tensors(folder / f"{case}.safetensors")
    network = load_network(folder)
    if case in _PARTS:
        return {"rope": _rope, "timestep_embedding": _timestep_embedding, "units": _units}[case](network, tensors)
    return forward(network, tensors, merge=None)


@functools.lru_cache(maxsize=2)
def load_network(folder: Path) -> stdit3.STDiT3:
    """Returns the network of a fixture folder, through the conversion of its PyTorch state dict."""
    source = read_json(folder / "config.json")["config"]
    fields = [field.name for field in dataclasses.fields(STDiT3Config)]
    missing = [name for name in fields if name not in source]
    if missing:
        raise FixtureError(f"config.json: the network's configuration lacks {', '.join(missing)}.")
    config = STDiT3Config.from_dict({name: source[name] for name in fields})
    return build("stdit3", config, read_tensors(folder / "state_dict.safetensors"))


def forward(network: stdit3.STDiT3, tensors: dict[str, np.ndarray], *, merge: Merge | None) -> dict[str, np.ndarray]:
    """Returns ``out`` and every ``mid.*`` that the fixture has, in the reference's layouts."""
    inputs = {key.removeprefix("in."): value for key, value in tensors.items() if is_input(key)}

    @jax.jit
    def run(network: stdit3.STDiT3, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with _recording(network) as records:
            out = network(
                rearrange(inputs["x"], "b c t h w -> b t h w c"),
                inputs["timestep"],
                inputs["y"][:, 0],
                inputs["mask"] != 0 if "mask" in inputs else None,
                fps_B=inputs["fps"],
                height_px_B=inputs["height"],
                width_px_B=inputs["width"],
                frame_mask_BT=inputs.get("x_mask"),
                merge=merge,
            )
        return {"out": out, **records}

    records = {name: np.asarray(value) for name, value in run(network, inputs).items()}
    mids = {key: _mid(key.removeprefix("mid."), network, inputs, records) for key in tensors if key.startswith("mid.")}
    return {"out": _channels_second(records["out"]), **{key: value for key, value in mids.items() if value is not None}}


def _mid(name: str, network: stdit3.STDiT3, inputs: dict[str, Any], records: dict[str, np.ndarray]) -> np.ndarray | None:
    """Returns an intermediate under the reference's name and layout; None where no module yields it."""
    if name == "pos_emb":
        return _position(network, inputs)
    if name == "y_packed":
        return _packed(records["embed.y_embedder"], inputs.get("mask"))
    bare, _, call = name.partition("#")
    ours = _RENAMED.get(bare, bare)
    ours = next((key for key in (ours, f"embed.{ours}") if key in records), ours) + (f"#{call}" if call else "")
    if ours not in records:
        return None
    value = records[ours]
    if bare == "y_embedder":
        return value[:, None]
    if bare.endswith(".attn"):
        return rearrange(value, "b t s d -> (b s) t d" if bare.startswith("temporal") else "b t s d -> (b t) s d")
    if bare.endswith("_norm") or value.ndim < 4:
        return value
    return _tokens(value)


@contextlib.contextmanager
def _recording(network: stdit3.STDiT3) -> Iterator[dict[str, Any]]:
    """Collects what each module of a network returns, by dotted name; later calls get ``#2`` and so on."""
    names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(network)}
    records: dict[str, Any] = {}

    def recorded(call: Any) -> Any:
        def wrapper(module: nnx.Module, *args: Any, **keywords: Any) -> Any:
            out = call(module, *args, **keywords)
            name = key = names[id(module)]
            count = 1
            while key in records:
                count += 1
                key = f"{name}#{count}"
            records[key] = out[0] if isinstance(out, tuple) else out
            return out

        return wrapper

    with contextlib.ExitStack() as stack:
        for kind in _RECORDED:
            stack.enter_context(mock.patch.object(kind, "__call__", recorded(kind.__call__)))
        yield records


def _position(network: stdit3.STDiT3, inputs: dict[str, Any]) -> np.ndarray:
    config = network.config
    height, width = (-(-size // patch) for size, patch in zip(inputs["x"].shape[3:], config.patch_size[1:], strict=True))
    scale = jnp.sqrt(jnp.float32(inputs["height"][0]) * jnp.float32(inputs["width"][0])) / config.input_sq_size
    return _tokens(np.asarray(positions.position_embedding(height, width, config.hidden_size, scale=scale))[None, None])


def _packed(caption_BLD: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Returns the real tokens of all samples in one row."""
    if mask is None:
        mask = np.ones(caption_BLD.shape[:2])
    return caption_BLD[np.tile(mask != 0, (len(caption_BLD) // len(mask), 1))][None]


def _tokens(value: Any) -> Any:
    return value.reshape(value.shape[0], -1, value.shape[-1])


def _channels_second(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, -1, 1)


def _rope(network: stdit3.STDiT3, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    q = tensors["in.q"]
    return {"out": np.asarray(positions.rotate(jnp.asarray(q), np.arange(q.shape[-2])))}


def _timestep_embedding(network: stdit3.STDiT3, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    value = jnp.asarray(tensors["in.t"])
    return {
        "out.sinusoid": np.asarray(positions.sinusoid(value)),
        "out.t_embedder": np.asarray(network.embed.t_embedder(value)),
        "out.fps_embedder": np.asarray(network.embed.fps_embedder(value)),
    }


def _units(network: stdit3.STDiT3, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns blocks, final layer and query norms on inputs so small that the norms' epsilon decides."""
    conditioning = _units_conditioning(tensors)
    computed: dict[str, Any] = {}
    for key in tensors:
        name = key.removesuffix(".small.out")
        kind, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if is_input(key):
            continue
        if name == "final_layer":
            computed[key] = _tokens(network.final.patches(_units_tokens(tensors), conditioning))
        elif part == "attn.q_norm":
            computed[key] = getattr(network, kind)[int(index)].attn.q_norm(jnp.asarray(tensors["q_norm.small.in"]))
        elif not part:
            computed[key] = _tokens(getattr(network, kind)[int(index)](_units_tokens(tensors), conditioning))
    return {key: np.asarray(value) for key, value in computed.items()}


def _units_tokens(tensors: dict[str, np.ndarray]) -> jax.Array:
    return rearrange(jnp.asarray(tensors["block.small.in.x"]), "b (t s) d -> b t s d", t=_UNITS_FRAMES)


def _units_conditioning(tensors: dict[str, np.ndarray]) -> stdit3_block.Conditioning:
    packed_LD, batch = tensors["block.in.y"][0], tensors["block.small.in.x"].shape[0]
    captions = [packed_LD[i * len(packed_LD) // batch : (i + 1) * len(packed_LD) // batch] for i in range(batch)]
    length = max(map(len, captions))
    return stdit3_block.Conditioning(
        caption_BLD=jnp.stack([jnp.pad(caption, ((0, length - len(caption)), (0, 0))) for caption in captions]),
        mask_BL=jnp.stack([jnp.arange(length) < len(caption) for caption in captions]),
        mod_BF6D=rearrange(jnp.asarray(tensors["block.in.t_mlp"]), "b (six d) -> b 1 six d", six=6),
        t_BD=jnp.asarray(tensors["final_layer.small.in.t"]),
        t0_BD=None,
        frame_mask_BT=None,
    )
