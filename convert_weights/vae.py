"""The weight table of the video autoencoder: Open-Sora 1.2's VideoAutoencoderPipeline to ``sora_jax.networks.vae``.

Invariant: one line per array of the PyTorch module tree, with placeholders for its lists; which indices exist is decided
by the configuration.  The spatial part is diffusers' AutoencoderKL, whose attention layers have had two spellings.
"""

from convert_weights.rules import CHANNELS, CONV2D, CONV3D, LINEAR_OR_CONV1X1, Rule, Transform
from sora_jax.config import VAEConfig

_SPATIAL = "spatial_vae.module"

IGNORED: dict[str, str] = {}


def rules(config: VAEConfig) -> list[Rule]:
    """Returns the table, the same for every configuration."""
    del config
    statistics = [Rule(name, f"stats.{name}", CHANNELS) for name in ("shift", "scale")]
    return statistics + _spatial_encoder() + _spatial_decoder() + _temporal_encoder() + _temporal_decoder()


def _spatial_encoder() -> list[Rule]:
    source, target = f"{_SPATIAL}.encoder", "spatial_encoder"
    return [
        *_affine(f"{source}.conv_in", f"{target}.conv_in", CONV2D),
        *_resnet(f"{source}.down_blocks.{{i}}.resnets.{{j}}", f"{target}.down_blocks.{{i}}.resnets.{{j}}"),
        *_affine(f"{source}.down_blocks.{{i}}.downsamplers.0.conv", f"{target}.down_blocks.{{i}}.downsampler", CONV2D),
        *_mid_block(f"{source}.mid_block", f"{target}.mid_block"),
        *_norm(f"{source}.conv_norm_out", f"{target}.conv_norm_out"),
        *_affine(f"{source}.conv_out", f"{target}.conv_out", CONV2D),
        *_affine(f"{_SPATIAL}.quant_conv", f"{target}.quant_conv", CONV2D),
    ]


def _spatial_decoder() -> list[Rule]:
    source, target = f"{_SPATIAL}.decoder", "spatial_decoder"
    return [
        *_affine(f"{_SPATIAL}.post_quant_conv", f"{target}.post_quant_conv", CONV2D),
        *_affine(f"{source}.conv_in", f"{target}.conv_in", CONV2D),
        *_mid_block(f"{source}.mid_block", f"{target}.mid_block"),
        *_resnet(f"{source}.up_blocks.{{i}}.resnets.{{j}}", f"{target}.up_blocks.{{i}}.resnets.{{j}}"),
        *_affine(f"{source}.up_blocks.{{i}}.upsamplers.0.conv", f"{target}.up_blocks.{{i}}.upsampler", CONV2D),
        *_norm(f"{source}.conv_norm_out", f"{target}.conv_norm_out"),
        *_affine(f"{source}.conv_out", f"{target}.conv_out", CONV2D),
    ]


def _temporal_encoder() -> list[Rule]:
    source, target = "temporal_vae.encoder", "temporal_encoder"
    return [
        Rule(f"{source}.conv_in.conv.weight", f"{target}.conv_in.kernel", CONV3D),
        *_res_block(f"{source}.block_res_blocks.{{i}}.{{j}}", f"{target}.block_res_blocks.{{i}}.{{j}}"),
        *_affine(f"{source}.conv_blocks.{{i}}.conv", f"{target}.conv_blocks.{{i}}", CONV3D),
        *_res_block(f"{source}.res_blocks.{{i}}", f"{target}.res_blocks.{{i}}"),
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *_affine(f"{source}.conv2.conv", f"{target}.conv2", CONV3D),
        *_affine("temporal_vae.quant_conv.conv", f"{target}.quant_conv", CONV3D),
    ]


def _temporal_decoder() -> list[Rule]:
    source, target = "temporal_vae.decoder", "temporal_decoder"
    return [
        *_affine("temporal_vae.post_quant_conv.conv", f"{target}.post_quant_conv", CONV3D),
        *_affine(f"{source}.conv1.conv", f"{target}.conv1", CONV3D),
        *_res_block(f"{source}.res_blocks.{{i}}", f"{target}.res_blocks.{{i}}"),
        *_res_block(f"{source}.block_res_blocks.{{i}}.{{j}}", f"{target}.block_res_blocks.{{i}}.{{j}}"),
        *_affine(f"{source}.conv_blocks.{{i}}.conv", f"{target}.conv_blocks.{{i}}", CONV3D),
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *_affine(f"{source}.conv_out.conv", f"{target}.conv_out", CONV3D),
    ]


def _resnet(source: str, target: str) -> list[Rule]:
    """Returns the rules of a block of the spatial autoencoder: convolutions with bias."""
    return [
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *_affine(f"{source}.conv1", f"{target}.conv1", CONV2D),
        *_norm(f"{source}.norm2", f"{target}.norm2"),
        *_affine(f"{source}.conv2", f"{target}.conv2", CONV2D),
        *_affine(f"{source}.conv_shortcut", f"{target}.conv_shortcut", CONV2D),
    ]


def _res_block(source: str, target: str) -> list[Rule]:
    """Returns the rules of a block of the temporal autoencoder: convolutions without bias."""
    return [
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        Rule(f"{source}.conv1.conv.weight", f"{target}.conv1.kernel", CONV3D),
        *_norm(f"{source}.norm2", f"{target}.norm2"),
        Rule(f"{source}.conv2.conv.weight", f"{target}.conv2.kernel", CONV3D),
        Rule(f"{source}.conv3.conv.weight", f"{target}.conv3.kernel", CONV3D),
    ]


def _mid_block(source: str, target: str) -> list[Rule]:
    attention = f"{source}.attentions.0"
    spellings = {  # diffusers since 0.13, and before
        "to_q": ("to_q", "query"),
        "to_k": ("to_k", "key"),
        "to_v": ("to_v", "value"),
        "to_out": ("to_out.0", "proj_attn"),
    }
    projections = [
        rule
        for ours, theirs in spellings.items()
        for name in theirs
        for rule in _affine(f"{attention}.{name}", f"{target}.attention.{ours}", LINEAR_OR_CONV1X1)
    ]
    return [
        *_resnet(f"{source}.resnets.{{i}}", f"{target}.resnets.{{i}}"),
        *_norm(f"{attention}.group_norm", f"{target}.attention.group_norm"),
        *projections,
    ]


def _affine(source: str, target: str, transform: Transform) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.kernel", transform), Rule(f"{source}.bias", f"{target}.bias")]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]
