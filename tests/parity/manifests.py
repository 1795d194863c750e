"""The full-size networks against the key lists of the released checkpoints: every key, shape and the dtype.

Invariant: nothing is allocated; the conversion tables plan a whole checkpoint from its header alone.
"""

import math
from pathlib import Path
from typing import Any

import convert_weights
from convert_weights.rules import Header
from sora_jax import config as presets
from tests.parity.fixtures import FixtureError, read_json

_NETWORKS = {"t5": "t5", "stdit3": "stdit3", "opensora_vae": "vae"}  # what a manifest's name begins with


def cases(folder: Path) -> dict[str, Path]:
    return {path.stem.removeprefix("manifest_"): path for path in sorted(folder.glob("manifest_*.json"))}


def check(folder: Path, case: str) -> list[str]:
    manifest = read_json(folder / f"manifest_{case}.json")
    network = next((network for prefix, network in _NETWORKS.items() if case.startswith(prefix)), None)
    if network is None:
        raise FixtureError(f"manifest_{case}.json names no network; expected one of {', '.join(_NETWORKS)}.")
    config = getattr(presets.open_sora_1_2, network)
    headers = {name: Header(tuple(entry["shape"]), entry["dtype"]) for name, entry in manifest["keys"].items()}
    differences = list(convert_weights.plan(network, headers, config).faults)
    return differences + _config_differences(config.to_dict(), manifest.get("config", {})) + _total(manifest)


def _config_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"config {name} is {value}, ours is {ours.get(name)}"
        for name, value in theirs.items()
        if ours.get(name) != (tuple(value) if isinstance(value, list) else value)
    ]


def _total(manifest: dict[str, Any]) -> list[str]:
    """The manifest against itself: the parameters it lists, each tied one counted once, are as many as it says."""
    counted = [entry for entry in manifest["keys"].values() if entry["kind"] == "parameter" and "tied_to" not in entry]
    total = sum(math.prod(entry["shape"]) for entry in counted)
    return (
        []
        if total == manifest["total_params"]
        else [f"{total} parameters listed, total_params says {manifest['total_params']}"]
    )
