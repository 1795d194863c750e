"""Attention in exported programs: dense, or in chunks of queries where the logits of one would take more than a limit.

A pair of blocks may have its functions in several forms (`cut`), so that a device can choose.

Invariant: artefacts hold no kernel of one platform.  Chunks are written out one after the other, which every converter knows;
only StableHLO, which has loops, has them as a loop.  Without a limit passed every program is the dense one.
"""

from collections.abc import Sequence

from sora_jax.config import ModelConfig
from sora_jax.devices.attention_choice import ByLogits, queries_at_once
from sora_jax.export.cut import BREAKER, WHOLE_CUT, Cut, form_entries, limit_of
from sora_jax.export.entries import AttentionEntry, ChunkedEntry, TargetName
from sora_jax.export.size import Size
from sora_jax.networks.forms import Forms
from sora_jax.streaming.activations import attention_shapes

LOGITS_LIMIT = 2**28  # bytes in float32: a guided pair of 51 frames at 256p has 147 MB


def export_forms(limit: int, target: TargetName, form: str | None = None) -> Forms:
    """Returns the forms of the programs of a target, or those of a pair in a form of attention by name."""
    attention = ByLogits(limit_of(form, limit), unrolled=target != "stablehlo", breaker=form == BREAKER)
    return Forms(attention=attention)


def pair_forms(cut: Cut, limit: int, target: TargetName) -> dict[str | None, Forms]:
    """Returns the forms of a pair's functions, by the name of the form of attention."""
    return {form: export_forms(limit, target, form) for form in cut.attention_forms or (None,)}


def attention_entry(
    config: ModelConfig, sizes: Sequence[Size], parts: Sequence[str], limit: int, cut: Cut = WHOLE_CUT
) -> AttentionEntry:
    """Returns the limit, every attention of the exported parts that is chunked by it, and the forms of pairs."""
    form = ByLogits(limit)
    chunked: list[ChunkedEntry] = []
    for size in sizes:
        for part, kind, shape in _attentions(config, size, cut.guidance_rows):
            at_once = queries_at_once(form, *shape)
            if part in parts and at_once < shape[2]:
                chunked.append({"part": part, "size": size.key, "attention": kind, "queries": at_once})
    entry: AttentionEntry = {"logits_limit_bytes": limit, "chunked": chunked}
    if cut.attention_forms:
        entry["forms"] = form_entries(cut, limit)
    return entry


def _attentions(config: ModelConfig, size: Size, guidance_rows: int) -> list[tuple[str, str, tuple[int, int, int, int]]]:
    """Returns part, kind, and entries, heads, queries and keys of each attention where nothing is merged."""
    frames, rows, columns = size.latents(config.vae)
    _, down, across = config.stdit3.patch_size
    tokens = guidance_rows, frames, -(-rows // down) * -(-columns // across)
    length, places = config.stdit3.model_max_length, rows * columns
    return [
        ("t5", "self", (1, config.t5.num_heads, length, length)),
        *(("stdit3", kind, shape) for kind, shape in attention_shapes(config.stdit3, *tokens).items()),
        *((part, "middle", (1, 1, places, places)) for part in ("vae_decoder", "vae_encoder")),
    ]
