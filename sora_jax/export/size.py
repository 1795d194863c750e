"""The size of a video that programs of fixed shapes are exported for."""

import dataclasses

from sora_jax.config import VAEConfig
from sora_jax.networks.vae.codec import latent_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Frames, rows and columns of a video in pixels."""

    num_frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} of an exported size is {value!r}; expected a whole number of at least 1.")

    @property
    def key(self) -> str:
        """The size in a word, frames x height x width: ``34x64x64``."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    def latents(self, config: VAEConfig) -> tuple[int, int, int]:
        """Returns latent frames, rows and columns."""
        return latent_size(config, self.num_frames, self.height, self.width)
