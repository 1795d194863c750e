"""Text encoder and autoencoder run from their files: the numbers of the networks in memory, chunk by chunk."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from sora_jax.config import FLOAT32
from sora_jax.networks.t5 import T5Encoder
from sora_jax.networks.vae.codec import VAE
from sora_jax.process import Timings
from sora_jax.storage.checkpoint import load_network, save_network, unflatten
from sora_jax.storage.directory import Manifest, ModelDirectoryError
from sora_jax.streaming import host_loop
from sora_jax.streaming.profile import Profile
from sora_jax.streaming.segment_loop import SegmentLoop
from tests.support.tiny_model import CONFIG, random_flat

pytestmark = pytest.mark.usefixtures("little_optimised")

T5 = dataclasses.replace(CONFIG.t5, num_layers=3)
IDS = np.random.default_rng(0).integers(0, 128, (2, 12)).astype(np.int32)
MASK = np.arange(12) < np.array([[5], [12]])
REL_L2 = 1e-6  # float32 rounding, where programs of other extent fuse other operations


def rel_l2(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


def open_loop(manifest: Manifest, num_slots: int = 2) -> SegmentLoop:
    return SegmentLoop(manifest, FLOAT32, Timings(), num_slots=num_slots)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_text_features_are_those_of_the_encoder_in_memory(tmp_path: Path, dtype: str) -> None:
    manifest = save_network(tmp_path, "t5", T5, random_flat("t5", T5), dtype=dtype)
    abstract = jax.eval_shape(lambda: T5Encoder(T5, rngs=nnx.Rngs(0)))
    resident = unflatten(abstract, load_network(tmp_path, "t5")[1])
    expected = jax.jit(lambda network, ids, mask: network(ids, mask))(resident, IDS, MASK)
    loop = open_loop(manifest)
    features = host_loop.encode_text(loop, IDS, MASK)
    error = rel_l2(features, expected)
    assert error <= REL_L2, f"relative L2 {error:.2e}"
    np.testing.assert_array_equal(features, host_loop.encode_text(open_loop(manifest, num_slots=1), IDS, MASK))
    assert set(loop.timings) == {"load", "compile", "text"}
    assert not [thread for thread in threading.enumerate() if thread.name == "layer-reader"]


def test_a_profile_has_every_segment_once_in_each_lane_and_reads_can_be_watched(tmp_path: Path) -> None:
    manifest, profile, watched = save_network(tmp_path, "t5", T5, random_flat("t5", T5)), Profile(), {}

    @contextlib.contextmanager
    def around(segment: str, num_bytes: int) -> Iterator[None]:
        watched[segment] = num_bytes
        yield

    loop = SegmentLoop(manifest, FLOAT32, Timings(), profile=profile, around=around)
    host_loop.encode_text(loop, IDS, MASK)
    segments = [*(f"block.{i}.{half}" for i in range(3) for half in ("attn", "mlp")), "final"]
    for lane in ("load", "wait", "compute"):
        assert [interval.layer for interval in profile.intervals if interval.lane == lane] == segments
    blocks = sum(entry.nbytes for name, entry in manifest.parameters.items() if not name.startswith("embed."))
    assert list(watched) == segments
    assert blocks <= sum(watched.values()) < blocks + 64 * len(manifest.parameters)
    ended = {(interval.lane, interval.layer): interval.end_s for interval in profile.intervals}
    assert all(ended["load", name] <= ended["wait", name] <= ended["compute", name] for name in segments)


def test_a_failure_between_segments_ends_the_reading_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = save_network(tmp_path, "t5", T5, random_flat("t5", T5))
    loop = open_loop(manifest)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host_loop.encode_text(loop, IDS, MASK)
        assert not [thread for thread in threading.enumerate() if thread.name == "layer-reader"]
    manifest.chunk_path("block.2.attn.q.kernel").unlink()
    with pytest.raises(ModelDirectoryError, match=r"t5 layer block\.2: parameter file .* is missing"):
        host_loop.encode_text(loop, IDS, MASK)
    assert not [thread for thread in threading.enumerate() if thread.name == "layer-reader"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, VAE]:
    path = tmp_path_factory.mktemp("vae")
    manifest = save_network(path, "vae", CONFIG.vae, random_flat("vae"))
    abstract = jax.eval_shape(lambda: VAE(CONFIG.vae, rngs=nnx.Rngs(0)))
    return manifest, jax.device_put(unflatten(abstract, load_network(path, "vae")[1]))


@pytest.mark.ci
def test_decoding_is_that_of_the_decoder_in_memory_and_goes_chunk_by_chunk(vae: tuple[Manifest, VAE]) -> None:
    manifest, resident = vae
    z = np.random.default_rng(1).standard_normal((2, 10, 2, 3, 4)).astype(np.float32)
    loop = open_loop(manifest)
    pixels = host_loop.decode(loop, z, 34)
    chunked = np.concatenate([host_loop.decode(loop, z[:, :5], 17), host_loop.decode(loop, z[:, 5:], 17)], axis=1)
    np.testing.assert_array_equal(pixels, chunked)
    for some in ([1, 16, 17, 33], [20]):
        np.testing.assert_allclose(host_loop.decode(loop, z, 34, some), pixels[:, some], atol=1e-5)
    decode = jax.jit(lambda network, z: network.decode_chunk(z, 17))
    expected = np.concatenate([decode(resident, z[:, :5]), decode(resident, z[:, 5:])], axis=1)
    error = rel_l2(pixels, expected)
    assert error <= REL_L2, f"relative L2 {error:.2e}"


@pytest.mark.slow
def test_encoding_is_that_of_the_encoder_in_memory(vae: tuple[Manifest, VAE]) -> None:
    manifest, resident = vae
    video = np.random.default_rng(2).uniform(-1, 1, (1, 6, 16, 24, 3)).astype(np.float32)
    expected = jax.jit(lambda network, video: network.encode(video))(resident, video)
    error = rel_l2(host_loop.encode(open_loop(manifest, num_slots=1), video), expected)
    assert error <= REL_L2, f"relative L2 {error:.2e}"


def test_a_network_that_does_not_fit_its_configuration_is_named(vae: tuple[Manifest, VAE]) -> None:
    manifest, _ = vae
    parameters = {name: entry for name, entry in manifest.parameters.items() if name != "stats.scale"}
    broken = dataclasses.replace(manifest, parameters=parameters)
    with pytest.raises(ModelDirectoryError, match=r"vae does not fit its configuration: stats\.scale is missing"):
        host_loop.decode(open_loop(broken), np.zeros((1, 5, 2, 2, 4), np.float32), 17)


@pytest.mark.parametrize(("num_frames", "pixels"), [(17, 2**16), (17, 2**14), (17, 2**20), (1, 8), (68, 2**13)])
def test_frames_are_taken_in_equal_batches_within_the_limit(num_frames: int, pixels: int) -> None:
    batches = host_loop.frame_batches(num_frames, pixels)
    sizes = [batch.stop - batch.start for batch in batches]
    assert [i for batch in batches for i in range(batch.start, batch.stop)] == list(range(num_frames))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == 1 or max(sizes) * pixels <= host_loop.FRAME_PIXELS
