"""The page as a process of its own, and visitors who speak to it over HTTP: what tests of the page start, ask and measure.

Imports the standard library only; the process that it starts needs the package gradio.  The browser is in
`tests/commands/test_page_browser.py`.
"""

import http.cookiejar
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PROMPT = "a red circle"


class Server:
    """A page in a process of its own."""

    def __init__(self, model: Path, folder: Path, *options: str):
        port = free_port()
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


def path_of(shown: Any) -> str:
    """Returns the path of a clip in an answer."""
    return (shown.get("video") or shown)["path"]


def free_port() -> int:
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def used_s(process: int) -> float:
    """Returns the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(process: int) -> float:
    """Returns the memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1e3
