"""Architecture numbers of the three networks, their presets, and the dtype policy.

Every size the code uses is a field here; architecture fields have no defaults, presets show every number with its source.
Configurations are frozen and hashable, so they can be static arguments of ``jax.jit``.  Each field bears the range of
what is plausible, so that a damaged file can ask for no more than a machine can answer.  This module imports neither JAX nor
a network and reads no file.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self, get_args

import ml_dtypes
import numpy as np

NETWORKS = ("t5", "stdit3", "vae")
_MAX_ENTRIES = 16  # of a list in a configuration
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


def _within(least: int | float, most: int | float) -> Mapping[str, Any]:
    """Returns the metadata of a field whose number, or each of whose numbers, lies in a range, ends included."""
    return {"range": (least, most)}


_WIDTH, _COUNT, _LAYERS = _within(1, 1 << 16), _within(1, 1 << 12), _within(1, 1 << 10)


class _Config:
    """Conversion to and from the JSON objects of a model directory, shared by the network configurations.

    Raises:
      ValueError: a value has the wrong type, is not finite, or is out of its field's range.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            self._check(field, getattr(self, field.name))

    @classmethod
    def _check(cls, field: Any, value: Any) -> None:
        problem = _problem(field, value)
        if problem:
            raise ValueError(f"{cls.__name__}: {field.name} is {problem}.")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-ready values (tuples become lists, nested configurations become objects)."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Returns the configuration described by a JSON object.

        Raises:
          ValueError: a field is unknown, missing, of the wrong type or out of range.
        """
        expected = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown, missing = sorted(fields.keys() - expected.keys()), sorted(expected.keys() - fields.keys())
        if unknown or missing:
            some = f"{unknown[:8]}{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}"
            raise ValueError(f"{cls.__name__}: unknown fields {some}, missing fields {missing}; expected {list(expected)}.")
        values = {name: _from_json(expected[name].type, value) for name, value in fields.items()}
        for name, value in values.items():
            cls._check(expected[name], value)
        return cls(**values)


def _from_json(kind: Any, value: Any) -> Any:
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, _Config):
        return kind.from_dict(value)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _problem(field: Any, value: Any) -> str | None:
    """Returns what is wrong with the value of a configuration's field, and what was expected; None: nothing."""
    least, most = field.metadata.get("range", (-math.inf, math.inf))
    if not get_args(field.type):
        return _scalar_problem(field.type, value, least, most)
    *kinds, last = get_args(field.type)
    count = None if last is Ellipsis else len(kinds) + 1
    if not isinstance(value, tuple) or not 1 <= len(value) <= _MAX_ENTRIES or count not in (None, len(value)):
        return f"{repr(value)[:60]}; expected a list of {count or f'1 to {_MAX_ENTRIES}'} values"
    problems = (_scalar_problem(kinds[0], entry, least, most) for entry in value)
    return next((problem for problem in problems if problem), None)


