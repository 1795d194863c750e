"""What the page makes, refuses and shows, without Gradio; test_page_http.py and test_page_browser.py have the rest."""

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest

from sora_jax.commands import main
from sora_jax.commands.web import form, gallery, timeline
from sora_jax.commands.web.comparing import compare
from sora_jax.commands.web.gallery import Galleries, Gallery
from sora_jax.commands.web.server import Guard
from sora_jax.commands.web.studio import Step, Studio
from sora_jax.pipeline.clip_frames import read_frames
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.pipeline.presets import FINER
from sora_jax.pipeline.preview import PreviewMap, chunk_of, shape_of
from sora_jax.streaming.profile import Interval

pytestmark = pytest.mark.usefixtures("little_optimised")
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def studio(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    studio = Studio(Pipeline.from_pretrained(tiny_model), tmp_path_factory.mktemp("clips"))
    vae = studio.pipeline.model.manifests["vae"]
    weights = np.random.default_rng(0).normal(size=shape_of(vae.config)).astype(np.float32)
    studio.pipeline._previews._map = PreviewMap(weights=weights, chunk=chunk_of(vae.config))  # a fit would take seconds
    return studio


@pytest.fixture
def visitor(studio: Studio) -> Gallery:
    return studio.galleries.of(None)


def request(**fields: str) -> form.Request:
    return form.read(prompt=PROMPT, size=None, fields=fields)


@pytest.mark.ci
def test_a_clip_of_the_page_is_the_clip_of_the_command_line(
    studio: Studio, visitor: Gallery, tiny_model: Path, tmp_path: Path
) -> None:
    steps = list(studio.make(request(seed="7", num_steps="2"), visitor))
    made = steps[-1].made
    assert steps[-1].text.startswith("done: 17 frames of 32 x 48, 2 evaluations")
    command = ["generate", PROMPT, "--model", str(tiny_model), "--seed", "7", "--steps", "2", "-o", str(tmp_path / "a.mp4")]
    assert main.main([*command, "--quiet", "--compile-cache", "off"]) == main.OK
    assert made.path.read_bytes() == (tmp_path / "a.mp4").read_bytes()
    assert visitor.find(made.number) is made
    served = visitor.place(made.path)
    assert served.read_bytes() == made.path.read_bytes()
    assert visitor.place(made.path) == served


def test_visitors_are_kept_apart(studio: Studio) -> None:
    """Each has clips of their own, under names that the others cannot guess, and ends no computation but their own."""
    mine, others = studio.galleries.of("m" * 32), studio.galleries.of("o" * 32)
    *_, last = studio.make(form.read(prompt="a red hund", size=None, fields={"num_steps": "1"}), mine)
    assert "the model does not know hund." in last.text  # as generate notes it
    assert (len(mine.titles()), len(others.titles())) == (1, 0)
    assert (mine.find(last.made.number), others.find(last.made.number)) == (last.made, None)
    assert mine.place(last.made.path).parent != others.served
    assert gallery.is_secret(mine.served.name)
    assert studio.galleries.of("m" * 32) is mine
    assert all(studio.galleries.of(strange) is not mine for strange in (None, "", "../" * 12, "short"))
    steps = studio.make(request(num_steps="30"), mine)
    assert next(steps).made is None
    assert not studio.cancel(others)
    assert studio.cancel(mine)
    *_, last = steps
    assert last.text == "cancelled; nothing was written."


def test_the_page_forgets_the_oldest_visitor_and_the_files_served_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "MAX_VISITORS", 2)
    galleries = Galleries(tmp_path / "served")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    secrets = [letter * 32 for letter in "abc"]
    served = [galleries.of(secret).place(tmp_path / "clip.mp4") for secret in secrets[:2]]
    galleries.of(secrets[0])  # used last
    galleries.of(secrets[2])
    assert [path.exists() for path in served] == [True, False]
    assert (tmp_path / "clip.mp4").exists()


def test_steps_show_progress_and_a_picture(studio: Studio, visitor: Gallery) -> None:
    seen: list[Step] = []
    studio.clip_of(request(num_steps="3"), seen.append, visitor)
    sampled = [step for step in seen if step.stage == "denoise"]
    assert [step.step for step in sampled] == [0, 1, 2, 3]
    assert [step.num_steps for step in sampled] == [3] * 4
    pictures = [step.picture for step in sampled[1:]]
    assert all(picture.dtype == np.uint8 and picture.shape[2] == 3 for picture in pictures)
    assert any(not np.array_equal(one, other) for one, other in itertools.pairwise(pictures))


