"""The manifest of an export: the one file from which a host program can drive the loop.

Invariant: a manifest that was written or read here fits ``manifest.schema.json``, which describes every field, does not
contradict itself (`consistency`), and is the text that was written: its ``sha256`` is that of the file with zeros in place
of these 64 digits.  The bytes of the other files are compared when they are first used (`contents`).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from sora_jax.export.consistency import check
from sora_jax.export.contents import Contents, ExportFileError
from sora_jax.export.entries import ExportManifest, TargetName, UnsealedManifest
from sora_jax.export.opening import require
from sora_jax.export.wiring import ContradictionError

MANIFEST_FILE = "manifest.json"
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
FORMAT_VERSION = 1
_MAX_BYTES = 64_000_000  # a manifest of 28 pairs in three sizes has 1 MB
_UNSEALED = "0" * 64


class ManifestError(ExportFileError):
    """A manifest is missing, damaged, or does not fit its schema or its files."""


def write(folder: Path, manifest: UnsealedManifest) -> None:
    """Writes a manifest that fits the schema, with its own checksum first.

    Raises:
      ManifestError: it does not fit.
    """
    sealed: ExportManifest = {"sha256": _UNSEALED, **manifest}
    validate(sealed, folder / MANIFEST_FILE)
    text = json.dumps(sealed, indent=1, allow_nan=False) + "\n"
    seal = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST_FILE).write_text(text.replace(_UNSEALED, seal, 1), encoding="utf-8")


def read(folder: Path) -> ExportManifest:
    """Returns the manifest of an exported folder; the files it lists are there, with the right sizes.

    Raises:
      ManifestError: the manifest is missing or damaged, or was changed.
      ExportFileError: a file is missing or has another size.
      OSError: the manifest cannot be read.
    """
    path = folder / MANIFEST_FILE
    manifest = _parsed(path)
    validate(manifest, path)
    Contents(folder, manifest["files"]).check_sizes()
    return cast(ExportManifest, manifest)


def validate(manifest: Any, path: Path) -> None:
    """Refuses what does not fit ``manifest.schema.json``, or contradicts itself, naming the first place.

    Raises:
      ManifestError: it does not fit.
      MissingExtraError: jsonschema is not installed.
    """
    target = manifest.get("target") if isinstance(manifest, Mapping) else None
    require(str(target) if target in get_args(TargetName) else "export", "jsonschema")
    import jsonschema

    schema = json.loads(SCHEMA_FILE.read_text("utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
    if error is not None:
        raise ManifestError(f"{path} does not fit its schema at {error.json_path}: {error.message[:200]}")
    try:
        check(manifest)
    except ContradictionError as error:
        raise ManifestError(f"{path} contradicts itself: {error}") from None


def refuse_numbers(target: TargetName, **parts: Any) -> None:
    """Refuses parts of a manifest that do not fit the schema, before the rest of it is worked for.

    Raises:
      ValueError: names the part and the number.
      MissingExtraError: jsonschema is not installed.
    """
    schema = _schema()
    for name, part in parts.items():
        fault = _fault(part, {**schema["properties"][name], "$defs": schema["$defs"]}, target)
        if fault:
            raise ValueError(f"{name} cannot be exported, see {fault}")


def _schema() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(SCHEMA_FILE.read_text("utf-8")))


def _extra(manifest: Any) -> str:
    """Returns the extra that installs what an export of this target needs."""
    target = manifest.get("target") if isinstance(manifest, Mapping) else None
    return target if isinstance(target, str) and target in get_args(TargetName) else "export"


def _fault(value: Any, schema: Mapping[str, Any], extra: str) -> str:
    """Returns where a value does not fit a schema and why; empty where it fits."""
    require(extra, "jsonschema")
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
    return "" if error is None else f"{error.json_path}: {error.message[:200]}"


def _parsed(path: Path) -> Mapping[str, Any]:
    """Returns the JSON of a manifest that is as it was written."""
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise FileNotFoundError
        if size > _MAX_BYTES:
            raise ManifestError(f"{path} has {size} bytes, expected at most {_MAX_BYTES}; export again.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise ManifestError(
            f"{path.parent} has no {MANIFEST_FILE}; expected a folder that sora-jax export has finished."
        ) from None
    try:
        manifest = json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read ({error}); export again.") from error
    seal = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(seal, str) or hashlib.sha256(text.replace(seal.encode(), _UNSEALED.encode(), 1)).hexdigest() != seal:
        raise ManifestError(
            f"{path} is not as the export wrote it (sha256); copy it again, or export again.  "
            "Numbers of the loop are options of run-exported."
        )
    return cast(Mapping[str, Any], manifest)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object whose names are all different."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError(f"an object has a name twice, among {', '.join(made)[:100]}")
    return made


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text}, which is not finite")
    return value
