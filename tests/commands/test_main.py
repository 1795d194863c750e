import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_jax import files
from sora_jax.commands import generate as generate_command
from sora_jax.commands import main
from sora_jax.pipeline import clip_info, model_file
from sora_jax.storage.writer import update_model_file

pytestmark = pytest.mark.usefixtures("little_optimised")

PROMPT = "a red circle moves right on a blue background"
GREY = ("--reference-path", "grey.png", "--mask-strategy")

Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Returns a function that runs a command in this process: exit code, lines of standard error, standard output."""

    def run(*arguments: object) -> tuple[int, list[str], str]:
        try:
            code = main.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.err.replace("\r", "\n").strip().splitlines(), captured.out

    return run


@pytest.fixture
def generate(run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Returns a function that runs ``generate`` quietly with the tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def generate(*arguments: object) -> tuple[int, list[str], str]:
        return run("generate", "--model", tiny_model, "--compile-cache", "off", "--quiet", *arguments)

    return generate


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_prompt_becomes_a_file_that_knows_how_it_was_made(generate: Run, run: Run, tmp_path: Path) -> None:
    code, errors, output = generate(PROMPT, "-o", "clip.mp4", "--seed", 3)
    assert (code, errors, output) == (0, [], "clip.mp4\n")
    assert names(tmp_path) == ["clip.mp4", "clip.mp4.json"]
    code, _, output = run("inspect", "clip.mp4", "--json")
    shown = json.loads(output)
    assert code == 0
    assert (shown["media"]["frames"], shown["media"]["fps"]) == (17, 8.0)
    assert (shown["parameters"]["prompt"], shown["parameters"]["seed"]) == (PROMPT, 3)
    assert "  seed: 3" in run("inspect", "clip.mp4")[2].splitlines()


@pytest.mark.ci
def test_a_prompt_beyond_the_embedded_model_gets_a_hint_and_a_clip(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "POCKET", tiny_model)
    for prompt, num_hints in (("ein Hund läuft, \N{DOG FACE}!", 1), (PROMPT, 0)):
        path = tmp_path / f"{num_hints}.png"
        code, notes, _ = run("generate", prompt, "-o", path, "--num-frames", 1, "--steps", 1, "--compile-cache", "off")
        assert (code, path.exists()) == (0, True)
        assert len([line for line in notes if "does not know ein, hund, läuft" in line]) == num_hints


@pytest.mark.slow
def test_a_request_beyond_the_training_gets_one_line_and_a_clip(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    trained = {"sizes": [[32, 48]], "num_frames": [1, 17], "fps": [8], "guidance": [1, 3]}
    update_model_file(model, trained=trained)
    asked = ("generate", PROMPT, "--model", model, "--num-frames", 1, "--steps", 1, "--compile-cache", "off")
    for number, (more, lines) in enumerate([((), 0), (("--guidance", 7, "--height", 64, "--width", 64), 1)]):
        code, notes, _ = run(*asked, *more, "-o", tmp_path / f"{number}.png")
        assert (code, (tmp_path / f"{number}.png").exists()) == (0, True)
        beyond = [line for line in notes if "64 x 64 pixels and guidance 7 lie outside what this model was made for" in line]
        assert len(beyond) == lines


def test_an_empty_prompt_is_a_prompt_without_a_hint(generate: Run) -> None:
    assert generate("", "-o", "nothing.png", "--num-frames", 1, "--steps", 1) == (0, [], "nothing.png\n")


@pytest.mark.slow
def test_equal_prompts_named_by_themselves_are_made_once(generate: Run) -> None:
    arguments = ("a", "a", "--prompt-as-path", "--num-frames", 1, "--steps", 1)
    assert generate(*arguments) == (0, [], "a.png\n")
    assert generate(*arguments) == (0, [], "")


def test_the_same_command_makes_the_same_bytes(generate: Run, tmp_path: Path) -> None:
    generate(PROMPT, "-o", "a.mp4")
    generate(PROMPT, "-o", "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_prompt_file_makes_numbered_clips_with_the_seeds_of_their_lines(generate: Run, tmp_path: Path) -> None:
    Path("prompts.txt").write_text(f"unused\n{PROMPT}\na green square\nunused\n")
    code, errors, output = generate(
        *("--prompt-path", "prompts.txt", "--start-index", 1, "--end-index", 3, "--num-sample", 2, "--batch-size", 3),
        *("--save-dir", "out", "--sample-name", "test", "--format", "npz", "--seed", 10),
    )
    assert (code, errors) == (0, [])
    made = ["test_0001-0.npz", "test_0001-1.npz", "test_0002-0.npz", "test_0002-1.npz"]
    assert output.split() == [f"out/{name}" for name in made]
    assert [clip_info.inspect(tmp_path / "out" / name).parameters["seed"] for name in made] == [12, 13, 14, 15]
    assert generate(PROMPT, "--seed", 12, "-o", "alone.npz")[0] == 0
    with np.load("alone.npz") as alone, np.load("out/test_0001-0.npz") as batched:
        # Alone and in a batch of 3: latents agree to 1e-5, pixels to rounding.
        assert np.abs(alone["frames"].astype(int) - batched["frames"]).max() <= 1


def test_a_batch_named_by_its_prompts_resumes(generate: Run, tmp_path: Path) -> None:
    arguments = ("--prompt-as-path", "--save-dir", "out", "--format", "npz", "one red circle", "two / squares", "three")
    assert generate(*arguments)[0] == 0
    first = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert [name for name in first if name.endswith(".npz")] == ["one red circle.npz", "three.npz", "two _ squares.npz"]
    (tmp_path / "out" / "two _ squares.npz").unlink()
    (tmp_path / "out" / "two _ squares.npz.json").unlink()
    code, _, output = generate(*arguments)
    assert (code, output) == (0, "out/two _ squares.npz\n")
    assert clip_info.inspect(tmp_path / "out" / "two _ squares.npz").parameters["seed"] == 1
    assert names(tmp_path / "out") == sorted(first)


@pytest.mark.ci
def test_a_size_by_name_says_what_comes_out(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Height comes first in an aspect ratio, which surprises; rows and columns of the table are the same size."""
    monkeypatch.chdir(tmp_path)
    asked = ("generate", PROMPT, "--model", tiny_model, "--num-frames", 1, "--steps", 1, "--compile-cache", "off")
    code, notes, _ = run(*asked, "--resolution", "144p", "--aspect-ratio", "9:16", "-o", "named.npz")
    assert code == 0
    assert "sora-jax: clips have 144 rows and 256 columns of pixels (aspect ratios are height:width)." in notes
    with np.load("named.npz") as named:
        assert named["frames"].shape == (1, 144, 256, 3)