def test_cancelling_ends_at_the_next_step_and_writes_nothing(studio: Studio, visitor: Gallery) -> None:
    before = sorted(studio.folder.iterdir())
    assert not studio.cancel(visitor)  # nothing runs
    steps = []
    for step in studio.make(request(num_steps="40"), visitor):
        steps.append(step)
        studio.cancel(visitor)
    assert steps[-1].text == "cancelled; nothing was written."
    assert sorted(studio.folder.iterdir()) == before
    assert list(studio.make(request(num_steps="1"), visitor))[-1].made is not None  # the next one is not


def test_two_ways_of_sampling_are_compared_on_the_same_noise(studio: Studio, visitor: Gallery) -> None:
    two, three = request(num_steps="2"), request(num_steps="3")
    found = list(studio.steps(lambda watch: compare(studio, visitor, two, three, watch, finer=False), visitor))
    result = found[-1].made
    first, second = (read_frames(one.path) for one in (result.first, result.second))
    assert read_frames(result.difference).shape == first.shape == second.shape
    assert [row[:2] for row in result.rows] == [["A", "2"], ["B", "3"]]
    assert [(row["clip"], row["step"], row["kind"]) for row in result.traces] == [
        *(("A", step, "fresh") for step in (1, 2)),
        *(("B", step, "fresh") for step in (1, 2, 3)),
    ]


def test_two_ways_are_compared_with_a_finer_solution(studio: Studio, visitor: Gallery) -> None:
    finest, two = request(**{name: str(value) for name, value in FINER.items()}), request(num_steps="2")
    result = list(studio.steps(lambda watch: compare(studio, visitor, finest, two, watch, finer=True), visitor))[-1].made
    (first, second) = result.rows
    assert (first[1], first[4]) == ("119", "equal")
    assert second[3] == second[4] != "equal"


@pytest.mark.ci
def test_a_streamed_clip_leaves_a_timeline(tiny_model: Path, tmp_path: Path) -> None:
    studio = Studio(Pipeline.from_pretrained(tiny_model, memory_budget="800MB"), tmp_path)
    visitor = studio.galleries.of(None)
    assert list(studio.make(request(num_steps="1"), visitor))[-1].text.startswith("done")
    shown = timeline.svg(visitor.profile.intervals)
    lanes = {interval.lane for interval in visitor.profile.intervals}
    assert {"load", "compute"} <= lanes
    assert shown.count("<rect") == len(visitor.profile.intervals) > 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "63 x 64"}, "error: height 63 is not a multiple of 16"),
        ({"fields": {"align": "5"}}, "error: align rounds where references go"),
        ({"size": "4096 x 4096", "fields": {"num_frames": "34"}}, "million values are more than a page makes"),
        ({"mode": form.BEGIN, "reference": "gone.png"}, "error: Reference gone.png does not exist"),
        ({"fields": {"leap": "99"}}, "error: leap index 99 is beyond the last of 4 steps"),
    ],
)
def test_what_cannot_be_made_is_one_line(studio: Studio, visitor: Gallery, fields: dict, message: str) -> None:
    asked = form.read(**{"prompt": PROMPT, "size": None, "fields": {}, **fields})
    *_, last = studio.make(asked, visitor)
    assert (message in last.text, last.text.count("\n"), last.made) == (True, 0, None), last.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": "big"}, "size is 'big'; expected height x width, as 64 x 64"),
        ({"size": "999p 9:16"}, "resolution is '999p'|got '999p'"),
        ({"fields": {"seed": "x"}}, "seed: got 'x'; expected a whole number"),
        ({"fields": {"num_steps": "0"}}, "num_steps is 0; expected a whole number from 1"),
        ({"mode": "sideways"}, "the use of the reference is 'sideways'"),
        ({"mode": form.CONTINUE}, "to continue the reference, upload an image or a video"),
        ({"reference": "a.png"}, "made from text alone; choose how it is used"),
        ({"strategy": "0"}, "a mask strategy says where references go, but none was uploaded"),
    ],
)
def test_a_field_that_cannot_be_read_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        form.read(**{"prompt": PROMPT, "size": None, "fields": {}, **fields})


def test_a_visitor_names_recipes_of_the_page_and_no_other_file(tmp_path: Path) -> None:
    known = {"recipe-8.json": tmp_path / "recipe-8.json"}
    assert form.read_recipe("", known) is form.read_recipe(None, known) is None
    assert form.read_recipe("recipe-8.json", known) == str(tmp_path / "recipe-8.json")
    for name in ("/etc/passwd", "../recipe-8.json", "recipe-9.json"):
        with pytest.raises(ValueError, match=r"expected one of recipe-8\.json\."):
            form.read_recipe(name, known)
    with pytest.raises(ValueError, match="none: this page has no recipes"):
        form.read_recipe("recipe-8.json", {})
    assert not {"plan", "recipe"} & {*form.USUAL, *form.RARE, *form.SAMPLING}  # fields for options are no names of files
    assert {"reuse", "guidance_rule", "merge_steps"} <= {*form.SAMPLING}


