"""The page in a real Chromium: what a person types, watches, plays, downloads, cancels and compares.

Needs the packages gradio and selenium (the extra browser) and the system's chromium and chromium-driver.  The model is the toy
one: what is tested is the page.
"""

import contextlib
import os
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sora_jax.pipeline import clip_info
from tests.support.page_server import Server

pytestmark = [pytest.mark.browser]
gradio = pytest.importorskip("gradio", reason="the extra browser (gradio, selenium) is not installed")
selenium = pytest.importorskip("selenium", reason="the extra browser (gradio, selenium) is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NO_BROWSER = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
SCREENSHOTS = os.environ.get("SORA_JAX_SCREENSHOTS")  # a folder, to look at them


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
