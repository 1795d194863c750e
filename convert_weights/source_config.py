"""The config.json of a PyTorch checkpoint as one of our configurations, and back.

Invariant: every key is honoured, required to have the one value that we implement, or named as harmless; any other key
refuses the checkpoint, because it may change the network.  Weights are not looked at.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.errors import printable, shown
from convert_weights.json_text import read_object
from convert_weights.rules import ConversionError, Header
from sora_jax.config import (
    CONFIGS,
    SpatialVAEConfig,
    STDiT3Config,
    T5Config,
    TemporalVAEConfig,
    VAEConfig,
    open_sora_1_2,
    stdit3_3b,
)

_MAX_CONFIG_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Keys:
    """What the keys of one upstream configuration mean.

    Attributes:
      honoured: upstream key to our field.
      defaults: our field to its value where the upstream key is absent (upstream's own default).
      required: upstream key to the values that we implement, as the only ones accepted.
      harmless: keys that change training, speed or bookkeeping, and not the network.
    """

    honoured: Mapping[str, str]
    defaults: Mapping[str, Any]
    required: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str]


_BOOKKEEPING = (
    "_name_or_path _class_name _diffusers_version architectures auto_map dtype from_pretrained model_type torch_dtype "
    "transformers_version"
)
_GENERATION = (
    "add_cross_attention bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size "
    "decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder "
    "is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams "
    "num_return_sequences output_attentions output_hidden_states output_past output_scores pad_token_id prefix problem_type "
    "pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id "
    "suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings "
    "tokenizer_class top_k top_p torchscript typical_p use_bfloat16 use_cache"
)


def _same(config: type, *left_out: str) -> dict[str, str]:
    return {field.name: field.name for field in dataclasses.fields(config) if field.name not in left_out}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Source: transformers T5Config; DeepFloyd/t5-v1_1-xxl config.json.
_T5 = Keys(
    honoured=_same(T5Config),
    defaults={"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6},
    required={"feed_forward_proj": ("gated-gelu",), "dense_act_fn": ("gelu_new",), "is_gated_act": (True,)},
    harmless=_words(
        f"{_BOOKKEEPING} {_GENERATION} classifier_dropout dropout_rate gradient_checkpointing initializer_factor n_positions "
        "num_decoder_layers"
    ),
)
# Source: Open-Sora v1.2 opensora/models/stdit/stdit3.py STDiT3Config.
_STDIT3 = Keys(
    honoured=_same(STDiT3Config),
    defaults={},
    required={"skip_y_embedder": (False,), "qk_norm_legacy": (False,)},
    harmless=_words(
        f"{_BOOKKEEPING} class_dropout_prob drop_path enable_flash_attn enable_layernorm_kernel enable_sequence_parallelism "
        "force_huggingface freeze_y_embedder input_size only_train_temporal return_dict"
    ),
)
# Source: Open-Sora v1.2 opensora/models/vae/vae.py VideoAutoencoderPipelineConfig.
_VAE = Keys(
    honoured={"micro_frame_size": "micro_frame_size"},
    defaults={"micro_frame_size": 17},
    required={},
    harmless=_words(f"{_BOOKKEEPING} cal_loss freeze_vae_2d return_dict scale shift vae_2d vae_temporal"),
)
# Source: Open-Sora v1.2 opensora/models/vae/vae_temporal.py VAE_Temporal.
_TEMPORAL = Keys(
    honoured=_same(TemporalVAEConfig, "norm_num_groups") | {"num_groups": "norm_num_groups"},
    defaults=open_sora_1_2.vae.temporal.to_dict(),
    required={"type": ("VAE_Temporal_SD", "VAE_Temporal"), "activation_fn": ("swish",)},
    harmless=_words(_BOOKKEEPING),
)
# Source: diffusers AutoencoderKL; PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers vae/config.json.
_SPATIAL = Keys(
    honoured=_same(SpatialVAEConfig, "scaling_factor"),
    defaults=open_sora_1_2.vae.spatial.to_dict(),
    required={
        "type": ("VideoAutoencoderKL",),
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
    },
    harmless=_words(
        f"{_BOOKKEEPING} down_block_types force_upcast latents_mean latents_std local_files_only micro_batch_size sample_size "
        "scaling_factor shift_factor subfolder up_block_types"
    ),
)
# Source: gguf-py constants and llama.cpp's conversion of T5EncoderModel.
_GGUF_ARCHITECTURES = ("t5encoder", "t5")
_GGUF_KEYS = {
    "d_model": "embedding_length",
    "d_kv": "attention.key_length",
    "num_heads": "attention.head_count",
    "d_ff": "feed_forward_length",
    "num_layers": "block_count",
    "relative_attention_num_buckets": "attention.relative_buckets_count",
    "layer_norm_epsilon": "attention.layer_norm_rms_epsilon",
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A configuration, where it came from, and the keys that were not used."""

    config: Any
    origin: str
    ignored: tuple[str, ...]


def resolve(
    network: str,
    folder: Path,
    *,
    config_file: Path | None = None,
    spatial_folder: Path | None = None,
    ignore: Collection[str] = (),
    headers: Mapping[str, Header] | None = None,
    metadata: Mapping[str, Any] | None = None,
    source: Path | None = None,
) -> Resolved:
    """Returns the configuration of a checkpoint from the config.json in the folder of its weights, or from a GGUF's metadata.

    Args:
      network: ``t5``, ``stdit3`` or ``vae``.
      folder: the folder of the weight files.
      config_file: read instead; upstream's format, or the ``config`` object of our ``network.json``.
      spatial_folder: for the VAE: the folder of the spatial part, if it comes from elsewhere.
      ignore: keys to ignore although they are unknown.
      headers: the arrays, by whose shapes one of the released configurations is chosen where there is no file.
      metadata: the numbers and short texts of a GGUF file.
      source: how errors name that file.

    Raises:
      ConversionError: a key is unknown, missing, or asks for a network that is not implemented; all faults at once.
      SourceError: the file cannot be read.
    """
    path = config_file or folder / "config.json"
    if config_file is None and metadata:
        return _from_gguf(network, source or folder, headers or {}, metadata)
    if config_file is None and not path.is_file():
        return _released(network, headers or {})
    fields = _read(path)
    problems = _Problems(ignore)
    if fields.keys() == _same(CONFIGS[network]).keys() and (network != "vae" or isinstance(fields["spatial"], dict)):
        config = _own(getattr(open_sora_1_2, network), fields, "", problems)
    elif network == "vae":
        config = _vae(fields, spatial_folder, problems)
    else:
        config = _build(getattr(open_sora_1_2, network), _T5 if network == "t5" else _STDIT3, fields, "", problems)
    if problems.faults:
        raise ConversionError(f"{path} describes a network that is not implemented", problems.faults)
    return Resolved(config, str(path), tuple(problems.ignored))


def _released(network: str, headers: Mapping[str, Header]) -> Resolved:
    """Returns Open-Sora 1.2's configuration, or that of its 3B model where the width is that one's."""
    biases = [header.shape for name, header in headers.items() if name.endswith("x_embedder.proj.bias")]
    if network == "stdit3" and biases == [(stdit3_3b.hidden_size,)]:
        return Resolved(stdit3_3b, "no config.json with the weights; the configuration of STDiT3-3B/2 is used", ())
    preset = getattr(open_sora_1_2, network)
    return Resolved(preset, "no config.json with the weights; the configuration of Open-Sora 1.2 is used", ())


def _from_gguf(network: str, source: Path, headers: Mapping[str, Header], metadata: Mapping[str, Any]) -> Resolved:
    """Returns the configuration in the metadata of a GGUF file, which for T5 lacks only the largest relative distance."""
    name = metadata.get("general.architecture")
    if network != "t5" or name not in _GGUF_ARCHITECTURES:
        expected = " or ".join(_GGUF_ARCHITECTURES)
        raise ConversionError(
            f"{source} is a GGUF file of {shown(name)}", [f"general.architecture: expected {expected}, a text encoder"]
        )
    problems = _Problems(())
    fields = {ours: metadata[f"{name}.{key}"] for ours, key in _GGUF_KEYS.items() if f"{name}.{key}" in metadata}
    epsilon = fields.get("layer_norm_epsilon")
    if type(epsilon) is float:
        fields["layer_norm_epsilon"] = float(str(np.float32(epsilon)))  # the file has float32; 1e-6 is meant
    shape = headers["token_embd.weight"].shape if "token_embd.weight" in headers else ()
    if shape:
        fields["vocab_size"] = shape[0]
    if f"{name}.attention.value_length" in metadata and metadata[f"{name}.attention.value_length"] != fields.get("d_kv"):
        problems.faults.append(f"{name}.attention.value_length: differs from key_length; only equal ones are implemented")
    config = _build(open_sora_1_2.t5, _T5, fields, "", problems)
    if problems.faults:
        raise ConversionError(f"{source} has metadata of a network that is not implemented", problems.faults)
    return Resolved(config, "the metadata of the GGUF file", ())


@dataclasses.dataclass
class _Problems:
    """What a configuration is refused for, and what is passed over; ``ignore`` holds the keys that the user vouches for."""

    ignore: Collection[str]
    faults: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)


