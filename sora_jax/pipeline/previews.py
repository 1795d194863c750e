"""The previews of an opened model: its map is found, or fitted with the model's own autoencoder, once.

Invariant: under a memory budget the autoencoder is never loaded during a sampling; the map is fitted before it, or there is
no preview.
"""

import dataclasses
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from sora_jax.pipeline import preview_fit
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.preview import FILE_NAME, PreviewMap, digest_of
from sora_jax.pipeline.settings import Settings
from sora_jax.pipeline.workload import workload_of
from sora_jax.process import Timings
from sora_jax.streaming.memory_plan import plan_memory


class Previews:
    """Makes pictures of latents for the networks of one model.

    Args:
      networks: the opened networks.
      settings: any of the model's; their size and length are not used.
    """

    def __init__(self, networks: Networks, settings: Settings):
        self._networks, self._settings = networks, settings
        self._map: PreviewMap | None = None
        self._lock = threading.Lock()

    def prepare(self, folder: Path | None = None) -> PreviewMap:
        """Returns the map: of the model directory, of the folder, or fitted and kept there.

        Raises:
          ModelDirectoryError: a parameter of the autoencoder is missing or damaged.
          ValueError: the memory budget is too small to fit a map.
          OSError: the folder cannot be written.
        """
        with self._lock:
            if self._map is None:
                self._map = self._known(folder) or self._fitted(folder)
            return self._map

    def pictures(self, z_BTHWC: Float[np.ndarray, "B T H W C"]) -> UInt8[np.ndarray, "B T h w 3"]:
        """Returns a picture for each latent frame; fits the map if it has to, which a memory budget forbids.

        Raises:
          ValueError: there is a budget, and no map.
        """
        if self._map is None and self._networks.budget is not None and self._known(None) is None:
            raise ValueError(
                "previews need a map that is fitted with the autoencoder, and a memory budget has no room for both networks "
                "at once; call prepare_preview() of the pipeline before it generates."
            )
        return self.prepare().pictures(z_BTHWC)

    def _known(self, folder: Path | None) -> PreviewMap | None:
        vae, found = self._networks.manifests["vae"], None
        if isinstance(vae.path, Path):
            found = PreviewMap.read(vae.path.parent / FILE_NAME, vae)
        return found if found is not None or folder is None else PreviewMap.read(_kept(folder, digest_of(vae)), vae)

    def _fitted(self, folder: Path | None) -> PreviewMap:
        networks, config = self._networks, self._networks.config.vae
        clips = preview_fit.moving_shapes(config.micro_frame_size)
        height, width = clips.shape[2:4]
        settings = dataclasses.replace(self._settings, height=height, width=width, num_frames=clips.shape[1], loop=1)
        plan, at_a_time = None, len(clips)
        if networks.budget is not None:
            at_a_time = preview_fit.WITHIN_BUDGET
            workload = workload_of(settings, at_a_time, attention=networks.attention, encodes=True)
            plan = plan_memory(networks.manifests, workload, networks.budget)
        coders = Coders(networks, settings.dtype, Timings(), plan)
        found = preview_fit.fit(
            config, lambda video: coders.encode_videos([video])[0], coders.decode, clips, at_a_time=at_a_time
        )
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            found.write(_kept(folder, digest_of(networks.manifests["vae"])), networks.manifests["vae"])
        return found


def _kept(folder: Path, digest: str) -> Path:
    return folder / f"{digest[:32]}.map"
