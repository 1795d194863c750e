"""What a reader needs to judge a benchmark: device, versions, commit, date, load; its files and folders."""

import argparse
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sora_jax.process import status_bytes
from sora_jax.version import __version__


def environment() -> dict[str, Any]:
    """Returns device, threads, versions, commit, date (UTC) and the machine's load, JSON-ready."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "device": f"{jax.devices()[0].device_kind}: {cpu}",
        "threads": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "sora_jax": __version__},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load": os.getloadavg(),
    }


def write_report(report: Mapping[str, Any], path: Path | None, *, show: bool = False) -> None:
    """Writes a report as JSON to a file, if one is named, and prints it if ``show``.

    A report without an ``environment`` gets this machine's.  Creates the file's folders.
    """
    text = compact({**report, "environment": report.get("environment") or environment()})
    if show:
        print(text, end="")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def new_folder(given: str) -> Path:
    """Returns the path of a folder that a benchmark creates and removes.

    Raises:
      argparse.ArgumentTypeError: the path exists already.
    """
    if Path(given).exists():
        raise argparse.ArgumentTypeError(f"{given} exists; name a folder that does not, because it is removed afterwards")
    return Path(given)


def compact(value: Any) -> str:
    """Returns indented JSON in which lists of numbers and words are one line each."""
    flat_list, line_break = re.compile(r"\[\n +([^\[\]{}]+?)\n *\]"), re.compile(r"\n *")
    return flat_list.sub(lambda match: f"[{line_break.sub(' ', match[1])}]", json.dumps(value, indent=1)) + "\n"


def memory() -> dict[str, int]:
    """Returns bytes of this process: its high-water mark, and what it holds now of its own and of file pages (Linux)."""
    names = {"peak_bytes": "VmHWM", "anonymous_bytes": "RssAnon", "file_bytes": "RssFile"}
    return {name: status_bytes(field) or 0 for name, field in names.items()}
