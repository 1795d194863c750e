"""Caption features on disk: used only for the same parameters, dtype and tokens, and only if they are whole."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sora_jax.commands.user_cache import caption_folder
from sora_jax.pipeline.caption_cache import CaptionCache
from sora_jax.pipeline.coders import Coders
from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.open_model import Networks
from sora_jax.pipeline.pipeline import Pipeline
from sora_jax.process import Timings
from sora_jax.storage.directory import open_network

pytestmark = pytest.mark.usefixtures("little_optimised")

IDS = np.array([3, 7, 1, 0], np.int32)
PROMPT = "a red circle moves right on a blue background"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_features_come_back_bit_for_bit_and_only_for_the_same_key(tmp_path: Path, dtype: type) -> None:
    cache, features = CaptionCache(tmp_path / "new"), np.random.default_rng(0).standard_normal((4, 6)).astype(dtype)
    assert cache.find("model", "float32", IDS) is None
    cache.keep("model", "float32", IDS, features)
    found = cache.find("model", "float32", IDS)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, features)
    assert cache.find("other", "float32", IDS) is None
    assert cache.find("model", "bfloat16", IDS) is None
    assert cache.find("model", "float32", IDS + 1) is None
    assert cache.find("model", "float32", np.append(IDS, 0).astype(np.int32)) is None


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "folder", "no header"])
def test_a_damaged_entry_is_none(tmp_path: Path, damage: str) -> None:
    cache = CaptionCache(tmp_path)
    cache.keep("model", "float32", IDS, np.ones((4, 6), np.float32))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {"truncated": data[:-8], "changed": data[:-1] + b"\x01", "empty": b"", "no header": b"{}\n" + data[-96:]}[damage]
        )
    assert cache.find("model", "float32", IDS) is None


def test_the_entries_used_last_stay_when_the_folder_is_full(tmp_path: Path) -> None:
    cache = CaptionCache(tmp_path, max_bytes=1500)
    for at in range(3):
        cache.keep("model", "float32", IDS + at, np.full((4, 20), at, np.float32))  # 450 bytes each, with their header
        os.utime(max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns), ns=(at, at))
    assert cache.find("model", "float32", IDS) is not None  # used now
    cache.keep("model", "float32", IDS + 3, np.full((4, 20), 3, np.float32))
    held = [cache.find("model", "float32", IDS + at) is not None for at in range(4)]
    assert held[0]
    assert held[3]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1500


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    cache = CaptionCache(tmp_path / "file" / "folder")
    cache.keep("model", "float32", IDS, np.ones((4, 6), np.float32))
    assert cache.find("model", "float32", IDS) is None
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("budget", [None, 10**10])
def test_the_text_encoder_is_not_touched_for_captions_that_are_known(
    tiny_model: Path, tmp_path: Path, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = Networks.open(ModelFile.read(tiny_model).manifests, keep=False, budget=budget)
    networks.caption_cache = CaptionCache(tmp_path)
    coders = Coders(networks, "float32", Timings(), None)
    ids, mask = np.tile(np.arange(12, dtype=np.int32), (2, 1)), np.ones((2, 12), bool)
    ids[1] = ids[1][::-1]
    first = coders.encode_text(ids[:1], mask[:1])
    calls = []
    encode = Coders._encode_text
    monkeypatch.setattr(Coders, "_encode_text", lambda self, ids, mask: calls.append(len(ids)) or encode(self, ids, mask))
    np.testing.assert_array_equal(coders.encode_text(ids[:1], mask[:1]), first)
    assert calls == []
    both = coders.encode_text(ids, mask)
    np.testing.assert_array_equal(both[:1], first)
    assert calls == [1]
    assert len(list(tmp_path.iterdir())) == 2
    assert open_network(tiny_model, "t5").parameters  # the model itself was not written to


def test_the_pipeline_and_the_command_take_a_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Pipeline.from_pretrained(tiny_model).networks.caption_cache is None
    assert Pipeline.from_pretrained(tiny_model, caption_cache=tmp_path).networks.caption_cache.folder == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caption_folder("off") is None
    assert caption_folder(None) == tmp_path / "sora_jax" / "captions"
    assert caption_folder("here") == Path("here")
