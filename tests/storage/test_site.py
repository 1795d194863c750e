"""A network read from a server: the bits of the folder, no more requests than needed, and one line for whatever goes wrong."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_jax.storage import arrays, checksums, site
from sora_jax.storage.checkpoint import load_network, save_network
from sora_jax.storage.directory import Manifest, ModelDirectoryError, open_network, present_networks
from sora_jax.storage.fetched import FetchedPiece
from sora_jax.storage.location import Address, local_path, location_of
from sora_jax.storage.pieces import pieces_of
from sora_jax.storage.reader import Reader, Stopped
from tests.support.http_server import NUM_RETRIES, Handler, Request, Site, impatient, serving
from tests.support.stored import as_format_1
from tests.support.tiny_model import CONFIG, random_flat

__all__ = ["impatient"]  # a fixture
pytestmark = pytest.mark.usefixtures("impatient")

TABLE = "embed.embedding"  # 128 rows, of many blocks here
SMALL = "block.0.attn_norm.scale"  # one block


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK_BYTES", 512)
        directory = tmp_path_factory.mktemp("original")
        save_network(directory, "t5", CONFIG.t5, random_flat("t5"))
    return directory


@pytest.fixture
def served(original: Path, tmp_path: Path) -> Iterator[Site]:
    """A site of a copy, which a test may damage."""
    with serving(shutil.copytree(original, tmp_path / "model")) as found:
        yield found


@pytest.fixture
def manifest(served: Site) -> Manifest:
    return open_network(served.url, "t5")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    sha256 = checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda raw: (sizes.append(len(raw)), sha256(raw))[1])
    return sizes


def file_of(served: Site, name: str) -> Path:
    return local_path(open_network(served.folder, "t5").chunk_path(name))


@pytest.mark.parametrize(("dtype", "format_version"), [("float32", 1), ("float32", 2), ("bfloat16", 2), ("int8", 2)])
def test_a_network_has_the_bits_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, format_version: int
) -> None:
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 512)
    manifest = save_network(tmp_path, "t5", CONFIG.t5, random_flat("t5"), dtype=dtype)
    manifest = as_format_1(manifest) if format_version == 1 else manifest
    config, expected = load_network(tmp_path, "t5")
    with serving(tmp_path) as served:
        found_config, found = load_network(served.url, "t5")
    assert (found_config, found.keys()) == (config, expected.keys())
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert not found[name].flags.writeable
    # A request for every piece, one for the index of several, and network.json; no byte is fetched twice.
    pieces = {name: len(pieces_of(parameter)) for name, parameter in manifest.parameters.items()}
    indices = sum(count > 1 for count in pieces.values()) if format_version == 2 else 0
    assert len(served.requests) == 1 + sum(pieces.values()) + indices
    stored = sum(local_path(manifest.chunk_path(name)).stat().st_size for name in manifest.parameters)
    assert served.bytes_of("/c/") == stored


def test_only_what_is_wanted_is_fetched(served: Site, manifest: Manifest) -> None:
    reader, size = Reader(manifest), manifest.parameters[TABLE].block_bytes
    assert [request.path for request in served.requests] == ["t5/network.json"]
    reader.arrays(manifest.names("block.0"))
    assert {request.path.split("/")[1] for request in served.requests[1:]} == {"block.0"}
    served.requests.clear()
    expected = random_flat("t5")[TABLE]
    ids = np.array([[3, 127, 3], [0, 5, 127]])
    np.testing.assert_array_equal(reader.rows(TABLE, ids), expected[ids])
    blocks = {row * 16 * 4 // size for row in (0, 3, 5, 127)}
    assert len(manifest.parameters[TABLE].blocks) > len(blocks)
    assert served.bytes_of("embedding/c/") == len(blocks) * size + 16 * len(manifest.parameters[TABLE].blocks)


def test_a_file_in_another_order_is_read_by_its_index(served: Site, manifest: Manifest) -> None:
    path, size, count = file_of(served, TABLE), manifest.parameters[TABLE].block_bytes, len(manifest.parameters[TABLE].blocks)
    raw = path.read_bytes()
    blocks = [raw[block * size : (block + 1) * size] for block in range(count)]
    index = b"".join(((count - 1 - block) * size).to_bytes(8, "little") + size.to_bytes(8, "little") for block in range(count))
    path.write_bytes(b"".join(reversed(blocks)) + index)
    np.testing.assert_array_equal(Reader(manifest).arrays([TABLE])[TABLE], random_flat("t5")[TABLE])


def test_a_checksum_is_compared_once_for_each_state_that_the_server_tells(
    served: Site, manifest: Manifest, hashed: list[int]
) -> None:
    size = manifest.parameters[TABLE].nbytes
    for _ in range(2):
        Reader(manifest).arrays([TABLE])
    assert sum(hashed) == size
    path = file_of(served, TABLE)
    path.write_bytes(path.read_bytes() + bytes(1))  # another ETag, and the same array
    Reader(manifest).arrays([TABLE])
    assert sum(hashed) == 2 * size
    served.etags = False
    for _ in range(2):
        Reader(manifest).arrays([TABLE])
    assert sum(hashed) == 4 * size


def answer(status: int) -> Callable[[Handler, Request], bool]:
    def fault(handler: Handler, request: Request) -> bool:
        if "embedding" in request.path:
            handler.send(status, b"a page\nof several lines")
        return "embedding" in request.path

    return fault


def reset(handler: Handler, request: Request) -> bool:
    if "embedding" in request.path:
        handler.reset()
    return "embedding" in request.path


def cut_off(handler: Handler, request: Request) -> bool:
    """Announces more bytes than come."""
    if "embedding" in request.path:
        handler.send(206, b"1234", {"Content-Range": f"bytes 0-{request.num_bytes - 1}/100000"}, length=request.num_bytes)
        handler.close_connection = True
    return "embedding" in request.path


def stall(handler: Handler, request: Request) -> bool:
    """Answers after longer than a connection may stand still."""
    if "embedding" in request.path:
        threading.Event().wait(4)
    return False


def ignore_ranges(handler: Handler, request: Request) -> bool:
    if "embedding" in request.path:
        handler.send(200, bytes(1 << 14))
    return "embedding" in request.path


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


AGAIN = "copy the network there again from a folder that convert verify accepts"
RETRY = "check the network and the server, and run the same command again"
ON_THE_WAY: dict[str, tuple[Callable[[Handler, Request], bool], str]] = {
    "404": (answer(404), f"is missing; {AGAIN}"),
    "403": (answer(403), r"cannot be read \(access denied, HTTP 403\); check the address and the credentials"),
    "500": (answer(500), rf"cannot be read \(Internal Server Error, HTTP 500\); {RETRY}"),
    "503": (answer(503), rf"cannot be read \(Service Unavailable, HTTP 503\); {RETRY}"),
    "reset": (reset, rf"cannot be read \(Failure when receiving data .*\); {RETRY}"),
    "cut off": (cut_off, rf"cannot be read \(Transferred a partial file.*\); {RETRY}"),
    "stalled": (stall, rf"cannot be read \(Timeout was reached.*too slow.*\); {RETRY}"),
    "no ranges": (ignore_ranges, r"cannot be read \(the server ignores range requests\); serve it by one that answers them"),
}
IN_THE_FILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, f"is missing; {AGAIN}"),
    "truncated": (truncate, rf"has \d+ bytes, expected \d+; {AGAIN}"),
    "wrong": (damage, rf"does not have the checksum that network\.json records; {AGAIN}"),
}


def expect_one_line(manifest: Manifest, message: str, read: Callable[[], object]) -> None:
    with pytest.raises(ModelDirectoryError, match=message) as raised:
        read()
    assert str(raised.value).startswith(f"t5 layer embed: parameter file {manifest.path}/embed/embedding/c/0/0 ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("fault", ON_THE_WAY)
def test_what_fails_on_the_way_is_one_line_after_few_requests_and_the_next_call_works(
    served: Site, manifest: Manifest, fault: str
) -> None:
    served.fault, message = ON_THE_WAY[fault]
    served.requests.clear()
    expect_one_line(manifest, message, lambda: Reader(manifest).arrays([SMALL, TABLE]))
    pieces = len(manifest.parameters[TABLE].blocks) + 1  # and the index
    most = 2 * (1 + NUM_RETRIES)  # curl repeats a request whose connection was lost before its answer began
    assert sum("embedding" in request.path for request in served.requests) <= pieces * most
    served.fault = lambda _handler, _request: False
    np.testing.assert_array_equal(Reader(manifest).arrays([TABLE])[TABLE], random_flat("t5")[TABLE])


@pytest.mark.parametrize("fault", IN_THE_FILE)
@pytest.mark.parametrize("what", ["whole", "rows", "verified"])
def test_a_faulty_file_is_one_line_also_where_it_changed_during_the_run(
    served: Site, manifest: Manifest, fault: str, what: str
) -> None:
    reader = Reader(manifest)
    ways: dict[str, Callable[[], object]] = {
        "whole": lambda: reader.arrays([SMALL, TABLE]),
        "rows": lambda: reader.rows(TABLE, np.arange(128)),
        "verified": lambda: reader.verify(TABLE),
    }
    ways[what]()
    change, message = IN_THE_FILE[fault]
    path = file_of(served, TABLE)
    data = path.read_bytes()
    change(path)
    expect_one_line(manifest, message, ways[what])
    path.write_bytes(data)
    ways[what]()


def test_a_slow_server_only_takes_longer(served: Site, manifest: Manifest) -> None:
    def drip(handler: Handler, request: Request) -> bool:
        threading.Event().wait(0.02)
        return False

    served.fault = drip
    np.testing.assert_array_equal(Reader(manifest).arrays([TABLE])[TABLE], random_flat("t5")[TABLE])


def test_a_server_that_fails_once_is_asked_again(served: Site, manifest: Manifest) -> None:
    failed: set[Request] = set()

    def once(handler: Handler, request: Request) -> bool:
        if request in failed:
            return False
        failed.add(request)
        handler.send(503, b"")
        return True

    served.fault = once
    np.testing.assert_array_equal(Reader(manifest).arrays([TABLE])[TABLE], random_flat("t5")[TABLE])


def test_another_network_in_its_place_is_named_as_such(served: Site, manifest: Manifest) -> None:
    other = {name: 2 * array for name, array in random_flat("t5").items()}
    save_network(served.folder, "t5", CONFIG.t5, other, overwrite=True)
    with pytest.raises(
        ModelDirectoryError, match=rf"{served.url}/t5 was replaced .* after it was opened; open the model again"
    ):
        Reader(manifest).arrays([TABLE])


def test_when_one_read_fails_the_others_are_given_up(served: Site, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []
    cancel = FetchedPiece.cancel
    monkeypatch.setattr(FetchedPiece, "cancel", lambda piece: (cancelled.append(piece), cancel(piece)))
    file_of(served, SMALL).unlink()
    with pytest.raises(ModelDirectoryError, match=r"/t5/block\.0/attn_norm\.scale/c/0 is missing"):
        Reader(manifest).arrays([SMALL, TABLE])
    assert len(cancelled) >= len(manifest.parameters[TABLE].blocks)


def test_a_read_that_nobody_wants_any_more_ends_although_the_server_does_not_answer(served: Site, manifest: Manifest) -> None:
    answers, asked = threading.Event(), threading.Event()

    def hang(_handler: Handler, _request: Request) -> bool:
        asked.set()
        answers.wait(20)
        return False

    served.fault = hang
    try:
        with pytest.raises(Stopped):
            Reader(manifest).read({SMALL: np.empty(16, np.float32)}, stop=asked.is_set)
    finally:
        answers.set()


def test_what_a_server_does_not_hold_is_said(served: Site) -> None:
    assert present_networks(served.url) == ["t5"]
    file = f"{served.url}/vae/network.json"
    with pytest.raises(ModelDirectoryError, match=rf"has no vae \({file} is missing\); expected a model directory's address"):
        open_network(served.url, "vae")
    served.fault = answer(200)
    (served.folder / "t5" / "network.json").write_text("<html>")
    with pytest.raises(ModelDirectoryError, match=rf"network\.json is damaged: it is not JSON .*; {AGAIN}"):
        open_network(served.url, "t5")


def test_no_server_is_one_line() -> None:
    with pytest.raises(ModelDirectoryError, match=rf"http://127\.0\.0\.1:9/m/t5/network\.json cannot be read \(.*\); {RETRY}"):
        open_network("http://127.0.0.1:9/m", "t5")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://host:81/a/b/", Address("https://host:81/a/b")),
        ("gs://bucket/a", Address("gs://bucket/a")),
        ("s3://bucket", Address("s3://bucket")),
        (Path("http://host/a"), Address("http://host/a")),  # a path has lost one slash
        ("models/a", Path("models/a")),
        ("C:/a", Path("C:/a")),
    ],
)
def test_names_of_places(name: str | Path, expected: Path | Address) -> None:
    assert location_of(name) == expected
    assert location_of(expected) == expected


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a", "ftp://host/a has the scheme 'ftp'; models are read from http, https, gs, s3 and folders"),
        ("https://me:secret@host/a", "https://host/a comes with a user, a query or a fragment"),
        ("https://host/a?token=secret", "https://host/a comes with a user, a query or a fragment"),
        ("http:///a", "names no host; expected http://HOST/PATH"),
        ("s3:///a", "names no bucket; expected s3://BUCKET/PATH"),
    ],
)
def test_urls_that_no_model_is_read_from(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        location_of(url)
    assert "secret" not in str(raised.value)


def test_what_needs_a_folder_refuses_an_address(tmp_path: Path, served: Site, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=rf"^{served.url} lies on a network; this needs a folder on this machine"):
        save_network(served.url, "t5", CONFIG.t5, {})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"aws_credentials": {"type": "anonymous"}}),
        (
            {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "eu"},
            {"aws_credentials": {"type": "environment"}, "aws_region": "eu"},
        ),
        (
            {"AWS_PROFILE": "me", "AWS_ENDPOINT_URL": "http://host"},
            {"aws_credentials": {"type": "profile", "profile": "me"}, "endpoint": "http://host"},
        ),
    ],
)
def test_buckets_are_asked_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: dict[str, Any]
) -> None:
    for name in ("ACCESS_KEY_ID", "PROFILE", "REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT_URL_S3"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert site._kvstore(Address("s3://bucket/a/b")) == {"driver": "s3", "bucket": "bucket", "path": "a/b/", **expected}
    assert site._kvstore(Address("gs://bucket/a")) == {"driver": "gcs", "bucket": "bucket", "path": "a/"}


def test_a_manifest_says_where_it_lies(served: Site, manifest: Manifest) -> None:
    assert dataclasses.replace(manifest, path=served.folder / "t5") == open_network(served.folder, "t5")
    assert json.loads(manifest.text()) == json.loads((served.folder / "t5" / "network.json").read_text())
