"""The page's HTTP interface without a browser: many requests at once, hostile ones, passwords, a full queue, and memory.

Needs the package gradio (the extra browser has it).  The model is the toy one: what is tested is the page.
"""

import contextlib
import http.client
import json
import re
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.pipeline import video
from sora_jax.pipeline.clip_frames import read_frames
from sora_jax.pipeline.pipeline import Pipeline
from tests.support.page_server import PROMPT, Server, Visitor, free_port, path_of, resident_mb, used_s

pytestmark = [pytest.mark.browser]
gradio = pytest.importorskip("gradio", reason="the extra browser (gradio, selenium) is not installed")


def test_twenty_requests_at_once_are_all_answered_with_the_clips_of_the_pipeline(
    server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    answers: dict[int, Any] = {}

    def ask(seed: int) -> None:
        answers[seed] = server.generate(seed=1000 + seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe = Pipeline.from_pretrained(tiny_model)
    for seed in range(20):
        assert answers[seed][0].startswith("done"), answers[seed]
        number = answers[seed][3]["value"] if isinstance(answers[seed][3], dict) else answers[seed][3]
        clip = pipe(PROMPT, seed=1000 + seed)
        path = video.save(clip.frames[0], tmp_path / f"{seed}.mp4", fps=clip.fps, parameters=clip.parameters[0])
        assert path.read_bytes() == (server.clips / f"clip_{number:04d}.mp4").read_bytes()


def hostile() -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yields paths, bodies and headers of requests that no page makes."""
    outside = [
        "/etc/passwd",
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/proc/self/environ",
        "C:/x",
        "file:///etc/passwd",
    ]
    outside += ["//etc/passwd", "/etc/./passwd", "..%2f..%2fetc%2fpasswd", "/srv", "/root/.bashrc", "http://127.0.0.1:1/"]
    for path in outside:
        yield f"/gradio_api/file={path}", None, {}
        yield f"/file={path}", None, {}
        yield f"/gradio_api/file/{path}", None, {}
        yield f"/static/{path}", None, {}
        yield f"/assets/{path}", None, {}
    call = "/gradio_api/call/generate"
    bodies = [{}, [], 5, None, {"data": None}, {"data": {}}, {"data": []}, {"data": [None] * 18}, {"data": [{"a": 1}] * 18}]
    bodies += [
        {"data": ["a", "1 x 1", {"path": path, "meta": {"_type": "gradio.FileData"}}, *[""] * 16]} for path in outside[:4]
    ]
    bodies += [{"data": ["x" * 100_000, *[""] * 18]}, {"data": ["a", "9" * 500, *[""] * 17]}, b"{", b"\xff\xfe", b"[" * 10_000]
    for body in bodies:
        yield call, body, {}
        yield "/gradio_api/run/generate", body, {}
    for path in ("/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/reset", "/gradio_api/component_server", "/login"):
        yield path, b"", {}
        yield path, {"x": 1}, {}
        yield path, b"--x\r\nbad", {"Content-Type": "multipart/form-data; boundary=x"}
    yield "/", None, {"Host": "evil.example"}
    yield "/gradio_api/proxy=http://127.0.0.1:1/", None, {}
    yield "/gradio_api/call/generate/0", None, {}
    yield "/gradio_api/nothing", None, {}


def test_hostile_requests_show_neither_a_file_nor_a_traceback(server: Server) -> None:
    requests = list(hostile())
    assert len(requests) >= 100
    for path, body, headers in requests:
        try:
            status, text = server.ask(path, body, **headers)
        except (ConnectionError, http.client.InvalidURL, UnicodeError, ValueError):  # the client refuses to send some of them
            continue
        assert "root:" not in text, path
        assert "Traceback" not in text, path
        assert not re.search(r'File "[^"]+\.py"', text), path
        if status == 200 and "call/" in path and "event_id" in text:
            events = server.ask(f"{path}/{json.loads(text)['event_id']}")[1]
            assert "root:" not in events, body
            assert "Traceback" not in events, body
    assert server.generate(seed=1)[0].startswith("done")


def test_an_upload_beyond_the_limit_is_refused(server: Server) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    content = head + bytes(60 << 20) + b"\r\n--x--\r\n"
    with contextlib.suppress(urllib.error.URLError):  # the server may hang up before it has read everything
        status, _ = server.ask("/gradio_api/upload", content, **{"Content-Type": "multipart/form-data; boundary=x"})
        assert status in (400, 413)
    assert not [path for path in server.clips.rglob("*") if path.is_file() and path.stat().st_size > 50e6]
    assert server.generate(seed=1)[0].startswith("done")


def test_a_page_behind_a_password_keeps_its_visitors_apart(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    server = Server(tiny_model, tmp_path, "--auth", f"me:{tmp_path / 'password'}")
    assert server.ask("/gradio_api/call/generate", {"data": []})[0] == 401
    assert server.ask("/config")[0] == 401
    one, other = Visitor(server.address), Visitor(server.address)
    for visitor in (one, other):
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert visitor.ask("/login", b"username=me&password=secret", **form)[0] == 200
    first, second = one.generate("a red circle", seed=1), other.generate("a green square", seed=2)
    assert [answer[0].startswith("done") for answer in (first, second)] == [True, True]
    assert [[title for title, _ in answer[3]["choices"]] for answer in (first, second)] == [
        ["1: a red circle (seed 1)"],
        ["2: a green square (seed 2)"],
    ]
    assert one.ask(f"/gradio_api/file={path_of(first[2])}")[0] == 200
    # the same clip by the name that can be guessed, for either of them, and in another's form
    kept = server.clips / "clip_0001.mp4"
    assert kept.exists()
    assert [visitor.ask(f"/gradio_api/file={kept}")[0] for visitor in (one, other)] == [403, 403]
    reference = {"path": str(kept), "meta": {"_type": "gradio.FileData"}}
    refused = other.generate(reference=reference, how="begin with the reference")
    assert not isinstance(refused, list) or not str(refused[0]).startswith("done")
    assert len(list(server.clips.glob("clip_*.mp4"))) == 2
    assert server.end() == 130


def test_a_full_queue_refuses_in_words_and_an_interrupt_ends_all_that_waits(tiny_model: Path, tmp_path: Path) -> None:
    """What is done after an interrupt is counted in CPU seconds: at most one second of two cores, of a clip of many minutes."""
    server = Server(tiny_model, tmp_path)
    visitor = Visitor(server.address)
    running = visitor.begin("generate", *visitor.form(num_steps="100000"))
    with visitor.opener.open(server.address.rstrip("/") + running, timeout=120) as events:
        assert next(line for line in events if re.search(rb"step \d+ of 100000", line))
        waiting = [visitor.ask("/gradio_api/call/generate", {"data": visitor.form(seed=1)}) for _ in range(64)]
        assert {status for status, _ in waiting} == {200}
        status, text = visitor.ask("/gradio_api/call/generate", {"data": visitor.form(seed=1)})
        assert (status, "Queue is full" in text, "Traceback" in text) == (503, True, False)
        spent = used_s(server.process.pid)
        code, in_all = server.interrupt()
    assert (code, in_all - spent < 2) == (130, True), in_all - spent
    assert not list(server.clips.glob("clip_*"))
    assert not list(server.clips.glob("**/.*"))
    assert not (server.clips / "served").exists()
    assert server.log.read_text().endswith("sora-jax: error: interrupted\n")


@pytest.mark.parametrize("function", ["generate", "compare"])
def test_a_session_keeps_no_more_components_after_more_clips(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Gradio keeps one more for each plain value that an output gets after an update of it, and a skip is an update."""
    from sora_jax.commands.web import server
    from sora_jax.commands.web.studio import Studio

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    studio = Studio(Pipeline.from_pretrained(tiny_model), tmp_path, previews=tmp_path)
    page, address = server.serve(studio, host="127.0.0.1", port=free_port(), auth=None)
    visitor = Visitor(address)
    values, kept = [one.get("parameter_default") for one in visitor.parameters(function)], []
    for _ in range(3):
        assert visitor.call(function, *values, session_hash="a" * 12)[0].startswith("done")
        kept.append(len(list(page.app.state_holder["a" * 12].components)))
    page.close()
    assert kept == [kept[0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("same", [True, False], ids=["one visitor", "a new visitor each"])
def test_memory_stays_flat_over_two_hundred_clips(server: Server, same: bool) -> None:
    """What grows has limits, which are reached first: the clips a visitor has listed, the sessions Gradio keeps a copy for."""
    visitor, more = Visitor(server.address), {"session_hash": "a" * 12} if same else {}
    values = visitor.form()

    def make(count: int) -> None:
        for _ in range(count):
            asked = visitor if same else Visitor(server.address)
            assert asked.call("generate", *values, **more)[0].startswith("done")

    make(120)
    before = resident_mb(server.process.pid)
    make(200)
    assert resident_mb(server.process.pid) < before + 12, before
    assert read_frames(max(server.clips.glob("clip_*.mp4"))).dtype == np.uint8
