"""What a reader needs to judge a benchmark's numbers: device, threads, versions, commit, load."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import sora_jax


def environment() -> dict[str, Any]:
    """Returns device, threads, versions, commit and the machine's load, JSON-ready."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {
        "device": f"{jax.devices()[0].device_kind}: {cpu}",
        "threads": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "sora_jax": sora_jax.__version__},
        "commit": commit,
        "load": os.getloadavg(),
    }
