"""A generation's settings as the work that its memory plan, and the record of its clip, are about.

Invariant: the plan that is shown, the plan that is followed and the record describe the same work.  No array is made.
"""

from typing import Any

import numpy as np

from sora_jax.config import policy_of
from sora_jax.devices.attention_choice import form_name
from sora_jax.networks.vae.codec import chunks, latent_size
from sora_jax.pipeline.coders import frame_batch
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.settings import Settings
from sora_jax.streaming.activations import attention_shapes
from sora_jax.streaming.host_loop import frame_batches
from sora_jax.streaming.memory_plan import Workload, token_shape


def workload_of(settings: Settings, batch: int, *, attention: str = "auto", encodes: bool = False) -> Workload:
    """Returns the work of ``batch`` clips; ``encodes`` says whether there are references."""
    return Workload(
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        batch=batch,
        guided=settings.guided,
        dtype=settings.dtype,
        attention=attention,
        merge=settings.merge if settings.merge_steps else None,
        num_steps=settings.num_steps,
        encodes=encodes or settings.loop > 1,
    )


def attention_used(networks: Networks, settings: Settings, batch: int) -> dict[str, Any]:
    """Returns the form of every attention of each network, by name, for a batch of clips; JSON-ready.

    For captions that are all encoded anew, and evaluations that merge nothing.
    """
    config, forms = networks.config, networks.forms(settings.dtype)
    length = config.stdit3.model_max_length
    tokens = token_shape(config, workload_of(settings, batch))

    def name(shape: tuple[int, int, int, int], head_size: int, **options: bool) -> str:
        return form_name(forms.attention, shape, head_size=head_size, dtype=settings.dtype, **options)

    pair = attention_shapes(config.stdit3, *tokens, forms, itemsize=np.dtype(policy_of(settings.dtype).compute).itemsize)
    frames, places = _frames_and_places(networks, settings, batch)
    return {
        "asked": networks.attention,
        "t5": name((batch, config.t5.num_heads, length, length), config.t5.d_kv, biased=True, masked=True),
        "stdit3": {kind: name(shape, config.stdit3.head_size, masked="cross" in kind) for kind, shape in pair.items()},
        "vae": name((frames, 1, places, places), config.vae.spatial.block_out_channels[-1]),
    }


def _frames_and_places(networks: Networks, settings: Settings, batch: int) -> tuple[int, int]:
    """Returns how many frames the spatial decoder's attention takes at once, and the latents of one."""
    vae = networks.config.vae
    _, rows, columns = latent_size(vae, settings.num_frames, settings.height, settings.width)
    height, width = rows * vae.spatial.downsampling, columns * vae.spatial.downsampling
    frames = batch * max(chunk.num_frames for chunk in chunks(vae, settings.num_frames))
    if networks.budget is not None:
        frames = max(part.stop - part.start for part in frame_batches(frames, height * width))
    elif frame_batch(height, width) < frames:
        frames = 1  # a loop over frames
    return frames, rows * columns