def test_fields_become_the_options_of_the_command_line(tiny_model: Path) -> None:
    fields = {"seed": "3", "num_frames": "2s", "leap": "dynamic", "guidance": "1.5", "preset": "", "fps": None}
    asked = form.read(prompt=None, size="240p 9:16", fields=fields, mode=form.CONTINUE, reference="a.mp4")
    assert asked.options == {
        "resolution": "240p", "aspect_ratio": "9:16", "seed": 3, "num_frames": "2s", "leap": "dynamic", "guidance": 1.5,
    }  # fmt: skip
    assert (asked.prompt, asked.strategy, form.mode_of(asked), form.own_strategy(asked)) == (
        "",
        "0,0,-5,0,5",
        form.CONTINUE,
        "",
    )
    assert form.sizes_of(ModelFile.read(None)) == ["64 x 64"]
    assert "144p 9:16" in form.sizes_of(ModelFile.read(tiny_model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 can be reached from other machines; add --auth NAME:FILE"),
        (("--port", "0"), "--port is 0; expected a whole number from 1 to 65535"),
        (("--auth", "me"), "--auth is 'me'; expected NAME:FILE"),
        (("--auth", "me:gone"), "gone does not exist"),
        (("--auth", "me:empty"), "empty is empty; expected the password"),
        (("--memory-budget", "3.3"), "memory budget is '3.3'"),
        (("gone",), "gone"),
        (("--recipes", "empty"), "no recipe in empty; make one with: sora-jax tune MODEL_DIR"),
        (("--recipes", "wrong"), "recipe-8.json is not a recipe"),
    ],
)
def test_a_page_that_would_be_open_or_cannot_be_served_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text("")
    Path("wrong").mkdir()
    Path("wrong/recipe-8.json").write_text("[]")
    assert main.main(["page", *options]) == main.BAD_INPUT
    error = capsys.readouterr().err
    assert (error.count("\n"), message in error) == (1, True), error


@pytest.mark.parametrize(("host", "status"), [(b"localhost:7860", 200), (b"127.0.0.1:7860", 200), (b"evil.example:7860", 421)])
def test_a_page_of_this_machine_answers_to_no_other_name(host: bytes, status: int) -> None:
    """Another name that leads to this machine is how a page from elsewhere would reach it."""
    assert asked_of(host)[0]["status"] == status
    headers = dict(asked_of(host)[0]["headers"])
    assert b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]


def test_a_visitor_gets_a_secret_once_which_no_script_reads() -> None:
    first = dict(asked_of(b"localhost:1")[0]["headers"])[b"set-cookie"].decode()
    cookie, *attributes = first.split("; ")
    assert attributes == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert gallery.secret_of(f"other=1; {cookie}") == cookie.partition("=")[2]
    assert b"set-cookie" not in dict(asked_of(b"localhost:1", cookie=cookie.encode())[0]["headers"])
    assert b"set-cookie" in dict(asked_of(b"localhost:1", cookie=b"sora_jax_visitor=../x")[0]["headers"])
    seen = asked_of(b"localhost:1", cookie=b"a=b")[2]["cookie"]  # what a handler is told on the first visit
    assert seen.startswith(b"a=b; sora_jax_visitor=")


def test_a_request_that_the_server_fails_at_says_nothing_of_it() -> None:
    first, second, _ = asked_of(b"localhost:1", failing=True)
    assert (first["status"], second["body"]) == (400, b"the request cannot be read")


def asked_of(host: bytes, *, failing: bool = False, cookie: bytes | None = None) -> list[dict]:
    """Returns what is sent for a request, and last the cookie that the page was asked with."""
    told: dict = {}

    async def app(scope, receive, send) -> None:
        told["cookie"] = dict(scope["headers"]).get(b"cookie")
        if failing:
            raise RuntimeError("secret")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    guard = Guard(app, frozenset({"localhost", "127.0.0.1"}))
    headers = [(b"host", host), *([] if cookie is None else [(b"cookie", cookie)])]
    asyncio.run(guard({"type": "http", "headers": headers}, None, send))
    return [*sent, told]


def test_a_timeline_has_a_bar_for_each_layer() -> None:
    shown = timeline.svg([Interval("load", "a<b", 0.0, 1.0), Interval("compute", "c", 1.0, 3.0)])
    assert (shown.count("<rect"), "a&lt;b: 1000.0 ms" in shown, "0 s to 3.00 s" in shown) == (2, True, True)
    assert timeline.svg([]) == ""
