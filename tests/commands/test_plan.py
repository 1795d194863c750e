"""``sora-jax plan``: exit codes, what it prints and what it refuses; an interpreter stands in for the compiler."""

import json
from pathlib import Path

import pytest

from sora_jax.commands import main, plan
from tests.support.compiler import COMPILED, REFUSED, stand_in

BEGINS = {"event": "begins", "program": "evaluation", "what": "one guided evaluation"}
ASKED = ("plan", "open-sora-1.2", "--target", "v5e:4x4", "--resolution", "480p", "--programs", "evaluation")


def test_what_fits_is_zero_and_says_that_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python, file = stand_in(tmp_path, [BEGINS, COMPILED]), tmp_path / "plan.json"
    assert main.main([*ASKED, "--python", str(python), "--json", str(file)]) == main.OK
    shown = capsys.readouterr()
    assert shown.err == "sora-jax: compiling for one TPU v5e of v5e:4x4: one guided evaluation\n"
    lines = shown.out.splitlines()
    assert lines[0] == "open-sora-1.2: 51 frames of 480 x 854, bfloat16, guided, 30 steps, attention auto"
    assert lines[1].startswith("compiled for one TPU v5e of v5e:4x4 (17.2 GB); compiled only: nothing was run there")
    rows = {line[2:14].strip(): line[15:] for line in lines if line.startswith("  ")}
    assert rows["fits"] == "yes"
    assert rows["memory"].startswith("arguments 2 GB, temporaries 3 GB, peak 4 GB (fast compilation: temporaries up to half")
    assert rows["operations"] == "197 TFLOP, one evaluation, all 28 pairs"
    assert rows["at best"].startswith("1 s, 30 times in a clip (estimate from the data sheet: computing 1 s, memory 0.5 s)")
    assert (rows["collectives"], rows["host"]) == ("56 all-to-all, 1 GB", "no transfers")
    assert "measured" not in shown.out.replace("no figure is a measurement", "")
    written = json.loads(file.read_text())
    assert (written["fits"], written["compiled_for"]) == (True, "one TPU v5e of v5e:4x4")
    assert written["clip"] == {
        "num_frames": 51,
        "height": 480,
        "width": 854,
        "num_steps": 30,
        "guided": True,
        "dtype": "bfloat16",
    }
    assert written["programs"][0]["peak_bytes"] == COMPILED["peak_bytes"]


def test_what_does_not_fit_is_three_with_the_compilers_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python, file = stand_in(tmp_path, [BEGINS, COMPILED, BEGINS, REFUSED]), tmp_path / "plan.json"
    assert main.main([*ASKED, "--quiet", "--python", str(python), "--json", str(file)]) == plan.DOES_NOT_FIT == 3
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "  fits         no: RESOURCE_EXHAUSTED: 48.57G exceeds 15.75G." in shown.out.splitlines()
    written = json.loads(file.read_text())
    assert (written["fits"], [program["fits"] for program in written["programs"]]) == (False, [True, False])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("open-sora-1.2",), "the following arguments are required: --target"),
        (("open-sora-1.2", "--target", "a100"), "target 'a100' is unknown; expected v5e, v6e, v5p, h100"),
        (("open-sora-1.2", "--target", "v5e:4"), "target 'v5e:4' has topology '4'; expected 2 numbers, as v5e:8x8."),
        (("open-sora-1.2", "--target", "v5e", "--height", "250", "--width", "256"), "height 250 is not a multiple of 16"),
        (("open-sora-1.2", "--target", "v5e", "--resolution", "256p"), "got '256p'; expected 144p"),
        (("open-sora-1.2", "--target", "v5e", "--attention", "sparse"), "got 'sparse'; expected auto, dense"),
        (("open-sora-1.2", "--target", "v5e", "--programs", "vae"), "programs hold 'vae'; expected some of text, evaluation"),
        (("open-sora-1.2", "--target", "v5e", "--dtype", "int8"), "got 'int8'; expected"),
        (
            ("open-sora-1.2", "--target", "v5e", "--mesh", "sequence=8"),
            "mesh 'sequence=8' has 8 devices, but v5e:2x2 has 4; expected axes whose product is 4",
        ),
        (("open-sora-1.2", "--target", "v5e", "--weights", "spread"), "weights=spread has no effect on one device"),
        (("open-sora-1.2", "--target", "v5e", "--mesh", "model=4"), "names the axis 'model'; expected data, guidance"),
        (
            ("open-sora-1.2", "--target", "v5e", "--python", "gone"),
            "interpreter gone cannot be run (No such file or directory)",
        ),
        (("open-sora-1.2", "--target", "v5e", "--json", "taken.json"), "taken.json exists; pass --overwrite"),
        (("nowhere", "--target", "v5e"), "nowhere has no t5 (it does not exist)"),
    ],
)
def test_bad_input_is_one_line_and_two(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken.json").write_text("{}")
    assert main.main(["plan", *arguments]) == main.BAD_INPUT
    shown = capsys.readouterr()
    assert (len(shown.err.splitlines()), shown.out) == (1, "")
    assert message in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_a_missing_compiler_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = {
        "event": "error",
        "kind": "MissingCompilerError",
        "input": True,
        "traceback": "",
        "message": "x has no libtpu: pip",
    }
    assert main.main([*ASKED, "--python", str(stand_in(tmp_path, [error], end="exit 1"))]) == main.BAD_INPUT
    assert capsys.readouterr().err == "sora-jax: error: x has no libtpu: pip\n"