def test_a_prompt_without_quotes_is_told(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    asked = ("generate", "--model", tiny_model, "--dry-run", "--save-dir", tmp_path)
    told = "sora-jax: 3 prompts of one word each; put a prompt of several words in quotes."
    assert told in run(*asked, "a", "red", "circle")[1]
    assert not any("quotes" in note for note in run(*asked, "a", "red circle")[1])


def test_two_runs_that_would_write_one_file_do_not_both_sample(generate: Run, tmp_path: Path) -> None:
    with files.claimed(Path("clip.npz")):
        code, errors, _ = generate(PROMPT, "-o", "clip.npz")
    assert (code, len(errors)) == (2, 1)
    assert "another process is writing clip.npz; wait for it to end, or choose another name." in errors[0]
    assert not names(tmp_path)


def test_numbered_names_never_replace_a_clip(generate: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert generate(PROMPT, "--num-frames", 1, "--steps", 1)[0] == 0
    assert names(tmp_path) == ["sample_0000.png", "sample_0000.png.json", "sample_0000_2.png", "sample_0000_2.png.json"]


def test_latents_are_decoded_later_to_the_same_clip(generate: Run, tmp_path: Path) -> None:
    assert generate(PROMPT, "-o", "clip.npz", "--save-latents", "latents.npz")[0] == 0
    assert generate("--from-latents", "latents.npz", "-o", "again.npz") == (0, [], "again.npz\n")
    with np.load("clip.npz") as clip, np.load("again.npz") as again:
        np.testing.assert_array_equal(again["frames"], clip["frames"])


@pytest.mark.slow
def test_clips_of_one_prompt_are_not_decoded_into_one_file(generate: Run, tmp_path: Path) -> None:
    assert generate(PROMPT, "--num-sample", 2, "--batch-size", 2, "--steps", 1, "--save-latents", "latents.npz")[0] == 0
    before = names(tmp_path)
    code, errors, _ = generate("--from-latents", "latents.npz", "--prompt-as-path", "--overwrite")
    assert (code, len(errors)) == (2, 1)
    assert "latents.npz holds several clips of one prompt; leave --prompt-as-path out." in errors[0]
    assert names(tmp_path) == before


def test_frames_as_a_folder_of_pngs(generate: Run, tmp_path: Path) -> None:
    assert generate(PROMPT, "--format", "png", "--sample-name", "frames")[0] == 0
    assert names(tmp_path) == ["frames_0000", "frames_0000.json"]
    assert names(tmp_path / "frames_0000") == [f"{i:04d}.png" for i in range(17)]


@pytest.mark.ci
def test_an_image_to_video_clip_from_the_command_line(generate: Run, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 30, 30)).save("red.png")
    assert generate(PROMPT, "--reference-path", "red.png", "--mask-strategy", "0", "-o", "clip.npz")[0] == 0
    parameters = clip_info.inspect(tmp_path / "clip.npz").parameters
    assert (parameters["references"], parameters["mask_strategy"]) == ("red.png", "0")


def test_overwrite_replaces(generate: Run) -> None:
    for seed in (1, 2):
        assert generate(PROMPT, "-o", "clip.npz", "--seed", seed, "--overwrite")[0] == 0
    assert clip_info.inspect("clip.npz").parameters["seed"] == 2


def test_progress_names_step_time_and_remaining_time(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "clip.npz"
    code, errors, _ = run("generate", PROMPT, "--model", tiny_model, "-o", output, "--compile-cache", "off")
    assert code == 0
    assert any("4/4" in line and "<" in line for line in errors)
    assert errors[-1].startswith("sora-jax: ")
    assert all(stage in errors[-1] for stage in ("load", "compile", "text", "denoise", "decode", "write"))


@pytest.mark.slow
def test_the_compile_cache_is_filled_and_can_be_off(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # where the tests keep theirs
    command = [sys.executable, "-m", "sora_jax", "generate", PROMPT, "--model", tiny_model, "--steps", "1", "--quiet"]
    subprocess.run([*command, "-o", tmp_path / "a.npz"], env=environment, check=True)
    assert any((tmp_path / "xdg" / "sora_jax" / "compiled").iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "no prompt; give a prompt in quotes, or --prompt-path FILE"),
        (("", "--prompt-as-path"), 2, "--prompt-as-path names clips by their prompts, of which one is empty"),
        ((PROMPT, "--prompt-path", "prompts.txt"), 2, "got prompts and --prompt-path"),
        (("--prompt-path", "gone.txt"), 2, "gone.txt: No such file or directory"),
        (("--prompt-path", "empty.txt"), 2, "no prompt in empty.txt"),
        (("--prompt-path", "binary.txt"), 2, "binary.txt is not a text file in UTF-8"),
        (("--prompt-path", "blank.txt"), 2, "prompt 1 of blank.txt is empty"),
        (("--prompt-path", "blank.txt", "--start-index", -1), 2, "--start-index is -1; expected a whole number from 0"),
        (
            (PROMPT, "--height", 250, "--width", 256),
            2,
            "height 250 is not a multiple of 16 (VAE 8 x patch 2); nearest valid: 240, 256.",
        ),
        ((PROMPT, "--height", "tall"), 2, "argument --height: got 'tall'; expected a whole number from 1 to 32768"),
        ((PROMPT, "--steps", -3), 2, "--steps is -3; expected a whole number from 1 to 100000."),
        (
            (PROMPT, "--resolution", "240p", "--aspect-ratio", "5:7"),
            2,
            "argument --aspect-ratio: got '5:7'; expected height:width, one of 3:8, ",
        ),
        ((PROMPT, "--num-frames", "2.5s"), 2, "argument --num-frames: got '2.5s'; expected a whole number from 1 to 1000000"),
        ((PROMPT, "--leap", "soon"), 2, "argument --leap: got 'soon'; expected off, dynamic, released"),
        ((PROMPT, "--seed", -1), 2, "--seed is -1; expected a whole number from 0"),
        ((PROMPT, "--fps", "nan"), 2, "--fps is nan; expected a positive number of frames per second"),
        ((PROMPT, "--aes", "good"), 2, "argument --aes: got 'good'; expected a number from 0 to 1000, or off"),
        ((PROMPT, "--aes", "1e30"), 2, "--aes is 1e+30; expected a number from 0 to 1000, or off."),
        ((PROMPT, "--align", "5.5"), 2, "argument --align: got '5.5'; expected a whole number from 1 to 1000000, or off"),
        ((PROMPT, "--no-such-option"), 2, "unrecognized arguments: --no-such-option"),
        ((PROMPT, "--reference", "a.png"), 2, "unrecognized arguments: --reference a.png; did you mean --reference-path?"),
        ((PROMPT, "--guidence", "3"), 2, "unrecognized arguments: --guidence 3; did you mean --guidance"),
        (
            (PROMPT, "--model", "nowhere"),
            2,
            "convert t5 SOURCE nowhere, or use the embedded model: pocket",
        ),
        ((PROMPT, "--model", "damaged"), 2, "damaged/t5/network.json is damaged: it is not JSON"),
        ((PROMPT, "--reference-path", "gone.png"), 2, "Reference gone.png does not exist"),
        ((PROMPT, "--reference-path", "broken.png"), 2, "Reference broken.png is not a readable image"),
        ((PROMPT, "--reference-path", "broken.mp4"), 2, "Reference broken.mp4 is not a readable video"),
        ((PROMPT, "--reference-path", "prompts.txt"), 2, "Reference prompts.txt has suffix '.txt'"),
        ((PROMPT, "--reference-path", "a.png", "--reference-path", "b.png"), 2, "--reference-path got 2 texts for 1 prompt;"),
        ((PROMPT, "--reference-path", "http://x/a.png"), 2, "http://x/a.png is an address on the network; download it"),
        ((PROMPT, "--reference-path", "grey.png;"), 2, "a reference path is empty; expected paths with one ';' between them"),
        ((PROMPT, "--mask-strategy", "0"), 2, "mask strategy '0' names reference 0; the prompt has 0"),
        ((PROMPT, "--mask-strategy", "0,0,0,0,1,0,0"), 2, "has 7 fields; expected at most 6"),
        ((PROMPT, *GREY, "9"), 2, "mask strategy '9' has an entry for clip 9 of 1"),
        ((PROMPT, *GREY, "0,0,0,0,0"), 2, "has an entry of 0 latent frames, which changes nothing"),
        ((PROMPT, *GREY, "0,0,0,99"), 2, "starts at latent frame 99 of a clip of 5"),
        ((PROMPT, *GREY, "0,0,99"), 2, "starts at latent frame 99 of a reference of 1"),
        ((PROMPT, *GREY, "0,0,0,0,6"), 2, "the clip has 5 and the reference 1; expected at most 5."),
        ((PROMPT, "-o", "clip.avi"), 2, "unknown suffix .avi; expected .mp4, .gif, .png, .npz"),
        ((PROMPT, "-o", "clip.png"), 2, "do not fit one PNG"),
        ((PROMPT, "-o", "taken.mp4"), 2, "taken.mp4 exists; pass --overwrite (overwrite=True) or choose another name."),
        ((PROMPT, "-o", "."), 2, ". is a folder; name a file"),
        ((PROMPT, "-o", "-"), 2, "--output - is no file, and standard output holds paths only"),
        (
            (PROMPT, "-o", "clip.npz", "--save-dir", "new"),
            2,
            "--save-dir names numbered clips, but --output names the one",
        ),
        ((PROMPT, "-o", "clip.npz", "--sample-name", "a"), 2, "--sample-name names numbered clips, but --output names the one"),
        ((PROMPT, "-o", "clip.npz", "--format", "gif"), 2, "--format gif contradicts the suffix of --output clip.npz"),
        ((PROMPT, "-o", "clip.npz", "--save-latents", "./clip.npz"), 2, "is also the file of the clip clip.npz"),
        ((PROMPT, "--format", "npz", "--save-latents", "sample_0000.npz"), 2, "is also the file of the clip sample_0000.npz"),
        ((PROMPT, "-o", "clip.npz", "again"), 2, "--output names one file, but 2 clips are asked for"),
        ((PROMPT, "--end-index", 3), 2, "--end-index selects lines of a prompt file"),
        ((PROMPT, "--memory-budget", "-3GB"), 2, "memory budget is '-3GB'; expected a size such as 3.3GB"),
        ((PROMPT, "--memory-budget", "3.3"), 2, "memory budget is '3.3'; expected a size such as 3.3GB"),
        ((PROMPT, "--shift", "1e9"), 2, "shift 1e+09 with 4 steps: times of neighbouring steps are equal in float32"),
        ((PROMPT, "--merge-odd", "released"), 2, "merge says what merged steps merge, but merge_steps is 0"),
        ((PROMPT, "--merge-steps", 99), 2, "merge_steps is 99 of 4 steps; expected 0 to 4 (all)."),
        ((PROMPT, "--loop", 2), 2, "but a clip has 17; expected num_frames above 17."),
        (("|0| a |99| b",), 2, "has a segment from clip 99 on, but loop is 1; set loop to at least 100"),
        (("|1| a",), 2, "begins with segments, but not with |0|"),
        ((PROMPT, "-o", "keep", "--overwrite"), 2, "keep is a folder, not a clip of PNG frames (it holds letter.txt)"),
        ((PROMPT, PROMPT, "-o", "clip.mp4"), 2, "--output names one file, but 2 clips are asked for; use --save-dir."),
        ((PROMPT, "-o", "prompts.txt/clip.mp4"), 2, "cannot write into folder prompts.txt"),
        ((PROMPT, "-o", "/proc/clip.mp4"), 2, "cannot write into folder /proc"),
        ((PROMPT, "--save-latents", "latents.txt"), 2, "has suffix '.txt'; expected .npz"),
        ((PROMPT, "--from-latents", "latents.npz"), 2, "it does not go with prompts"),
        (("--from-latents", "latents.npz", "--save-fps", 12, "--seed", 1), 2, "it does not go with --seed and --save-fps"),
        ((PROMPT, "a red circle", "--mask-strategy", "", "--mask-strategy", "0"), 2, "mask strategy '0' names reference 0"),
        ((PROMPT, 'b {"mask'), 2, "JSON is malformed"),
        (("--from-latents", "gone.npz"), 2, "latents file gone.npz does not exist"),
        (("--from-latents", "broken.png"), 2, "broken.png is not a latents file"),
        ((PROMPT, "--compile-cache", "prompts.txt"), 2, "cannot write into folder prompts.txt"),
        ((PROMPT, "--num-sample", 0), 2, "--num-sample is 0; expected a whole number from 1"),
        ((PROMPT, "--batch-size", 0), 2, "--batch-size is 0; expected a whole number from 1"),
        (("a red circle \udcff",), 2, "prompt 0 is not text in UTF-8: 'a red circle \\udcff'."),
        ((PROMPT, "-o", "clip\udcff.mp4"), 2, "'clip\\udcff.mp4' is no name in UTF-8; choose another one."),
        ((PROMPT, "--num-sample", 10**9), 2, "1000000000 clips are asked for; expected at most 100000"),
        ((PROMPT, "--sample-name", "a/b"), 2, "--sample-name 'a/b' holds '/'; name the folder with --save-dir"),
        ((PROMPT, "--steps", 10**20), 2, "--steps is 100000000000000000000; expected a whole number from 1 to 100000."),
        ((PROMPT, "--num-frames", 10**12), 2, "--num-frames is 1000000000000; expected a whole number from 1 to 1000000"),
        ((PROMPT, "--height", 2**15, "--width", 2**15, "--num-frames", 10**6), 2, "the decoded frames alone take 1.29e+07 GB"),
        (
            (PROMPT, "--save-fps", "1e-9"),
            2,
            "--save-fps is 1e-09; expected a positive number of frames per second, 0.01 to 1000.",
        ),
        ((PROMPT, "--leap", 99, "--save-dir", "new"), 2, "leap index 99 is beyond the last"),
        (("|0| a |2| b |1| c",), 2, "has a segment from clip 2 on, but loop is 1"),
        ((PROMPT, "--plan", "keep"), 2, "plan keep is a folder; make one with"),
        ((PROMPT, "--save-latents", "keep.npz", "--overwrite"), 2, "keep.npz is a folder; choose another name or remove it."),
        ((PROMPT, "--profile-streaming", "keep", "--memory-budget", "8GB", "--overwrite"), 2, "keep is a folder"),
        ((PROMPT, "--model", "prompts.txt"), 2, "prompts.txt has no t5 (it is a file); add it with"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(
    generate: Run, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    for name, content in (
        ("prompts.txt", b"a\n"),
        ("empty.txt", b""),
        ("binary.txt", b"\xff\xfe\x00"),
        ("blank.txt", b"a\n\nb\n"),
    ):
        Path(name).write_bytes(content)
    for name in ("broken.png", "broken.mp4", "taken.mp4"):
        Path(name).write_bytes(b"broken")
    files = ("keep/letter.txt", "keep.npz/letter.txt", "damaged/t5/network.json", "damaged/vae/network.json")
    for path in map(Path, files):
        path.parent.mkdir(parents=True)
        path.write_text("{")
    Image.new("RGB", (40, 40)).save("grey.png")
    before = sorted(tmp_path.rglob("*"))
    exit_code, errors, output = generate(*arguments)
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert errors[0].startswith("sora-jax: error: ")
    assert (exit_code, output) == (code, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_gets_one_line_and_leaves_nothing(generate: Run, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        code, errors, _ = generate(PROMPT, "-o", "clip.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert code == 1
    assert errors == ["sora-jax: error: cannot write clip.npz: File too large"]
    assert not names(tmp_path)


def test_a_failure_that_nobody_foresaw_is_one_line_too(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("several\nlines\n  of text")

    monkeypatch.setattr(generate_command, "run", fail)
    code, errors, _ = generate(PROMPT)
    assert code == 1
    assert errors == ["sora-jax: error: RuntimeError: several lines of text; --debug shows where"]
    code, errors, _ = generate(PROMPT, "--debug")
    assert (code, errors[0]) == (1, "Traceback (most recent call last):")
    assert errors[-1] == "sora-jax: error: RuntimeError: several lines of text; --debug shows where"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_time_ends_with_one_line_and_no_file(
    tiny_model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """While sampling: enough steps to outlast the test."""
    # A job in the background ignores Ctrl-C; the first lines undo that.
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from sora_jax.commands.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "generate", PROMPT, "--model", tiny_model, "--compile-cache", "off"]
    process = subprocess.Popen(
        [*command, "--steps", "20000", "-o", tmp_path / "clip.mp4", "--save-latents", tmp_path / "latents.npz"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        seen = ""
        while "denoise" not in seen:
            read = process.stderr.read(1) if process.stderr else ""
            assert read, seen
            seen += read
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)  # on a busy machine; nothing is waited for
    finally:
        process.kill()
    assert process.returncode == code
    assert rest.strip().splitlines()[-1] == "sora-jax: error: interrupted"
    assert "Traceback" not in seen + rest
    assert not names(tmp_path)