def network_of(folder: Path) -> str | None:
    """Returns which network a folder's config.json describes (``spatial`` for an AutoencoderKL), or None."""
    if not (folder / "config.json").is_file():
        return None
    fields = _read(folder / "config.json")
    architectures = fields.get("architectures")
    names = [fields.get("model_type"), fields.get("_class_name"), *(architectures if isinstance(architectures, list) else ())]
    families = {"t5": "t5", "stdit3": "STDiT3", "vae": "VideoAutoencoderPipeline", "spatial": "AutoencoderKL"}
    return next((network for network, family in families.items() if family in names), None)


def to_upstream(network: str, config: Any) -> dict[str, Any]:
    """Returns the config.json that ``resolve`` turns into ``config`` again."""
    if network == "t5":
        return {"model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu", **config.to_dict()}
    if network == "stdit3":
        return {"model_type": "STDiT3", "architectures": ["STDiT3"], **config.to_dict()}
    temporal = {upstream: getattr(config.temporal, ours) for upstream, ours in _TEMPORAL.honoured.items()}
    spatial = {upstream: getattr(config.spatial, ours) for upstream, ours in _SPATIAL.honoured.items()}
    return {
        "model_type": "VideoAutoencoderPipeline",
        "architectures": ["VideoAutoencoderPipeline"],
        "micro_frame_size": config.micro_frame_size,
        "vae_2d": {"type": "VideoAutoencoderKL", **spatial},
        "vae_temporal": {"type": "VAE_Temporal_SD", **temporal},
    }


