"""Architecture numbers of the three networks, their presets, and the dtype policy.

Every size the code uses is a field here; architecture fields have no defaults, presets show every number beside its
source.  Configurations are frozen and hashable, so they can be static arguments of ``jax.jit``.  This module imports
neither JAX nor a network and reads no file.
"""

import dataclasses
from typing import Any, Self

import ml_dtypes
import numpy as np

NETWORKS = ("t5", "stdit3", "vae")
DType = type[Any] | np.dtype[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypePolicy:
    """Which dtype parameters are stored in and activations are computed in; sums and statistics are always float32.

    ``half_range`` is for programs that a converter turns into float16 throughout, float32 statistics included: norms scale
    their input first and attention keeps its sums small, so that nothing leaves float16's range.  Equal in exact arithmetic.
    """

    param: DType
    compute: DType
    half_range: bool = False


FLOAT32 = DTypePolicy(param=np.float32, compute=np.float32)
BFLOAT16 = DTypePolicy(param=ml_dtypes.bfloat16, compute=ml_dtypes.bfloat16)


def policy_of(dtype: str) -> DTypePolicy:
    """Returns the policy that computes in a dtype: ``float32`` or ``bfloat16``."""
    policies = {"float32": FLOAT32, "bfloat16": BFLOAT16}
    if dtype not in policies:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(policies)}.")
    return policies[dtype]


class _Config:
    """Conversion to and from the JSON objects of a model directory, shared by the network configurations."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values (tuples become lists, nested configurations become objects)."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Returns the configuration described by a JSON object.

        Raises:
          ValueError: a field is unknown or missing.
        """
        expected = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown, missing = sorted(fields.keys() - expected.keys()), sorted(expected.keys() - fields.keys())
        if unknown or missing:
            raise ValueError(f"{cls.__name__}: unknown fields {unknown}, missing fields {missing}; expected {list(expected)}.")
        return cls(**{name: _from_json(expected[name].type, value) for name, value in fields.items()})


def _from_json(kind: Any, value: Any) -> Any:
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, _Config):
        return kind.from_dict(value)
    return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(_Config):
    """T5 v1.1 encoder (gated GELU, relative position bias shared by all layers)."""

    vocab_size: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    num_layers: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order: the unit that is stored, loaded and dropped."""
        return ("embed", *(f"block.{i}" for i in range(self.num_layers)), "final")


@dataclasses.dataclass(frozen=True, kw_only=True)
class STDiT3Config(_Config):
    """Spatial-temporal diffusion transformer of Open-Sora 1.2."""

    in_channels: int
    patch_size: tuple[int, int, int]
    hidden_size: int
    num_heads: int
    depth: int
    mlp_ratio: float
    caption_channels: int
    model_max_length: int
    qk_norm: bool
    pred_sigma: bool
    input_sq_size: int

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}.")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4 (sine and cosine of two coordinates).")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: the temporal patch must be 1, as in every released checkpoint.")

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Hidden units of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Velocity channels, followed by as many unused ones where the checkpoint predicts sigma."""
        return self.in_channels * (2 if self.pred_sigma else 1)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order: the unit that is stored, loaded, retained and dropped."""
        pairs = ((f"spatial_blocks.{i}", f"temporal_blocks.{i}") for i in range(self.depth))
        return ("embed", *(name for pair in pairs for name in pair), "final")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialVAEConfig(_Config):
    """Frame-by-frame autoencoder (AutoencoderKL of SDXL)."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float  # Open-Sora multiplies by 0.18215 whatever the checkpoint's own config says

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"block_out_channels {width} is not a multiple of norm_num_groups {self.norm_num_groups}.")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalVAEConfig(_Config):
    """Causal 3-D autoencoder over the spatial latents."""

    in_out_channels: int
    latent_embed_dim: int
    embed_dim: int
    filters: int
    num_res_blocks: int
    channel_multipliers: tuple[int, ...]
    temporal_downsample: tuple[bool, ...]
    norm_num_groups: int

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries; expected one fewer than the "
                f"{len(self.channel_multipliers)} channel_multipliers."
            )
        if self.filters % self.norm_num_groups:
            raise ValueError(f"filters {self.filters} is not a multiple of norm_num_groups {self.norm_num_groups}.")

    @property
    def downsampling(self) -> int:
        """Frames per latent frame."""
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(_Config):
    """Spatial and temporal autoencoder, and the micro-frame codec around them.

    ``shift`` and ``scale`` are parameters (layer ``stats``), not configuration.
    """

    spatial: SpatialVAEConfig
    temporal: TemporalVAEConfig
    micro_frame_size: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names; decoding runs temporal, then spatial decoder."""
        return ("temporal_encoder", "temporal_decoder", "spatial_encoder", "spatial_decoder", "stats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The three networks of one text-to-video model."""

    t5: T5Config
    stdit3: STDiT3Config
    vae: VAEConfig

    def __post_init__(self) -> None:
        if self.t5.d_model != self.stdit3.caption_channels:
            raise ValueError(f"T5 width {self.t5.d_model} differs from STDiT3 caption_channels {self.stdit3.caption_channels}.")


# Source: hpcai-tech/OpenSora-STDiT-v3 config.json, hpcai-tech/OpenSora-VAE-v1.2, DeepFloyd/t5-v1_1-xxl config.json.
open_sora_1_2 = ModelConfig(
    t5=T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=24,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
    ),
    stdit3=STDiT3Config(
        in_channels=4,
        patch_size=(1, 2, 2),
        hidden_size=1152,
        num_heads=16,
        depth=28,
        mlp_ratio=4.0,
        caption_channels=4096,
        model_max_length=300,
        qk_norm=True,
        pred_sigma=True,
        input_sq_size=512,
    ),
    vae=VAEConfig(
        spatial=SpatialVAEConfig(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            norm_num_groups=32,
            scaling_factor=0.18215,
        ),
        temporal=TemporalVAEConfig(
            in_out_channels=4,
            latent_embed_dim=4,
            embed_dim=4,
            filters=128,
            num_res_blocks=4,
            channel_multipliers=(1, 2, 2, 4),
            temporal_downsample=(False, True, True),
            norm_num_groups=32,
        ),
        micro_frame_size=17,
    ),
)

# The embedded model: the same architecture at toy width, trained by sora_jax.pocket on 64x64 clips of 34 frames.
pocket = ModelConfig(
    t5=T5Config(
        vocab_size=128,
        d_model=96,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=2,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
    ),
    stdit3=STDiT3Config(
        in_channels=4,
        patch_size=(1, 2, 2),
        hidden_size=128,
        num_heads=4,
        depth=4,
        mlp_ratio=4.0,
        caption_channels=96,
        model_max_length=32,
        qk_norm=True,
        pred_sigma=True,
        input_sq_size=512,
    ),
    vae=VAEConfig(
        spatial=SpatialVAEConfig(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=0.18215,
        ),
        temporal=TemporalVAEConfig(
            in_out_channels=4,
            latent_embed_dim=4,
            embed_dim=4,
            filters=32,
            num_res_blocks=1,
            channel_multipliers=(1, 1, 2, 2),
            temporal_downsample=(False, True, True),
            norm_num_groups=4,
        ),
        micro_frame_size=17,
    ),
)
