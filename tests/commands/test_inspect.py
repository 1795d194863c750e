"""What ``sora-jax inspect`` shows of model directories, and says of what it cannot read."""

import json
import shutil
from pathlib import Path

import pytest

from sora_jax.commands import main


def test_a_model_directory_is_shown(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", str(tiny_model), "--json"]) == main.OK
    shown = json.loads(capsys.readouterr().out)
    assert shown["networks"]["stdit3"]["state"] == "complete"
    assert shown["networks"]["stdit3"]["layers"] == 4
    assert shown["defaults"]["num_frames"] == 17
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.rmtree(model / "t5")
    next(path for path in (model / "vae").rglob("c/*") if path.is_file()).unlink()
    assert main.main(["inspect", str(model), "--json"]) == main.OK
    shown = json.loads(capsys.readouterr().out)
    assert shown["networks"]["t5"].startswith("missing; add it with: sora-jax convert t5")
    assert shown["networks"]["vae"]["state"].startswith("damaged: 1 parameter files are missing")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gone.mp4", "gone.mp4 does not exist."),
        (".", ". holds neither a model (t5, stdit3, vae) nor PNG frames."),
        ("text.txt", "text.txt: unknown suffix .txt; expected .mp4"),
        ("broken.mp4", "broken.mp4 is not a readable mp4 file"),
        ("broken.npz", "broken.npz is not a readable npz file: it is no zip archive, or cut short"),
        ("listed", "listed/model.json: defaults is [1]; expected an object of settings."),
        ("numbered", "numbered/model.json: tokenizer is 5; expected the name of a file."),
    ],
)
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("words")
    for name in ("broken.mp4", "broken.npz"):
        Path(name).write_bytes(b"broken")
    for name, fields in (("listed", {"defaults": [1]}), ("numbered", {"tokenizer": 5})):
        Path(name).mkdir()
        Path(name, "model.json").write_text(json.dumps({"format_version": 1, **fields}))
    assert main.main(["inspect", target]) == main.BAD_INPUT
    captured = capsys.readouterr()
    errors, output = captured.err.splitlines(), captured.out
    assert (len(errors), output) == (1, "")
    assert message in errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gflops", "inf"), "--gflops is inf; expected a positive number."),
        (("--bandwidth", "0"), "bandwidth is '0'; expected bytes a second, such as 1.6GB."),
        (("--bandwidth", "auto"), "bandwidth is 'auto'; expected bytes a second, such as 1.6GB."),
        (("--batch-size", "0"), "--batch-size is 0; expected a whole number from 1 to 1000000."),
        (("--height", "63", "--width", "64"), "height 63 is not a multiple of 16 (VAE 8 x patch 2); nearest valid: 48, 64."),
        (("--solver", "ab2"), "unrecognized arguments: --solver ab2 (see sora-jax inspect --help)"),
    ],
)
def test_a_memory_plan_refuses_what_generation_would(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main.main(["inspect", str(tiny_model), *options]) == main.BAD_INPUT
    assert capsys.readouterr().err == f"sora-jax: error: {message}\n"
