"""Stages in a row compute what the networks compute, from the weights of a model directory."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sora_jax.export.program import Stage, load_parameters
from sora_jax.export.size import Size
from sora_jax.export.stages import PARTS, list_stages
from sora_jax.networks import registry
from sora_jax.networks.merging import Merge
from sora_jax.storage.checkpoint import load_network, unflatten
from sora_jax.storage.directory import ModelDirectoryError, open_network
from tests.support.tiny_model import CONFIG

SIZE = Size(num_frames=20, height=16, width=32)
COMPILED: dict[tuple[str, str], Any] = {}  # of the stages of this module's one size
EQUAL = {"rtol": 1e-5, "atol": 1e-5}  # the same float32 operations, compiled in other units


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {stage.name: stage for stage in list_stages(CONFIG, [SIZE], parts=PARTS)}


def network(directory: Path, name: str) -> Any:
    config, flat = load_network(directory, name)
    return unflatten(registry.abstract(name, config), flat)


def run(directory: Path, stage: Stage, function: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the stage's outputs put in, as a host program does."""
    params = load_parameters(open_network(directory, stage.network), stage)
    chosen = stage.function(function)
    given = {name: values[name] for name in chosen.inputs}
    assert {name: (x.shape, x.dtype) for name, x in given.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in chosen.inputs.items()
    }
    key = (stage.name, function)
    if key not in COMPILED:
        COMPILED[key] = jax.jit(lambda params, given: chosen.call(params, **given))
    return values | COMPILED[key](params, given)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_text_stages_are_the_encoder(tiny_model, stages):
    length = CONFIG.stdit3.model_max_length
    ids, mask = np.arange(length, dtype=np.int32)[None], (np.arange(length) < 5)[None]
    values: dict[str, Any] = {"ids_BL": ids, "mask_BL": mask.astype(np.float32)}
    for name in [name for name in stages if name.startswith("t5")]:
        values = run(tiny_model, stages[name], "main", values)
    expected = jax.jit(lambda t5, *given: t5(*given))(network(tiny_model, "t5"), ids, mask)
    np.testing.assert_allclose(values["caption_BLE"], expected, **EQUAL)


@pytest.mark.parametrize("variant", ["full", "merged"])
def test_transformer_stages_are_the_network_on_both_rows(tiny_model, stages, variant):
    stdit3 = network(tiny_model, "stdit3")
    frames, rows, columns = SIZE.latents(CONFIG.vae)
    length = CONFIG.stdit3.model_max_length
    z, caption = random(1, frames, rows, columns, 4), random(1, length, CONFIG.stdit3.caption_channels, seed=1)
    mask, frame_mask = (np.arange(length) < 7)[None], (np.arange(frames) > 0)[None]
    conditions = {"fps_B": np.float32([24]), "height_px_B": np.float32([SIZE.height]), "width_px_B": np.float32([SIZE.width])}
    values: dict[str, Any] = conditions | {"z_BTHWC": z, "t_B": np.float32([700]), "caption_BLE": caption}
    values |= {"mask_BL": mask.astype(np.float32), "frame_mask_BT": frame_mask.astype(np.float32)}
    for name in [name for name in stages if name.startswith("stdit3")]:
        values = run(tiny_model, stages[name], variant if "pair" in name else "main", values)
    merge = Merge() if variant == "merged" else None
    both = (
        *(np.concatenate([x, x]) for x in (z, np.float32([700]))),
        np.concatenate([caption, np.asarray(stdit3.embed.y_embedder.y_embedding[...])[None]]),
    )
    forward = jax.jit(lambda stdit3, given, options: stdit3(*given, **options, merge=merge))
    expected = forward(stdit3, (*both, mask), conditions | {"frame_mask_BT": np.tile(frame_mask, (2, 1))})
    np.testing.assert_allclose(values["v_RTHWC"], expected[..., :4], **EQUAL)