def _vae(fields: dict[str, Any], spatial_folder: Path | None, problems: _Problems) -> VAEConfig | None:
    faults = problems.faults
    spatial_fields = _object(fields, "vae_2d", faults)
    if spatial_folder is not None and (spatial_folder / "config.json").is_file():
        spatial_fields = _read(spatial_folder / "config.json")
    for key, block in _BLOCK_TYPES.items():
        kinds = spatial_fields.get(key) or []
        if not isinstance(kinds, list) or any(kind != block for kind in kinds):
            faults.append(f"vae_2d.{key}: {shown(kinds)}; only {block} is implemented")
    spatial = _build(open_sora_1_2.vae.spatial, _SPATIAL, spatial_fields, "vae_2d.", problems)
    temporal_fields = _object(fields, "vae_temporal", faults)
    temporal = _build(open_sora_1_2.vae.temporal, _TEMPORAL, temporal_fields, "vae_temporal.", problems)
    own = _values(_VAE, fields, "", problems)
    if type(own["micro_frame_size"]) is not int:
        faults.append(f"micro_frame_size: {shown(own['micro_frame_size'])}; only chunked coding is implemented")
    if faults:
        return None
    return _made(VAEConfig, {"spatial": spatial, "temporal": temporal, **own}, "", problems)


def _object(fields: Mapping[str, Any], key: str, faults: list[str]) -> dict[str, Any]:
    value = fields.get(key)
    if value is None or isinstance(value, dict):
        return value or {}
    faults.append(f"{key}: {shown(value)}; expected an object")
    return {}


def _own(preset: Any, fields: Mapping[str, Any], prefix: str, problems: _Problems) -> Any:
    """Returns the configuration that ``config`` of a ``network.json`` describes, or None where there are faults."""
    values: dict[str, Any] = {}
    for name, example in preset.to_dict().items():
        value = fields.get(name)
        if isinstance(example, dict):
            values[name] = _own(getattr(preset, name), _object(fields, name, problems.faults), f"{prefix}{name}.", problems)
        elif name not in fields:
            problems.faults.append(f"{prefix}{name}: missing")
        elif not _same_type(value, example):
            problems.faults.append(f"{prefix}{name}: {shown(value)}; expected a value like {example!r}")
        else:
            values[name] = value
    problems.faults += [f"{prefix}{shown(name)}: unknown" for name in fields.keys() - preset.to_dict().keys()]
    return None if problems.faults else _made(type(preset), values, prefix, problems)


def _build(preset: Any, keys: Keys, fields: Mapping[str, Any], prefix: str, problems: _Problems) -> Any:
    """Returns a configuration of the kind of ``preset``, or None where there are faults."""
    before = len(problems.faults)
    values = _values(keys, fields, prefix, problems)
    for name, example in preset.to_dict().items():
        if name not in values:
            problems.faults.append(f"{prefix}{name}: missing")
        elif not _same_type(values[name], example):
            problems.faults.append(f"{prefix}{name}: {shown(values[name])}; expected a value like {example!r}")
    return _made(type(preset), values, prefix, problems) if len(problems.faults) == before else None


def _made(kind: Any, values: Mapping[str, Any], prefix: str, problems: _Problems) -> Any:
    """Returns the configuration of these values, or None where one is out of its range."""
    try:
        return kind.from_dict(dict(values))
    except ValueError as error:
        problems.faults.append(f"{prefix}{error}")
        return None


def _same_type(value: Any, example: Any) -> bool:
    if isinstance(example, tuple | list):
        return isinstance(value, tuple | list) and all(_same_type(item, example[0]) for item in value)
    return type(value) is type(example) or (type(example) is float and type(value) is int)


def _values(keys: Keys, fields: Mapping[str, Any], prefix: str, problems: _Problems) -> dict[str, Any]:
    """Returns our fields; adds to ``problems`` what upstream's other keys deserve."""
    values = dict(keys.defaults)
    for key, value in fields.items():
        if key in keys.honoured:
            values[keys.honoured[key]] = value
        elif key in keys.required:
            if not any(type(value) is type(only) and value == only for only in keys.required[key]):
                problems.faults.append(f"{prefix}{key}: {shown(value)}; only {keys.required[key][0]!r} is implemented")
        elif key in keys.harmless or prefix + key in problems.ignore:
            problems.ignored.append(prefix + key)
        else:
            name = f"{prefix}{printable(key)}"
            problems.faults.append(f"{name}: unknown, so it may change the network; --ignore-config-key {name} if it does not")
    return values


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, "a configuration", max_bytes=_MAX_CONFIG_BYTES)
