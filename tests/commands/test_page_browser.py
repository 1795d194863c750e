"""The page in a real Chromium, and its HTTP interface under load and under hostile requests.

Needs the packages gradio and selenium (the extra browser) and the system's chromium and chromium-driver.  The model is the toy
one: what is tested is the page.
"""

import contextlib
import http.client
import http.cookiejar
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sora_jax.pipeline import clip_info, video
from sora_jax.pipeline.clip_frames import read_frames
from sora_jax.pipeline.pipeline import Pipeline

pytestmark = [pytest.mark.browser]
gradio = pytest.importorskip("gradio", reason="the extra browser (gradio, selenium) is not installed")
selenium = pytest.importorskip("selenium", reason="the extra browser (gradio, selenium) is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PROMPT = "a red circle"
NO_BROWSER = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
SCREENSHOTS = os.environ.get("SORA_JAX_SCREENSHOTS")  # a folder, to look at them


class Server:
    """A page of its own process."""

    def __init__(self, model: Path, folder: Path, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = folder / "log"
        self.clips = folder / "clips"
        command = [sys.executable, "-m", "sora_jax", "page", str(model), "--port", str(port), "--folder", str(self.clips)]
        # the map of previews is fitted once for all servers, and the user's own cache left alone
        own = {"TMPDIR": str(folder), "XDG_CACHE_HOME": os.environ["JAX_COMPILATION_CACHE_DIR"]}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=log, cwd=folder, env={**os.environ, **own}
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().decode().strip()
        assert self.address == f"http://127.0.0.1:{port}/", self.log.read_text()

    def end(self) -> int:
        """Interrupts it and returns its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)

    def interrupt(self) -> tuple[int, float]:
        """Interrupts it, and returns its exit code and the CPU seconds that it used in all."""
        self.process.send_signal(signal.SIGINT)
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode, used.ru_utime + used.ru_stime

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Returns status and text of an answer to somebody who was never here."""
        return Visitor(self.address).ask(path, body, **headers)

    def generate(self, prompt: str = PROMPT, seed: int = 0, **fields: Any) -> Any:
        """Returns what the page answers to a form that is filled in."""
        return Visitor(self.address).generate(prompt, seed, **fields)


class Visitor:
    """Somebody who keeps their cookies, without a browser."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Returns status and text of an answer."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json", **headers})
        try:
            with self.opener.open(asked, timeout=120) as answer:
                return answer.status, answer.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode("utf-8", "replace")

    def begin(self, function: str, *values: Any, **more: str) -> str:
        """Returns the address of the answers of a function of the page, which is asked through its HTTP interface."""
        status, text = self.ask(f"/gradio_api/call/{function}", {"data": list(values), **more})
        assert status == 200, text
        return f"/gradio_api/call/{function}/{json.loads(text)['event_id']}"

    def call(self, function: str, *values: Any, **more: str) -> Any:
        """Returns the last answer of a function of the page; an output whose value alone is new is that value."""
        events = self.ask(self.begin(function, *values, **more))[1]
        last = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")][-1]
        return [_value(one) for one in last] if isinstance(last, list) else last

    def parameters(self, function: str) -> list[dict[str, Any]]:
        """Returns the parameters of a function of the page, each with its label and default."""
        return json.loads(self.ask("/gradio_api/info")[1])["named_endpoints"][f"/{function}"]["parameters"]

    def form(self, prompt: str = PROMPT, seed: int = 0, **fields: Any) -> list[Any]:
        """Returns the values of the form, some of them filled in."""
        config = self.parameters("generate")
        values = [one.get("parameter_default") for one in config]
        values[0] = prompt
        named = {one["label"].split(" ")[0].lower(): index for index, one in enumerate(config)}
        for name, value in {"seed": str(seed), **fields}.items():
            values[named[name]] = value
        return values

    def generate(self, prompt: str = PROMPT, seed: int = 0, **fields: Any) -> Any:
        """Returns what the page answers to a form that is filled in."""
        return self.call("generate", *self.form(prompt, seed, **fields))


def _value(shown: Any) -> Any:
    return shown["value"] if isinstance(shown, dict) and shown.keys() == {"__type__", "value"} else shown


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tiny_model, tmp_path_factory.mktemp("page"))
    yield started
    assert started.end() == 130
    assert not list(started.clips.glob("**/.*"))  # nothing half-written
    assert not (started.clips / "served").exists()


class Browser:
    """A page that is looked at."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, server: Server, *, width: int = 1280, height: int = 1500) -> None:
        self.driver.set_window_size(width, height)
        self.driver.get(server.address)
        self.until(lambda: self.find("#generate"))

    def find(self, selector: str) -> Any:
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found else None

    def until(self, condition: Callable[[], Any], seconds: float = 300) -> Any:
        """Returns what the condition returns, once that is true."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(StaleElementReferenceException):
                if value := condition():
                    return value
            time.sleep(0.1)
        raise AssertionError(f"waited for {seconds} s; the page says {self.status!r}")

    @property
    def status(self) -> str:
        return self.value("#status textarea")

    def value(self, selector: str) -> str:
        field = self.find(selector)
        return "" if field is None else field.get_attribute("value")

    def type(self, selector: str, text: str) -> None:
        field = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        self.press(self.until(lambda: self.find(selector)))

    def press(self, element: Any) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def unfold(self, heading: str) -> None:
        self.press(self.until(lambda: self.driver.find_element("xpath", f"//button[contains(., '{heading}')]")))

    def source(self, selector: str) -> str:
        element = self.find(selector)
        return "" if element is None else element.get_attribute("src") or ""

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            self.driver.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()


def fetched(address: str, path: Path) -> Path:
    with urllib.request.urlopen(address, timeout=60) as answer:
        path.write_bytes(answer.read())
    return path


@NO_BROWSER
def test_a_person_types_and_watches_and_plays_and_downloads(server: Server, browser: Browser, tmp_path: Path) -> None:
    browser.open(server)
    browser.type("#prompt textarea", "a green square")
    browser.type("#seed input, #seed textarea", "5")
    browser.unfold("More options")
    browser.type("#option-num_steps input, #option-num_steps textarea", "400")
    browser.click("#generate")
    pictures = set()
    while not browser.until(lambda: browser.status).startswith(("done", "error")):
        pictures.add(browser.source("#preview img"))
        if "step 3" in browser.status:
            browser.picture("generating")
    assert browser.status.startswith("done: 17 frames of 32 x 48, 400 evaluations")
    assert len(pictures - {""}) >= 2  # the preview changed on the way
    browser.until(lambda: browser.source("#clip video"))
    player = browser.find("#clip video")
    browser.until(lambda: browser.driver.execute_script("return arguments[0].currentTime > 0", player))
    assert browser.driver.execute_script("return [arguments[0].videoWidth, arguments[0].videoHeight]", player) == [48, 32]
    links = [link.get_attribute("href") for link in browser.driver.find_elements("css selector", "#downloads a[href]")]
    assert {Path(urllib.parse.urlparse(link).path).suffix for link in links} >= {".mp4", ".gif"}
    clip = fetched(next(link for link in links if ".mp4" in link), tmp_path / "clip.mp4")
    assert clip_info.inspect(clip).parameters["prompt"] == "a green square"
    assert clip_info.inspect(clip).parameters["seed"] == 5
    browser.picture("done")
    loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded
    assert all(name.startswith((server.address, "data:", "blob:")) for name in loaded), loaded


@NO_BROWSER
def test_an_error_is_the_line_of_the_command_line(server: Server, browser: Browser) -> None:
    browser.open(server)
    browser.type("#seed input, #seed textarea", "x")
    browser.click("#generate")
    browser.until(lambda: browser.status.startswith("error: seed: got 'x'; expected a whole number from 0"))
    browser.picture("error")


@NO_BROWSER
def test_an_image_becomes_a_clip_that_is_continued(server: Server, browser: Browser, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (200, 30, 30)).save(tmp_path / "red.png")
    browser.open(server)
    browser.unfold("Image or clip to video")
    browser.until(lambda: browser.find("#reference input[type=file]")).send_keys(str(tmp_path / "red.png"))
    browser.until(lambda: "red" in browser.find("#reference").text)
    browser.until(lambda: browser.find("#mode input[value='begin with the reference']").is_selected())  # chosen by the upload
    browser.click("#generate")
    browser.until(lambda: browser.status.startswith(("done", "error")))
    assert browser.status.startswith("done"), browser.status
    newest = max(server.clips.glob("clip_*.mp4"))
    assert clip_info.inspect(newest).parameters["mask_strategy"] == "0"
    browser.click("#extend")
    browser.until(lambda: "will be continued" in browser.status)
    browser.click("#generate")
    browser.until(lambda: browser.status.startswith(("done", "error")))
    assert browser.status.startswith("done"), browser.status
    assert clip_info.inspect(max(server.clips.glob("clip_*.mp4"))).parameters["mask_strategy"] == "0,0,-5,0,5"


@NO_BROWSER
def test_cancelling_leaves_no_clip(server: Server, browser: Browser) -> None:
    browser.open(server)
    before = sorted(server.clips.glob("clip_*"))
    browser.unfold("More options")
    browser.type("#option-num_steps input, #option-num_steps textarea", "5000")
    browser.click("#generate")
    browser.until(lambda: browser.status.startswith("step"))
    browser.click("#cancel")
    browser.until(lambda: browser.status == "cancelled; nothing was written.")
    assert sorted(server.clips.glob("clip_*")) == before


@NO_BROWSER
def test_a_reload_in_the_middle_loses_no_clip(server: Server, browser: Browser) -> None:
    browser.open(server)
    before = len(list(server.clips.glob("clip_*.mp4")))
    browser.type("#prompt textarea", "a circle that is reloaded")
    browser.unfold("More options")
    browser.type("#option-num_steps input, #option-num_steps textarea", "300")
    browser.click("#generate")
    browser.until(lambda: browser.status.startswith("step"))
    browser.driver.refresh()
    browser.until(lambda: len(list(server.clips.glob("clip_*.mp4"))) == before + 1)
    browser.driver.refresh()
    browser.until(lambda: "a circle that is reloaded" in browser.value("#clips input"))


@NO_BROWSER
def test_two_ways_of_sampling_stand_side_by_side(server: Server, browser: Browser) -> None:
    browser.open(server)
    browser.click("#tab-compare-button, button[role=tab]:nth-of-type(2)")
    browser.click("#compare")
    browser.until(lambda: browser.value("#compare-status textarea, #compare-status input").startswith(("done", "error")))
    assert browser.value("#compare-status textarea, #compare-status input").startswith("done: clips")
    for selector in ("#clip-a video", "#clip-b video", "#difference video"):
        browser.until(lambda selector=selector: browser.source(selector))
    text = browser.until(lambda: browser.find("#comparison").text)
    assert "dB" in text
    browser.until(lambda: browser.find("#cosines canvas, #cosines svg"))
    browser.picture("compare")


@NO_BROWSER
def test_the_memory_plan_is_shown_and_refused(server: Server, browser: Browser) -> None:
    browser.open(server)
    browser.click("#tab-memory-button, button[role=tab]:nth-of-type(3)")
    browser.until(lambda: browser.find("#budget"))
    browser.type("#budget input, #budget textarea", "1MB")
    browser.click("#plan")
    browser.until(lambda: "memory budget of" in browser.find("#memory-plan").text)
    browser.type("#budget input, #budget textarea", "2GB")
    browser.click("#plan")
    browser.until(lambda: "layers kept" in browser.find("#memory-plan").text)
    browser.picture("memory")


@NO_BROWSER
def test_the_page_fits_a_phone(server: Server, browser: Browser) -> None:
    browser.open(server, width=500, height=900)
    wide, seen = browser.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= seen
    browser.picture("phone")


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


def path_of(shown: Any) -> str:
    """Returns the path of a clip in an answer."""
    return (shown.get("video") or shown)["path"]


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    studio = Studio(Pipeline.from_pretrained(tiny_model), tmp_path, previews=tmp_path)
    page, address = server.serve(studio, host="127.0.0.1", port=port, auth=None)
    visitor = Visitor(address)
    values, kept = [one.get("parameter_default") for one in visitor.parameters(function)], []
    for _ in range(3):
        assert visitor.call(function, *values, session_hash="a" * 12)[0].startswith("done")
        kept.append(len(list(page.app.state_holder["a" * 12].components)))
    page.close()
    assert kept == [kept[0]] * 3


def used_s(process: int) -> float:
    """Returns the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def resident_mb(process: int) -> float:
    """Returns the memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1e3