@pytest.mark.artefacts
@pytest.mark.slow
def test_codec_stages_are_the_chunked_codec(tiny_model, stages):
    vae = network(tiny_model, "vae")
    frames, rows, columns = SIZE.latents(CONFIG.vae)
    z = random(1, frames, rows, columns, 4)
    decoded: list[Any] = []
    for start, stop, length in ((0, 5, 17), (5, 6, 3)):
        values = run(tiny_model, stages["vae_temporal_decoder"], f"frames_{length}", {"z_BTHWC": z[:, start:stop]})
        each = np.split(np.asarray(values["x_BtHWC"]), length, axis=1)
        decoded += [run(tiny_model, stages["vae_spatial_decoder"], "main", {"x_BtHWC": x})["frames_Bthw3"] for x in each]
    video = np.concatenate(decoded, axis=1)
    np.testing.assert_allclose(video, jax.jit(lambda vae, z: vae.decode(z, SIZE.num_frames))(vae, z), **EQUAL)
    encode = stages["vae_spatial_encoder"]
    x = [run(tiny_model, encode, "main", {"frames_Bthw3": video[:, i : i + 1]})["x_BtHWC"] for i in range(17)]
    values = run(tiny_model, stages["vae_temporal_encoder"], "frames_17", {"x_BtHWC": np.concatenate(x, axis=1)})
    np.testing.assert_allclose(values["z_BTHWC"], jax.jit(lambda vae, v: vae.encode(v))(vae, video[:, :17]), **EQUAL)


def test_sizes_share_a_function_where_shapes_agree():
    wide = Size(num_frames=20, height=16, width=48)
    long = Size(num_frames=34, height=16, width=32)
    stages = {stage.name: stage for stage in list_stages(CONFIG, [SIZE, wide, long])}
    names = {name: [function.name for function in stage.functions] for name, stage in stages.items()}
    assert names["t5_block_00"] == ["main"]
    assert names["stdit3_pair_00"] == ["full", "merged", *(f"{v}_{s.key}" for s in (wide, long) for v in ("full", "merged"))]
    assert names["vae_spatial_decoder"] == ["main", "main_20x16x48"]
    assert stages["vae_temporal_decoder"].function("frames_17").sizes == (SIZE.key, long.key)
    assert "frame_mask_BT" not in stages["stdit3_front"].function("main").inputs


def test_listed_sizes_need_not_be_multiples():
    """Open-Sora's own 426 x 240: 53 rows of latents, the last of which is half a patch."""
    listed = Size(num_frames=17, height=426, width=240)
    stages = {stage.name: stage for stage in list_stages(CONFIG, [listed])}
    assert stages["stdit3_pair_00"].function("full").inputs["x_RTSD"].shape[1:3] == (5, 27 * 15)
    assert stages["stdit3_final"].function("main").outputs["v_RTHWC"].shape[1:4] == (5, 53, 30)
    assert stages["vae_spatial_decoder"].function("main").outputs["frames_Bthw3"].shape[2:4] == (424, 240)


def test_changed_bytes_are_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    network = open_network(tmp_path / "model", "t5")
    path = network.chunk_path("final.scale")
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    final = list_stages(CONFIG, [SIZE], parts=("t5",))[-1]
    with pytest.raises(
        ModelDirectoryError,
        match=r"t5 layer final: parameter file .* does not have the checksum that network\.json records; convert t5",
    ):
        load_parameters(network, final)


@pytest.mark.parametrize(
    ("size", "parts", "message"),
    [
        (Size(num_frames=17, height=24, width=32), ("t5",), "height 24 is not a multiple of 16"),
        (SIZE, ("decoder",), "stages decoder cannot be exported"),
        (SIZE, (), "stages none cannot be exported"),
    ],
)
def test_what_the_model_cannot_make_is_refused(size, parts, message):
    with pytest.raises(ValueError, match=message):
        list_stages(CONFIG, [size], parts=parts)
