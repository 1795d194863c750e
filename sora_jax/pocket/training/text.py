"""Training of pocket's text encoder: every token of a caption learns to encode what the whole caption says.

The encoder is trained alone, on an endless stream of captions, by linear heads that are thrown away; the transformer then
reads frozen features.  Trained together from scratch, the two networks put the right colours in the wrong places.
Invariant: a head's last class means "not named", so what a caption leaves open stays open.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from sora_jax.config import FLOAT32, T5Config, pocket
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.networks.layers import Linear
from sora_jax.networks.t5 import T5Encoder
from sora_jax.pocket.training.fit import Params, Stage
from sora_jax.pocket.world.captions import caption
from sora_jax.pocket.world.scenes import sample_scenes
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.pocket.world.words import ATTRIBUTES, Split
from sora_jax.storage.checkpoint import flatten, unflatten

MAX_LENGTH = pocket.stdit3.model_max_length  # tokens of a caption
LEARNING_RATE = 3e-3  # highest learning rate, from scratch
WARM_RATE = 1e-3  # highest learning rate, from an encoder whose features a transformer already reads

Batch = dict[str, Any]  # ids, mask, and the labels of every attribute


@functools.cache
def abstract_t5(config: T5Config) -> T5Encoder:
    """Returns the encoder's shapes without arrays."""
    return jax.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))


def text_stage(
    config: T5Config, tokenizer: Tokenizer, *, num_steps: int, batch_size: int, seed: int, start: Params | None = None
) -> Stage:
    """Returns the stage that trains the encoder and its heads, from scratch or from the parameters ``start``."""
    rate = LEARNING_RATE if start is None else WARM_RATE
    return Stage(
        name="text",
        num_steps=num_steps,
        init=functools.partial(first_params, config, seed, start),
        batch=lambda step: caption_batch(np.random.default_rng([seed, 2, step]), tokenizer, batch_size),
        loss=functools.partial(text_loss, config),
        learning_rate=optax.warmup_cosine_decay_schedule(0.0, rate, 50, num_steps, rate / 100),
        average=0.99,
        evaluate=functools.partial(_share_right, config, tokenizer, seed),
        evaluate_every=500,
    )


def first_params(config: T5Config, seed: int, start: Params | None) -> Params:
    """Returns the parameters at step 0: those of the encoder, new or ``start``, and of new heads."""
    rngs = nnx.Rngs(seed)
    parts = {
        "encoder": flatten(T5Encoder(config, rngs=rngs)) if start is None else start,
        "heads": flatten(_heads(config, rngs)),
    }
    return {f"{part}.{name}": value for part, params in parts.items() for name, value in params.items()}


def text_loss(config: T5Config, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the cross entropy of every attribute at every real token, summed over the attributes."""
    mask_BL = batch["mask"]
    total = jnp.zeros(())
    for name, logits_BLK in attribute_logits(config, params, batch).items():
        labels_BL = jnp.broadcast_to(batch["labels"][name][:, None], logits_BLK.shape[:2])
        losses_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLK, labels_BL)
        total += jnp.sum(losses_BL * mask_BL) / jnp.sum(mask_BL)
    return total, {}


def attribute_logits(config: T5Config, params: Params, batch: Batch) -> dict[str, Float[Array, "B L K"]]:
    """Returns what each token tells of each attribute, by name."""
    features_BLE = unflatten(abstract_t5(config), encoder_params(params))(batch["ids"], batch["mask"])
    heads = unflatten(_abstract_heads(config), _below("heads", params))
    return {name: head(features_BLE) for name, head in heads.items()}


def _share_right(config: T5Config, tokenizer: Tokenizer, seed: int, params: Params) -> dict[str, float]:
    """Returns the scores of an encoder: the share of real tokens that tell all attributes of unseen captions right."""
    batch = caption_batch(np.random.default_rng([seed, 1]), tokenizer, 1024, split="unseen")
    right, tokens = _count_right(config, params, batch)
    return {"tokens_all_attributes_right": float(right / tokens)}


@functools.partial(jax.jit, static_argnums=0)
def _count_right(config: T5Config, params: Params, batch: Batch) -> jax.Array:
    """Returns how many real tokens tell all attributes right, and how many there are."""
    mask_BL, logits = batch["mask"], attribute_logits(config, params, batch)
    right = [jnp.argmax(out_BLK, -1) == batch["labels"][name][:, None] for name, out_BLK in logits.items()]
    return jnp.stack([jnp.sum(jnp.all(jnp.stack(right), 0) & mask_BL), jnp.sum(mask_BL)])


def encoder_params(params: Params) -> Params:
    """Returns the encoder's flat parameters without the heads."""
    return _below("encoder", params)


def caption_batch(rng: np.random.Generator, tokenizer: Tokenizer, num: int, *, split: Split = "training") -> Batch:
    """Returns tokens of captions and the class of each attribute, ``len(values)`` where the caption does not name it."""
    scenes = sample_scenes(rng, num, split=split)
    texts, named = zip(*(caption(scenes.attributes(i), rng) for i in range(num)), strict=True)
    ids_BL, mask_BL = tokenizer.encode(texts, MAX_LENGTH)
    labels = {
        name: np.array([values.index(one[name]) if name in one else len(values) for one in named], np.int32)
        for name, values in ATTRIBUTES.items()
    }
    return {"ids": ids_BL, "mask": mask_BL, "labels": labels}


def _heads(config: T5Config, rngs: nnx.Rngs) -> dict[str, Linear]:
    return {name: Linear(config.d_model, len(values) + 1, policy=FLOAT32, rngs=rngs) for name, values in ATTRIBUTES.items()}


@functools.cache
def _abstract_heads(config: T5Config) -> dict[str, Linear]:
    return jax.eval_shape(lambda: _heads(config, nnx.Rngs(0)))


def _below(prefix: str, params: Params) -> Params:
    return {name.removeprefix(f"{prefix}."): value for name, value in params.items() if name.startswith(f"{prefix}.")}


def shipped_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of the grammar, written to ``path`` first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path)
    return Tokenizer.from_file(path)
