"""Help, and every refusal that needs no network, come before JAX and tensorstore are imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sora_jax.commands.convert import VERBS
from sora_jax.commands.main import COMMANDS

HEAVY = ("jax", "tensorstore", "flax", "torch", "transformers", "diffusers")
# Runs one main after the other in a fresh process, and says after each which of the heavy packages it has imported.
SCRIPT = f"""
import contextlib, importlib, io, json, sys
seen = []
for module, arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(module).main(arguments)
    seen.append([code, out.getvalue(), err.getvalue(), [name for name in {HEAVY} if name in sys.modules]])
print(json.dumps(seen))
"""
MAIN = "sora_jax.commands.main"


def in_one_process(runs: list[tuple[str, list[str]]]) -> list[tuple[int, str, str, list[str]]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(runs)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_help_imports_nothing_heavy() -> None:
    runs = [(MAIN, ["--help"]), (MAIN, ["--version"])]
    runs += [(MAIN, [command, "--help"]) for command in COMMANDS]
    runs += [(MAIN, ["convert", verb, "--help"]) for verb in VERBS]
    mains = ("convert_weights.__main__", "sora_jax.pocket.train", "sora_jax.pocket.judge", "sora_jax.commands.options_table")
    runs += [(module, ["--help"]) for module in mains]
    for (module, arguments), (code, out, err, imported) in zip(runs, in_one_process(runs), strict=True):
        assert (code, err, imported) == (0, "", []), (module, arguments)
        assert out


PROMPT = "a red circle"
REFUSED = [
    (("generate",), "no prompt"),
    (("generate", "--bogus"), "unrecognized arguments: --bogus"),
    (("generate", PROMPT, "--steps", "0"), "--steps is 0"),
    (("generate", PROMPT, "--guidance", "nan"), "--guidance is nan"),
    (("generate", PROMPT, "--solver", "rk4"), "got 'rk4'; expected euler"),
    (("generate", PROMPT, "--attention", "fast"), "got 'fast'; expected auto, dense, chunked, cudnn or flash"),
    (("generate", PROMPT, "--height", "64"), "got height alone"),
    (("generate", PROMPT, "--height", "63", "--width", "64"), "height 63 is not a multiple of 16"),
    (("generate", PROMPT, "--leap", "99"), "leap index 99 is beyond the last of 4 steps"),
    (("generate", PROMPT, "--merge-steps", "99"), "merge_steps is 99 of 4 steps"),
    (("generate", PROMPT, "--merge-odd", "released"), "merge_steps is 0"),
    (("generate", PROMPT, "--loop", "2"), "expected num_frames above 17"),
    (("generate", PROMPT, "--num-frames", "1", "--fps", "24"), "but num_frames is 1, an image"),
    (("list", "words"), "got 'words'; expected presets"),
    (("compare", "a.mp4", "gone.mp4"), "a.mp4 does not exist"),
    (("generate", PROMPT, "-o", "clip.avi"), "unknown suffix .avi"),
    (("generate", PROMPT, "-o", "a.npz", "--save-latents", "a.npz"), "is also the file of the clip a.npz"),
    (("generate", PROMPT, "--memory-budget", "3.3"), "memory budget is '3.3'"),
    (("generate", PROMPT, "--plan", "gone.json"), "plan gone.json does not exist"),
    (("generate", "--from-latents", "gone.npz"), "latents file gone.npz does not exist"),
    (("generate", PROMPT, "--num-frames", "1000000", "--height", "32768", "--width", "32768"), "the decoded frames alone take"),
    (("calibrate", "-o", "a.json", "--evaluations", "99", "--prompt", "a"), "cannot have 99 evaluations"),
    (("calibrate", "-o", "a.json", "--evaluations", "2", "--prompt", "a", "--half-from", "99"), "half_from is 99"),
    (
        ("generate", PROMPT, "--condition-frame-edit", "0.5"),
        "condition_frame_edit says how clips of a loop go on, but loop is 1",
    ),
    (("calibrate", "-o", "a.json", "--evaluations", "2", "--prompt", "a", "--memory-budget", "-3GB"), "budget is '-3GB'"),
    (("export", "pocket", "out", "--target", "onnx", "--steps", "0"), "--steps is 0"),
    (("export", "pocket", "out", "--target", "onnx", "--size", "x"), "size 'x' is not frames x height x width"),
    (("run-exported", "gone", PROMPT, "--steps", "0"), "--steps is 0"),
    (("run-exported", "gone", PROMPT, "--guidance", "nan"), "--guidance is nan"),
    (("inspect", "gone.mp4"), "gone.mp4 does not exist"),
    (("inspect", "--gflops", "inf", "gone"), "--gflops is inf"),
    (("convert", "verify", "gone", "--section", "x"), "--section says how a source is read; give --source as well"),
    (("convert", "t5"), "the following arguments are required: SOURCE, MODEL_DIR"),
]


def test_refusals_that_need_no_network_import_nothing_heavy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        (MAIN, [*arguments, *(("--model", str(tiny_model)) if arguments[0] == "generate" else ())]) for arguments, _ in REFUSED
    ]
    runs = [(module, [*arguments, str(tiny_model)] if arguments[0] == "calibrate" else arguments) for module, arguments in runs]
    for (arguments, message), (code, out, err, imported) in zip(REFUSED, in_one_process(runs), strict=True):
        assert (code, out, imported) == (2, "", []), (arguments, err)
        assert err.count("\n") == 1
        assert message in err
    assert not list(tmp_path.iterdir())


def test_the_package_imports_neither_jax_nor_torch_before_it_is_used() -> None:
    script = (
        "import sys, sora_jax, sora_jax.commands.main, sora_jax.pipeline.video, sora_jax.commands.inspect;"
        "print([name for name in ('jax', 'torch', 'transformers', 'diffusers', 'av') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"
    script = "import sys, sora_jax; sora_jax.Pipeline; print([n for n in ('torch', 'diffusers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"
