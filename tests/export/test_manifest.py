"""The manifest: read back as it was written, and refused where it was changed, is damaged, or contradicts itself."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sora_jax.export import describe, entries, host_program, manifest
from sora_jax.export.contents import ExportFileError
from sora_jax.export.host_program import ExportedModel
from sora_jax.pipeline.clip_options import OPTIONS
from sora_jax.pipeline.settings import Settings
from tests.support.exports import complete_manifest, rewrite, write_folder

pytest.importorskip("jsonschema", reason="manifests are validated with jsonschema (extra stablehlo, onnx or coreml)")


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, complete_manifest(tokenizer="a"))
    return tmp_path


def test_a_manifest_is_read_back_as_it_was_written(tmp_path):
    made = complete_manifest()
    manifest.write(tmp_path, made)
    with pytest.raises(ExportFileError, match="a is missing; copy the whole folder again"):
        manifest.read(tmp_path)
    (tmp_path / "a").write_bytes(b"x")
    read = manifest.read(tmp_path)
    assert {name: value for name, value in read.items() if name != "sha256"} == made
    assert [phase["name"] for phase in made["phases"]] == ["text", "step", "decode_chunk", "decode_frame"]
    assert [chunk["variant"] for chunk in made["sizes"][0]["chunks"]] == ["frames_17", "frames_3"]
    with pytest.raises(manifest.ManifestError, match=r"has no manifest\.json"):
        manifest.read(tmp_path / "elsewhere")


def test_a_single_changed_digit_is_told(folder):
    path = folder / manifest.MANIFEST_FILE
    text = path.read_text()
    assert text.count('"guidance": 3.0') == 1
    path.write_text(text.replace('"guidance": 3.0', '"guidance": 2.0'))
    with pytest.raises(manifest.ManifestError, match=r"manifest\.json is not as the export wrote it \(sha256\)"):
        manifest.read(folder)
    path.write_text(text)
    assert manifest.read(folder)["sampling"]["guidance"] == 3.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"guidance": 3.0', '"guidance": NaN', "the number NaN, which is not finite"),
        ('"guidance": 3.0', '"guidance": 1e999', "the number 1e999, which is not finite"),
        ('"guidance": 3.0', '"guidance": 3.0, "guidance": 4.0', "has a name twice"),
        ('"guidance": 3.0', '"guidance": ' + 100_000 * "[", "cannot be read"),
        ("{", "[{", "cannot be read"),
    ],
)
def test_what_is_no_json_is_refused(folder, old, new, message):
    path = folder / manifest.MANIFEST_FILE
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(manifest.ManifestError, match=message):
        manifest.read(folder)


def change(*keys: Any, to: Any) -> Any:
    """Returns a change of the entry that the keys lead to."""

    def edit(made: Any) -> None:
        for key in keys[:-1]:
            made = made[key]
        made[keys[-1]] = to

    return edit


PAIR = ("stages", 4)
TIMES = [1000.0, 800.0, 900.0, 100.0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("extra", to=1), r"schema at \$: .*extra"),
        (change("sampling", "guidance", to=1e9), r"schema at \$\.sampling\.guidance"),
        (change("sampling", "guidance", to="3"), r"schema at \$\.sampling\.guidance"),
        (change("sampling", "num_timesteps", to=0), r"schema at \$\.sampling\.num_timesteps"),
        (change("sampling", "num_steps", to=10**9), r"schema at \$\.sampling\.num_steps"),
        (change("sampling", "num_steps", to=5), "has 4 times for 5 steps"),
        (change("sampling", "leap", "mode", to="static"), "leap of step None is not one of 4 steps"),
        (change("sizes", 0, "shift", to=1e30), r"schema at \$\.sizes\[0\]\.shift"),
        (change("sizes", 0, "shift", to=2.0), "times of size 20x16x32 that are not those of shift 2"),
        (change("sizes", 0, "times", to=TIMES), "times that do not fall from 1000 to 0"),
        (change("sizes", 0, "height", to=32), "size 20x16x32 is 20x32x32"),
        (change("sizes", 0, "latents", 0, to=5), "chunks of 6 latent frames, expected 5"),
        (change("sizes", 0, "latents", 1, to=3), "takes z_BTHWC as"),
        (change("sizes", 0, "latents", 1, to=2**40), r"schema at \$\.sizes\[0\]\.latents"),
        (change("sizes", 0, "conditions", "height_px_B", to=32.0), "conditioned on"),
        (change("sizes", 0, "chunks", 0, "variant", to="frames_3"), "has chunks frames_3, frames_3"),
        (change("tokens", "length", to=13), "takes ids_BL as"),
        (change("tokens", "file", to="b"), "tokenizer 'b' is not in files"),
        (change("files", to={"../a": {"bytes": 1, "sha256": "0" * 64}}), "names the file '../a'; expected a plain path inside"),
        (change("files", "/etc/passwd", to={"bytes": 1, "sha256": "0" * 64}), "names the file '/etc/passwd'"),
        (change("files", "a/..//b", to={"bytes": 1, "sha256": "0" * 64}), "names the file"),
        (change("total_bytes", to=2), "total_bytes is 2, its files have 1"),
        (lambda made: made["stages"].pop(4), "stages are .*; a complete export has .*stdit3_pair_00"),
        (lambda made: made["stages"].reverse(), "stages are vae_spatial_decoder"),
        (lambda made: made["phases"][1]["stages"].reverse(), "phases are not those of its stages"),
        (change("phases", 0, "unload", to="after_phase"), "phases are not those of its stages"),
        (change(*PAIR, "program", to="t5_block"), "stage stdit3_pair_00 has program and network"),
        (change("model", "networks", "stdit3", "config", "depth", to=10**7), "stdit3 has depth 10000000"),
        (change(*PAIR, "functions", 0, "variant", to="merged"), "two functions for one variant and size"),
        (change(*PAIR, "functions", 0, "name", to="merged"), "functions merged, merged, one of them twice"),
        (change(*PAIR, "functions", 0, "sizes", to=["1x1x1"]), "serves sizes 1x1x1, which there are not"),
        (change(*PAIR, "functions", 0, "artefact", "file", to="../b"), "in '../b', which is not in files"),
        (change(*PAIR, "functions", 0, "artefact", "weights", to="b"), "weights 'b', which are not in files"),
        (change(*PAIR, "functions", 0, "inputs", 0, "shape", 1, to=7), "stdit3_pair_00 full takes x_RTSD"),
        (change(*PAIR, "functions", 0, "inputs", 0, "shape", to=[2**31] * 4), "full has x_RTSD with shape"),
        (change(*PAIR, "functions", 0, "outputs", 0, "shape", 3, to=5), "takes x_RTSD"),
        (change(*PAIR, "functions", 0, "checks", 0, "psnr_db", to=9.0), "full did not pass its check of x"),
    ],
)
def test_a_manifest_that_cannot_be_true_is_refused(folder, edit, message):
    rewrite(folder, edit)
    with pytest.raises(manifest.ManifestError, match=message) as refused:
        ExportedModel(folder)
    assert str(refused.value).startswith(str(folder / manifest.MANIFEST_FILE))


def test_types_and_schema_have_the_same_fields():
    schema = json.loads(manifest.SCHEMA_FILE.read_text())
    places = {
        entries.ExportManifest: schema,
        **{getattr(entries, f"{name.capitalize()}Entry"): one for name, one in schema["$defs"].items() if name != "sha256"},
        entries.SamplingEntry: schema["properties"]["sampling"],
        entries.LeapEntry: schema["properties"]["sampling"]["properties"]["leap"],
        entries.TokensEntry: schema["properties"]["tokens"],
        entries.VectorsEntry: schema["properties"]["vectors"],
        entries.PhaseEntry: schema["properties"]["phases"]["items"],
        entries.ArtefactEntry: schema["$defs"]["function"]["properties"]["artefact"],
    }
    for kind, place in places.items():
        assert get_type_hints(kind).keys() == place["properties"].keys(), kind
        assert kind.__required_keys__ == set(place["required"]), kind


def test_every_target_has_what_the_page_says():
    """Two modules, a line in the schema, an extra that `export` includes, a choice of the command, a row of the page."""
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    schema = json.loads(manifest.SCHEMA_FILE.read_text("utf-8"))
    targets = list(get_args(entries.TargetName))
    assert schema["properties"]["target"]["enum"] == targets
    assert extras["export"] == [f"sora_jax[{','.join(targets)}]"]
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", (root / "docs" / "export.md").read_text("utf-8"), re.MULTILINE)
    assert rows == targets
    for target in targets:
        assert target in extras
        assert (root / "sora_jax" / "export" / f"{target}.py").is_file()
        assert (root / "sora_jax" / "export" / f"{target}_open.py").is_file()


@pytest.mark.parametrize("given", [{"leap": "released"}, {"solver": "ab2"}])
def test_a_loop_that_is_not_exported_is_refused(given):
    with pytest.raises(ValueError, match="export"):
        describe.sampling_entry(Settings.resolve({"fps": 8}, given))


def test_no_number_that_is_not_finite_is_written(tmp_path):
    made = complete_manifest()
    made["stages"][0]["functions"][0]["checks"][0]["psnr_db"] = math.nan
    with pytest.raises((ValueError, manifest.ManifestError)):
        manifest.write(tmp_path, made)
    assert not list(tmp_path.iterdir())


def test_a_loop_takes_the_numbers_that_the_pipeline_takes():
    sampling = json.loads(manifest.SCHEMA_FILE.read_text())["properties"]["sampling"]["properties"]
    for name in ("num_steps", "guidance", "merge_steps"):
        assert (sampling[name]["minimum"], sampling[name]["maximum"]) == OPTIONS[name].option.within, name
    assert tuple(sampling[n]["maximum"] for n in ("num_steps", "guidance")) == (
        host_program.MAX_STEPS,
        host_program.MAX_GUIDANCE,
    )
