"""What `benchmarks.speed.accelerator` runs: pairs of blocks, networks with random weights, and their arithmetic.

Invariant: nothing is timed here; every function returns something to call, its arrays on the device already.  Only jax, flax,
einops, jaxtyping and numpy are imported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks._support.random_network import pair_gflop
from sora_jax.config import ModelConfig, STDiT3Config, open_sora_1_2, pocket, policy_of
from sora_jax.devices.attention_choice import choose_forms
from sora_jax.inputs import sizes
from sora_jax.networks import registry
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.pipeline.velocity import Velocity
from sora_jax.storage.checkpoint import flatten, unflatten

Arrays = tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]  # parameters by block, and inputs
GUIDED_ROWS = 2
# Dense products, 1e12 operations a second, without sparsity.  Source: the makers' data sheets.
PEAK_TFLOPS = {
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "TPU v5 lite": {"bfloat16": 197.0},
    "TPU v6 lite": {"bfloat16": 918.0},
    "TPU v5p": {"bfloat16": 459.0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A video of so many latent frames, rows and columns, and the architecture."""

    config: ModelConfig
    frames: int
    rows: int
    columns: int

    @property
    def places(self) -> int:
        """Tokens of a frame."""
        _, down, across = self.config.stdit3.patch_size
        return -(-self.rows // down) * -(-self.columns // across)

    def pair_flop(self) -> float:
        """Returns the operations of a pair for both rows of guidance, 2 for each multiply-add."""
        parts = pair_gflop(self.config.stdit3, rows=GUIDED_ROWS, frames=self.frames, places=self.places)
        return 1e9 * sum(parts.values())


def works(*, tiny: bool) -> dict[str, Work]:
    """Returns 51 frames of 256p, 480p and 720p at the released sizes, or miniatures of them."""
    config = miniature() if tiny else open_sora_1_2
    latents = (
        {"256p": (4, 4), "480p": (6, 8), "720p": (8, 12)} if tiny else {"256p": (32, 32), "480p": (60, 106), "720p": (90, 160)}
    )
    return {name: Work(config=config, frames=5 if tiny else 15, rows=h, columns=w) for name, (h, w) in latents.items()}


def miniature() -> ModelConfig:
    """Returns the architecture at toy width."""
    spatial = dataclasses.replace(pocket.vae.spatial, block_out_channels=(4, 4, 4, 4), norm_num_groups=2)
    temporal = dataclasses.replace(pocket.vae.temporal, filters=4, norm_num_groups=2)
    return ModelConfig(
        t5=dataclasses.replace(pocket.t5, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=1),
        stdit3=dataclasses.replace(
            pocket.stdit3, hidden_size=16, num_heads=2, depth=2, caption_channels=16, model_max_length=12
        ),
        vae=dataclasses.replace(pocket.vae, spatial=spatial, temporal=temporal),
    )


def pair_arrays(work: Work, *, rows: int = GUIDED_ROWS, seed: int = 7) -> Arrays:
    """Returns the float32 parameters of a spatial and a temporal block, and their inputs; captions of 40 and all tokens."""
    config, rng = work.config.stdit3, np.random.default_rng(seed)
    flats = {}
    for kind in ("spatial", "temporal"):
        shell = jax.eval_shape(lambda kind=kind: STDiT3Block(config, temporal=kind == "temporal", rngs=nnx.Rngs(0)))
        flats[kind] = {
            name: rng.standard_normal(leaf.shape, np.float32) * leaf.shape[0] ** -0.5 + np.float32("norm" in name)
            for name, leaf in flatten(shell).items()
        }
    length = config.model_max_length
    lengths = np.linspace(min(40, length), length, rows).astype(int)
    inputs = {
        "x": rng.standard_normal((rows, work.frames, work.places, config.hidden_size), np.float32),
        "caption": rng.standard_normal((rows, length, config.hidden_size), np.float32),
        "mask": np.arange(length)[None] < lengths[:, None],
        "mod": rng.standard_normal((rows, 6, config.hidden_size), np.float32) * np.float32(0.3),
    }
    return flats, inputs


def compiled_pair(work: Work, arrays: Arrays, *, dtype: str, attention: str) -> Callable[[], jax.Array]:
    """Returns the pair as a call of one compiled program.

    Raises:
      ValueError: the form of attention does not run on this platform.
    """
    flats, inputs = arrays
    config, policy = work.config.stdit3, policy_of(dtype)
    forms = choose_forms(attention, platform=jax.default_backend(), dtype=dtype)
    shells = {
        kind: jax.eval_shape(
            lambda kind=kind: STDiT3Block(config, temporal=kind == "temporal", policy=policy, forms=forms, rngs=nnx.Rngs(0))
        )
        for kind in flats
    }
    given = jax.device_put(
        {kind: {name: value.astype(policy.param) for name, value in flat.items()} for kind, flat in flats.items()}
    )
    conditioning = Conditioning(
        caption_BLD=jnp.asarray(inputs["caption"], policy.compute),
        mask_BL=jnp.asarray(inputs["mask"]),
        mod_BF6D=jnp.asarray(inputs["mod"])[:, None],
        t_BD=jnp.zeros((len(inputs["x"]), config.hidden_size)),
        t0_BD=None,
        frame_mask_BT=None,
    )
    x = jnp.asarray(inputs["x"], policy.compute)

    @jax.jit
    def pair(flats: Any, x: jax.Array, conditioning: Conditioning) -> jax.Array:
        for kind in ("spatial", "temporal"):
            x = unflatten(shells[kind], flats[kind])(x, conditioning)
        return x

    program = pair.lower(given, x, conditioning).compile()
    return lambda: program(given, x, conditioning)


def random_network(network: str, config: Any, *, dtype: str, share: str = "", seed: int = 0) -> Any:
    """Returns a network with random weights on the device; layers whose names begin with ``share`` have those of the first."""
    forms = choose_forms("auto", platform=jax.default_backend(), dtype=dtype)
    abstract = registry.abstract(network, config, policy=policy_of(dtype), forms=forms)
    flat: dict[str, jax.Array] = {}
    made: dict[str, jax.Array] = {}
    for number, (name, leaf) in enumerate(flatten(abstract).items()):
        parts = name.split(".")
        shared = ".".join([parts[0], "0", *parts[2:]]) if share and parts[0].startswith(share) else name
        if shared not in made:
            made[shared] = _drawn(jax.random.fold_in(jax.random.key(seed), number), shared, leaf)
        flat[name] = made[shared]
    return unflatten(abstract, flat)


def _drawn(key: jax.Array, name: str, leaf: Any) -> jax.Array:
    """Returns values that keep activations at their size; norms lie around 1."""
    size = float(np.prod(leaf.shape[:-1])) if name.endswith("kernel") else 400.0
    values = jax.random.normal(key, leaf.shape, leaf.dtype) * jnp.asarray(size**-0.5, leaf.dtype)
    is_norm = name.endswith("scale") and len(leaf.shape) == 1
    return values + jnp.asarray(1 if is_norm else 0, leaf.dtype)


def velocity_of(work: Work, network: Any, *, seed: int = 7) -> Velocity:
    """Returns the velocity of one guided sample."""
    config: STDiT3Config = work.config.stdit3
    rng = np.random.default_rng(seed)
    given = sizes.size_conditions(1, height=8 * work.rows, width=8 * work.columns, num_frames=4 * work.frames, fps=24)
    captions = rng.standard_normal((GUIDED_ROWS, config.model_max_length, config.caption_channels), np.float32)
    real = np.arange(config.model_max_length)[None] < min(120, config.model_max_length)
    return Velocity(
        network=network,
        caption_RLE=jnp.asarray(captions),
        mask_BL=jnp.asarray(real),
        fps=jnp.asarray(given["fps_B"]),
        height_px=jnp.asarray(given["height_px_B"]),
        width_px=jnp.asarray(given["width_px_B"]),
    )


def peak_flop_per_s(device: str, dtype: str) -> float | None:
    """Returns a card's operations a second by its name; None: not in the table."""
    return next((1e12 * peaks[dtype] for name, peaks in PEAK_TFLOPS.items() if name in device and dtype in peaks), None)


def relative_l2(found: Any, expected: Any) -> float:
    """Returns the distance over the size of what is expected."""
    found, expected = (np.asarray(x, np.float32).ravel() for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
