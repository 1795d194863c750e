"""Trains the pocket model from nothing: ``python -m sora_jax.pocket.train --work DIR``.

Stages, in order: the spatial autoencoder, the temporal one, the text encoder, the transformer.  Each resumes from its
last checkpoint; a stage that is complete is read back and not repeated.  Invariant: the outcome is a function of the
arguments alone, not of interruptions.
"""

import argparse
import logging
from pathlib import Path

from sora_jax.config import pocket
from sora_jax.pocket import train_codec
from sora_jax.pocket.fit import Params, fit

logger = logging.getLogger(__name__)


def train_codec_stages(work: Path, args: argparse.Namespace) -> Params:
    """Returns the complete codec: both autoencoders and the statistics of its latents."""
    stage = train_codec.spatial_stage(pocket.vae, num_steps=args.spatial_steps, batch_size=16, seed=args.seed)
    spatial = train_codec.unit_variance(fit(stage, work, seed=args.seed), pocket.vae, seed=args.seed)
    stage = train_codec.temporal_stage(pocket.vae, spatial, num_steps=args.temporal_steps, batch_size=8, seed=args.seed)
    return train_codec.with_stats(spatial | fit(stage, work, seed=args.seed), pocket.vae, seed=args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sora_jax.pocket.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder of checkpoints and reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spatial-steps", type=int, default=2400)
    parser.add_argument("--temporal-steps", type=int, default=2000)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    train_codec_stages(args.work, args)


if __name__ == "__main__":
    main()
