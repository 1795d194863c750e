"""Trains the pocket model from nothing: ``python -m sora_jax.pocket.train --work DIR``.

Stages, in order: the spatial autoencoder, the temporal one, both decoders again, the text encoder, the transformer.  Each
resumes from its last checkpoint; a stage that is complete is read back and not repeated.  The model directory ``DIR/model``
is written again at every evaluation of the transformer.  Invariant: the outcome is a function of the arguments alone, not
of interruptions.
"""

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from sora_jax.config import pocket
from sora_jax.inputs.tokenizer import Tokenizer
from sora_jax.pocket.judging import cases
from sora_jax.pocket.judging.measure import measure
from sora_jax.pocket.judging.scores import score
from sora_jax.pocket.training import codec as train_codec
from sora_jax.pocket.training import flow, latents
from sora_jax.pocket.training import text as train_text
from sora_jax.pocket.training.fit import Params, fit
from sora_jax.pocket.world.vocabulary import write_tokenizer
from sora_jax.pocket.world.words import FPS, MOTIONS, NUM_FRAMES, SIZE_PX
from sora_jax.shell import BAD_INPUT, INTERRUPTED, Parser, describe
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.writer import update_model_file
from sora_jax.version import __version__

DEFAULTS = {"num_steps": 30, "guidance": 3.0, "height": SIZE_PX, "width": SIZE_PX, "num_frames": NUM_FRAMES, "fps": FPS}
LESSONS = ("4500:5700:left,right,up,down,grow,shrink", "7000:7400:left,right")
DECODER_STEPS = 1500  # where the codec is trained from nothing
TRAINING_SEED = 1_000_000  # of the captions that watch training, apart from those of published figures


def codec_stages(args: argparse.Namespace) -> Params:
    """Returns the codec after its first two stages: both autoencoders and the statistics of its latents."""
    stage = train_codec.spatial_stage(pocket.vae, num_steps=args.spatial_steps, batch_size=args.spatial_batch, seed=args.seed)
    spatial = train_codec.unit_variance(fit(stage, args.work, seed=args.seed), pocket.vae, seed=args.seed)
    stage = train_codec.temporal_stage(
        pocket.vae, spatial, num_steps=args.temporal_steps, batch_size=args.temporal_batch, seed=args.seed
    )
    return train_codec.with_stats(spatial | fit(stage, args.work, seed=args.seed), pocket.vae, seed=args.seed)


def with_decoders(args: argparse.Namespace, codec: Params) -> Params:
    """Returns the codec with decoders that were trained further."""
    stage = train_codec.decoder_stage(
        pocket.vae, codec, num_steps=args.decoder_steps, batch_size=args.temporal_batch, seed=args.seed
    )
    return codec | fit(stage, args.work, seed=args.seed)


def text_encoder(args: argparse.Namespace, tokenizer: Tokenizer, start: Params | None) -> Params:
    """Returns the complete text encoder."""
    stage = train_text.text_stage(
        pocket.t5, tokenizer, num_steps=args.text_steps, batch_size=args.text_batch, seed=args.seed, start=start
    )
    return train_text.encoder_params(fit(stage, args.work, seed=args.seed))


def _stored(model: str, network: str) -> Params:
    return jax.device_put(load_network(model, network, dtype="float32")[1])


