"""The weight table of the video autoencoder: Open-Sora 1.2's VideoAutoencoderPipeline to ``sora_jax.networks.vae``.

Invariant: one line per array of the PyTorch module tree, with placeholders for its lists; which indices exist is decided
by the configuration.  The spatial part is diffusers' AutoencoderKL, whose attention layers have had two spellings, or the same
network under the names of latent diffusion's original code, alone or as ``first_stage_model`` of a whole image model.
"""

from convert_weights.rules import CHANNELS, CONV2D, CONV3D, LINEAR_OR_CONV1X1, Rule, Transform
from sora_jax.config import VAEConfig

_SPATIAL = "spatial_vae.module"

_ORIGINAL = (_SPATIAL, f"{_SPATIAL}.first_stage_model")
_IMAGE_MODEL = "a part of an image model other than its autoencoder"
_TRAINING = "the loss or the averages of an autoencoder's training"
IGNORED = {
    f"{_SPATIAL}.{pattern}": reason
    for pattern, reason in {
        "model.{*}": _IMAGE_MODEL,
        "conditioner.{*}": _IMAGE_MODEL,
        "cond_stage_model.{*}": _IMAGE_MODEL,
        "denoiser.{*}": _IMAGE_MODEL,
        "alphas_cumprod{*}": _IMAGE_MODEL,
        "betas": _IMAGE_MODEL,
        "loss.{*}": _TRAINING,
        "model_ema.{*}": _TRAINING,
        "first_stage_model.loss.{*}": _TRAINING,
    }.items()
}


def rules(config: VAEConfig) -> list[Rule]:
    """Returns the table; the levels of the configuration count backwards in the original names of the decoder."""
    statistics = [Rule(name, f"stats.{name}", CHANNELS) for name in ("shift", "scale")]
    spatial = _spatial_encoder() + _spatial_decoder()
    original = [rule for root in _ORIGINAL for rule in _original(root, len(config.spatial.block_out_channels))]
    return statistics + spatial + _temporal_encoder() + _temporal_decoder() + original


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


def _original(root: str, levels: int) -> list[Rule]:
    """Returns the rules of latent diffusion's own names.

    Source: CompVis latent-diffusion ldm/modules/diffusionmodules/model.py.
    """
    encoder, decoder = f"{root}.encoder", f"{root}.decoder"
    down, up = f"{encoder}.down.{{i}}", "spatial_encoder.down_blocks.{i}"
    found = [
        *_original_block(f"{down}.block.{{j}}", f"{up}.resnets.{{j}}"),
        *_affine(f"{down}.downsample.conv", f"{up}.downsampler", CONV2D),
        *_affine(f"{root}.quant_conv", "spatial_encoder.quant_conv", CONV2D),
        *_affine(f"{root}.post_quant_conv", "spatial_decoder.post_quant_conv", CONV2D),
    ]
    for level in range(levels):
        theirs, ours = f"{decoder}.up.{levels - 1 - level}", f"spatial_decoder.up_blocks.{level}"
        found += _original_block(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}")
        found += _affine(f"{theirs}.upsample.conv", f"{ours}.upsampler", CONV2D)
    for source, target in ((encoder, "spatial_encoder"), (decoder, "spatial_decoder")):
        found += _affine(f"{source}.conv_in", f"{target}.conv_in", CONV2D)
        found += _original_block(f"{source}.mid.block_1", f"{target}.mid_block.resnets.0")
        found += _original_block(f"{source}.mid.block_2", f"{target}.mid_block.resnets.1")
        found += _norm(f"{source}.mid.attn_1.norm", f"{target}.mid_block.attention.group_norm")
        for theirs, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}.items():
            found += _affine(f"{source}.mid.attn_1.{theirs}", f"{target}.mid_block.attention.{ours}", LINEAR_OR_CONV1X1)
        found += _norm(f"{source}.norm_out", f"{target}.conv_norm_out")
        found += _affine(f"{source}.conv_out", f"{target}.conv_out", CONV2D)
    known = {rule.source for rule in _spatial_encoder() + _spatial_decoder()}
    return [rule for rule in found if rule.source not in known]


def _original_block(source: str, target: str) -> list[Rule]:
    """Returns the rules of a block of the spatial autoencoder under its original names."""
    return [
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *_affine(f"{source}.conv1", f"{target}.conv1", CONV2D),
        *_norm(f"{source}.norm2", f"{target}.norm2"),
        *_affine(f"{source}.conv2", f"{target}.conv2", CONV2D),
        *_affine(f"{source}.nin_shortcut", f"{target}.conv_shortcut", CONV2D),
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