def _scalar_problem(kind: Any, value: Any, least: int | float, most: int | float) -> str | None:
    shown = repr(value)[:60]
    if kind is bool:
        return None if isinstance(value, bool) else f"{shown}; expected true or false"
    if kind not in (int, float):
        return None if isinstance(value, kind) else f"{shown}; expected a {kind.__name__}"
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | kind) or not least <= value <= most:
        return f"{shown}; expected {what} from {least} to {most}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(_Config):
    """T5 v1.1 encoder (gated GELU, relative position bias shared by all layers)."""

    vocab_size: int = dataclasses.field(metadata=_within(1, 1 << 22))
    d_model: int = dataclasses.field(metadata=_WIDTH)
    d_kv: int = dataclasses.field(metadata=_WIDTH)
    num_heads: int = dataclasses.field(metadata=_COUNT)
    d_ff: int = dataclasses.field(metadata=_within(1, 1 << 18))
    num_layers: int = dataclasses.field(metadata=_LAYERS)
    relative_attention_num_buckets: int = dataclasses.field(metadata=_within(4, 1 << 12))
    relative_attention_max_distance: int = dataclasses.field(metadata=_within(2, 1 << 20))
    layer_norm_epsilon: float = dataclasses.field(metadata=_within(1e-12, 0.1))

    def __post_init__(self) -> None:
        super().__post_init__()
        exact = self.relative_attention_num_buckets // 4  # distances in each direction with a bucket of their own
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_max_distance {self.relative_attention_max_distance} is not above {exact}, up to which "
                f"{self.relative_attention_num_buckets} relative_attention_num_buckets count one by one."
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in execution order: the unit that is stored, loaded and dropped."""
        return ("embed", *(f"block.{i}" for i in range(self.num_layers)), "final")


@dataclasses.dataclass(frozen=True, kw_only=True)
class STDiT3Config(_Config):
    """Spatial-temporal diffusion transformer of Open-Sora 1.2."""

    in_channels: int = dataclasses.field(metadata=_COUNT)
    patch_size: tuple[int, int, int] = dataclasses.field(metadata=_within(1, 64))
    hidden_size: int = dataclasses.field(metadata=_WIDTH)
    num_heads: int = dataclasses.field(metadata=_COUNT)
    depth: int = dataclasses.field(metadata=_LAYERS)
    mlp_ratio: float = dataclasses.field(metadata=_within(0.25, 64))
    caption_channels: int = dataclasses.field(metadata=_WIDTH)
    model_max_length: int = dataclasses.field(metadata=_within(1, 1 << 14))
    qk_norm: bool
    pred_sigma: bool
    input_sq_size: int = dataclasses.field(metadata=_within(1, 1 << 16))

    def __post_init__(self) -> None:
        super().__post_init__()
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

    in_channels: int = dataclasses.field(metadata=_COUNT)
    out_channels: int = dataclasses.field(metadata=_COUNT)
    latent_channels: int = dataclasses.field(metadata=_COUNT)
    block_out_channels: tuple[int, ...] = dataclasses.field(metadata=_WIDTH)
    layers_per_block: int = dataclasses.field(metadata=_within(1, 64))
    norm_num_groups: int = dataclasses.field(metadata=_COUNT)
    # Open-Sora multiplies by 0.18215 whatever the checkpoint's own config says
    scaling_factor: float = dataclasses.field(metadata=_within(1e-3, 1e3))

    def __post_init__(self) -> None:
        super().__post_init__()
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

    in_out_channels: int = dataclasses.field(metadata=_COUNT)
    latent_embed_dim: int = dataclasses.field(metadata=_COUNT)
    embed_dim: int = dataclasses.field(metadata=_COUNT)
    filters: int = dataclasses.field(metadata=_COUNT)
    num_res_blocks: int = dataclasses.field(metadata=_within(1, 64))
    channel_multipliers: tuple[int, ...] = dataclasses.field(metadata=_within(1, 64))
    temporal_downsample: tuple[bool, ...]
    norm_num_groups: int = dataclasses.field(metadata=_COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
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
    micro_frame_size: int = dataclasses.field(metadata=_COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spatial.latent_channels != self.temporal.in_out_channels:
            raise ValueError(
                f"the spatial autoencoder has {self.spatial.latent_channels} latent_channels, "
                f"the temporal one {self.temporal.in_out_channels} in_out_channels; expected equally many."
            )

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names; decoding runs temporal, then spatial decoder."""
        return ("temporal_encoder", "temporal_decoder", "spatial_encoder", "spatial_decoder", "stats")


CONFIGS: Mapping[str, type[T5Config] | type[STDiT3Config] | type[VAEConfig]] = MappingProxyType(
    {"t5": T5Config, "stdit3": STDiT3Config, "vae": VAEConfig}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The three networks of one text-to-video model."""

    t5: T5Config
    stdit3: STDiT3Config
    vae: VAEConfig

    def __post_init__(self) -> None:
        if self.t5.d_model != self.stdit3.caption_channels:
            raise ValueError(f"T5 width {self.t5.d_model} differs from STDiT3 caption_channels {self.stdit3.caption_channels}.")
        if self.vae.temporal.embed_dim != self.stdit3.in_channels:
            raise ValueError(
                f"VAE embed_dim {self.vae.temporal.embed_dim} differs from STDiT3 in_channels {self.stdit3.in_channels}."
            )


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

# Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3_3B_2; no weights of it were released.
stdit3_3b = dataclasses.replace(open_sora_1_2.stdit3, hidden_size=1872, num_heads=26)

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
