"""Sizes, lengths and latent sizes against Open-Sora's tables, exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sora_jax import config
from sora_jax.inputs import sizes
from sora_jax.networks.vae.codec import latent_size
from tests.parity.fixtures import read_json


def cases(folder: Path) -> dict[str, Path]:
    return {"shapes": folder / "shapes.json"}


def check(folder: Path, case: str) -> list[str]:
    content = read_json(folder / f"{case}.json")
    differences = [f"section {section} is missing" for section in _SECTIONS if not content.get(section)]
    for section, expected in content.items():
        if section == "description":
            continue
        if section not in _SECTIONS:
            differences.append(f"section {section} is not known; expected one of {', '.join(_SECTIONS)}")
            continue
        differences += [
            f"{section} {name}: {got}, expected {wanted}" for name, got, wanted in _SECTIONS[section](expected) if got != wanted
        ]
    return differences


_Triples = list[tuple[str, Any, Any]]  # what, got, expected


def _image_size(expected: dict[str, dict[str, list[int] | None]]) -> _Triples:
    return [
        (f"{resolution} {ratio}", _or_none(sizes.image_size, resolution, ratio), wanted)
        for resolution, row in expected.items()
        for ratio, wanted in row.items()
    ]


def _latent_sizes(expected: list[dict[str, Any]]) -> _Triples:
    triples: _Triples = []
    for entry in expected:
        name = f"{entry['resolution']} {entry['aspect_ratio']} {entry['num_frames']}"
        size = sizes.image_size(entry["resolution"], entry["aspect_ratio"])
        triples.append((f"{name} image_size", list(size), entry["image_size"]))
        triples.append(
            (f"{name} latent", list(latent_size(config.open_sora_1_2.vae, entry["num_frames"], *size)), entry["latent"])
        )
    return triples


def _latent_frames(expected: dict[str, int]) -> _Triples:
    return [
        (frames, latent_size(config.open_sora_1_2.vae, int(frames), 8, 8)[0], wanted) for frames, wanted in expected.items()
    ]


def _by_name(function: Callable[[str], int]) -> Callable[[dict[str, Any]], _Triples]:
    return lambda expected: [(name, _or_none(function, name), wanted) for name, wanted in expected.items()]


def _or_none(function: Callable[..., Any], *arguments: str) -> Any:
    try:
        value = function(*arguments)
    except ValueError:
        return None
    return list(value) if isinstance(value, tuple) else value


_SECTIONS: dict[str, Callable[[Any], _Triples]] = {
    "image_size": _image_size,
    "num_frames": _by_name(sizes.num_frames),
    "num_pixels": _by_name(sizes.num_pixels),
    "latent_sizes": _latent_sizes,
    "latent_T_by_frames": _latent_frames,
}