def transformer(args: argparse.Namespace, model: Path, codec: Params, text: Params, tokenizer: Tokenizer) -> Params:
    """Returns the transformer; every evaluation writes it to the model directory and judges clips made from there."""

    def evaluate(params: Params) -> dict[str, float]:
        save_network(model, "stdit3", pocket.stdit3, params, dtype=args.dtype, overwrite=True)
        asked = cases.captions(args.judged, seed=TRAINING_SEED)
        seen = [measure(made.frames_thw3) for made in cases.clips(model, asked)]
        return {name: rate.share for name, rate in score(seen, [one.attributes for one in asked]).items()}

    cached = functools.partial(latents.cache_clips, codec, pocket)
    long_frames = flow.LONG_FRAMES
    batches = flow.Batches(
        clips=cached(args.work / "latents", num_clips=args.clips, seed=args.seed),
        long_clips=cached(args.work / "long_latents", num_clips=args.long_clips, seed=args.seed + 1, num_frames=long_frames),
        tokenizer=tokenizer,
        size=args.batch,
        seed=args.seed,
        lessons=[_lesson(text) for text in args.lessons],
    )
    stage = flow.flow_stage(
        pocket,
        text,
        batches,
        num_steps=args.flow_steps,
        evaluate=evaluate,
        evaluate_every=args.judge_every,
        learning_rate=args.flow_rate,
        start=_stored(args.base, "stdit3") if args.warm else None,
    )
    return fit(stage, args.work, seed=args.seed)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments of the command; they and the code are the whole recipe."""
    parser = Parser(prog="python -m sora_jax.pocket.train", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("training"), help="folder of checkpoints, reports and the model")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="stored dtype of the model")
    parser.add_argument("--base", metavar="MODEL_DIR", help="whose codec and text encoder are kept, not trained")
    parser.add_argument("--warm", action="store_true", help="start the transformer from that of --base")
    parser.add_argument("--warm-text", action="store_true", help="train the text encoder of --base further, not keep it")
    parser.add_argument("--spatial-steps", type=int, default=2400, help="updates of the spatial autoencoder")
    parser.add_argument("--spatial-batch", type=int, default=16, help="frames in one step of the spatial autoencoder")
    parser.add_argument("--temporal-steps", type=int, default=900, help="updates of the temporal autoencoder")
    parser.add_argument(
        "--temporal-batch", type=int, default=8, help="chunks in one step of the temporal autoencoder and the decoders"
    )
    parser.add_argument(
        "--decoder-steps", type=int, help=f"updates of both decoders again (default {DECODER_STEPS}, with --base none)"
    )
    parser.add_argument("--text-steps", type=int, default=1000, help="updates of the text encoder")
    parser.add_argument("--text-batch", type=int, default=128, help="captions in one step of the text encoder")
    parser.add_argument("--clips", type=int, default=6144, help="clips in the cache of latents")
    parser.add_argument("--long-clips", type=int, default=1024, help="longer clips in a cache of their own")
    parser.add_argument("--flow-steps", type=int, default=8200, help="updates of the transformer")
    parser.add_argument("--flow-rate", type=float, default=flow.LEARNING_RATE, help="its highest learning rate")
    parser.add_argument(
        "--lesson",
        type=_checked_lesson,
        action="append",
        dest="lessons",
        metavar="FROM:TO:MOTIONS",
        help=f"steps that see fast clips of these motions only; may be repeated (default: {' '.join(LESSONS)})",
    )
    parser.add_argument("--batch", type=int, default=32, help="clips in one step of the transformer")
    parser.add_argument("--judge-every", type=int, default=500, help="steps of the transformer between evaluations")
    parser.add_argument("--judged", type=int, default=48, help="captions in one evaluation")
    args = parser.parse_args(arguments)
    if (args.warm or args.warm_text) and not args.base:
        parser.error("--warm and --warm-text start from the networks of a model; name them with --base MODEL_DIR.")
    args.decoder_steps = args.decoder_steps if args.decoder_steps is not None else 0 if args.base else DECODER_STEPS
    args.lessons = list(LESSONS) if args.lessons is None else args.lessons
    return args


def _lesson(text: str) -> flow.Lesson:
    start, stop, motions = text.split(":")
    return flow.Lesson(start=int(start), stop=int(stop), motions=tuple(motions.split(",")))


def _checked_lesson(text: str) -> str:
    try:
        lesson = _lesson(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected FROM:TO:MOTIONS, for example {LESSONS[1]}") from None
    if not set(lesson.motions) <= set(MOTIONS) - {"still"}:
        raise argparse.ArgumentTypeError(f"{text} names other motions than {', '.join(MOTIONS)}, or still")
    return text


def record_run(args: argparse.Namespace) -> None:
    """Adds a line to ``runs.jsonl`` in the work folder: arguments, versions and device of one start."""
    args.work.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in vars(args).items() if name != "work"}
    machine = {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count()}
    line = {"arguments": arguments, "sora_jax": __version__, "jax": jax.__version__, **machine}
    with (args.work / "runs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``python -m sora_jax.pocket.train``; exits with one line where the arguments or the base are bad, or on Ctrl-C."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax reports every file
    try:
        train(args)
    except (ValueError, OSError) as error:
        sys.exit(_stopped(f"error: {describe(error)}", BAD_INPUT))
    except KeyboardInterrupt:
        sys.exit(_stopped("interrupted; the same command goes on from the last checkpoint.", INTERRUPTED))


def _stopped(why: str, code: int) -> int:
    sys.stderr.write(f"python -m sora_jax.pocket.train: {why}\n")
    return code


def train(args: argparse.Namespace) -> None:
    """Trains every stage that is not complete and writes the model directory."""
    base = {network: _stored(args.base, network) for network in ("vae", "t5")} if args.base else {}
    record_run(args)
    model = args.work / "model"
    model.mkdir(parents=True, exist_ok=True)
    write_tokenizer(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(model / "tokenizer.json")
    codec = base["vae"] if base else codec_stages(args)
    codec = with_decoders(args, codec) if args.decoder_steps else codec
    text = base["t5"] if base and not args.warm_text else text_encoder(args, tokenizer, base.get("t5"))
    save_network(model, "vae", pocket.vae, codec, dtype=args.dtype, overwrite=True)
    save_network(model, "t5", pocket.t5, text, dtype=args.dtype, overwrite=True)
    update_model_file(model, tokenizer="tokenizer.json", defaults=DEFAULTS)
    params = transformer(args, model, codec, text, tokenizer)
    save_network(model, "stdit3", pocket.stdit3, params, dtype=args.dtype, overwrite=True)


if __name__ == "__main__":
    main()
