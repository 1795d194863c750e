"""Runs one mutated checkpoint through the converter's command and judges what became of it."""

import dataclasses
from pathlib import Path

import numpy as np

from convert_weights.encodings import has_gguf
from tests.adversarial import bases, gguf_files, orbax_files, pickles, torch_files, weight_files
from tests.adversarial.command import Run, run_command
from tests.adversarial.verdicts import MUTATION, Verdict
from tests.adversarial.weight_files import Mutation

SEED = 20261115


@dataclasses.dataclass(frozen=True)
class Kind:
    """A mutation with what it is applied to."""

    network: str
    layout: str
    mutation: Mutation

    @property
    def hides(self) -> bool:
        """Whether its result may hold other values that only the source betrays."""
        return self.mutation in weight_files.HIDING | torch_files.HIDING | pickles.HIDING | gguf_files.HIDING

    @property
    def name(self) -> str:
        """A name for reports."""
        return f"{self.network} {self.layout} {self.mutation.__name__}"


def _kinds() -> list[Kind]:
    kinds = [Kind("t5", "safetensors", mutation) for mutation in weight_files.SAFETENSORS]
    kinds += [Kind("t5", "torch", mutation) for mutation in (*torch_files.ARCHIVES, *pickles.PICKLES)]
    kinds += [Kind("t5", "shards", mutation) for mutation in weight_files.SHARDS]
    kinds += [Kind("t5", "torch shards", pickles.torch_shards)]
    kinds += [Kind(network, "safetensors", m) for network in ("t5", "stdit3", "vae") for m in weight_files.CONFIGURATIONS]
    kinds += [Kind("t5", "safetensors", weight_files.companions)]
    kinds += [Kind("stdit3", "safetensors", m) for m in (weight_files.header_values, weight_files.transposed_square)]
    kinds += [Kind("t5", "adapter", mutation) for mutation in weight_files.ADAPTERS]
    kinds += [Kind("t5", "orbax", mutation) for mutation in orbax_files.ORBAX]
    kinds += [Kind("t5", "float8", mutation) for mutation in (*weight_files.ANY_DTYPE, gguf_files.lost_scale)]
    if has_gguf():
        kinds += [Kind("t5", "gguf", mutation) for mutation in gguf_files.GGUF]
    return kinds


KINDS = _kinds()


def make(number: int, folder: Path) -> str:
    """Writes the honest source and the mutant of this number, and returns what was done to it."""
    kind = KINDS[number % len(KINDS)]
    bases.base(kind.network, kind.layout).write(folder / "original", kind.layout)
    mutant = bases.base(kind.network, kind.layout).write(folder / "mutant", kind.layout)
    return f"{kind.name}: {kind.mutation(mutant, np.random.default_rng([SEED, number]))}"


def run(number: int, folder: Path) -> tuple[str, Verdict, str]:
    """Returns what was done to the mutant of this number, its verdict, and what was seen."""
    kind, done = KINDS[number % len(KINDS)], make(number, folder)
    (folder / MUTATION).write_text(done)
    source, original, mutant = bases.base(kind.network, kind.layout), folder / "original", folder / "mutant"
    model = folder / "model"
    if kind.layout == "orbax":
        ran = run_command(["convert", "from-orbax", str(mutant), str(model)])
        return done, *_judge(ran, kind, source, [], model, folder)
    arguments = [str(original)]
    if kind.layout == "adapter":
        arguments = [str(source.write(folder / "source", "safetensors")), *_lora(original)]
    changed = [argument.replace(str(original), str(mutant)) for argument in arguments]
    ran = run_command(["convert", kind.network, changed[0], str(model), "--quiet", *changed[1:]])
    return done, *_judge(ran, kind, source, arguments, model, folder)


def _lora(folder: Path) -> list[str]:
    return ["--lora", f"{folder / 'model.safetensors'}:{bases.SCALE}"]


def _judge(ran: Run, kind: Kind, source: bases.Base, honest: list[str], model: Path, folder: Path) -> tuple[Verdict, str]:
    if ran.verdict is not None:
        return ran.verdict, ran.detail
    if ran.code:
        left = sorted(str(path.relative_to(folder)) for path in model.rglob("*")) if model.exists() else []
        if left or not ran.is_clean_refusal(str(folder)):
            return Verdict.UNCLEAN, f"exit {ran.code}, left {left[:3]}, said {ran.err!r:.300}"
        return Verdict.REFUSED, ran.err.splitlines()[0][:200]
    other = bases.differing(model, source)
    if kind.mutation is weight_files.companions and (model / "tokenizer.json").read_bytes() != bases.TOKENIZER:
        other.append("the tokenizer")
    if not other:
        return Verdict.EQUAL, ""
    if not honest:
        return Verdict.OTHER, f"{other[:3]}"
    verified = run_command(["convert", "verify", str(model), "--source", *honest])
    if kind.hides and verified.code == 1 and verified.verdict is None and "Traceback" not in verified.err:
        return Verdict.BETRAYED, f"{other[:2]}"
    return Verdict.OTHER, f"{other[:3]}; verify gave {verified.code}: {verified.err!r:.200}"
