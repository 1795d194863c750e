"""Files of an export: verified before they are read, inside the folder, and once for each identity."""

import os
import shutil
from pathlib import Path

import pytest

from sora_jax.export import contents as module
from sora_jax.export.contents import Contents, ExportFileError, file_sha256


def listed(folder: Path) -> Contents:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Contents(folder, files)


@pytest.fixture
def contents(tmp_path: Path) -> Contents:
    folder = tmp_path / "out"
    (folder / "package").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / "package" / "model").write_bytes(b"model")
    return listed(folder)


def flip(path: Path, at: int = 7) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(bytes(data))


def test_a_file_as_it_was_written_is_handed_out(contents):
    assert contents.path("weights") == contents.folder / "weights"
    with contents.reading("weights") as path:
        assert path.read_bytes() == bytes(range(256))
    assert contents.package("package") == contents.folder / "package"
    contents.check_sizes()


def test_a_flipped_bit_is_refused_also_after_a_first_use(contents):
    contents.path("weights")
    flip(contents.folder / "weights")
    contents.check_sizes()  # the size is the same
    with pytest.raises(ExportFileError, match=r"weights has other bytes than recorded \(sha256\); copy the whole folder again"):
        contents.path("weights")
    flip(contents.folder / "package" / "model")
    with pytest.raises(ExportFileError, match=r"package/model has other bytes than recorded"):
        contents.package("package")


def test_a_file_is_hashed_once_as_long_as_it_is_the_same(contents, monkeypatch):
    hashed = []
    module._sha256.cache_clear()
    monkeypatch.setattr(module, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    for _ in range(3):
        contents.path("weights")
    assert hashed == ["weights"]
    copy = contents.folder / "copy"
    shutil.copyfile(contents.folder / "weights", copy)
    os.replace(copy, contents.folder / "weights")  # the same bytes, another file
    contents.path("weights")
    assert hashed == ["weights", "weights"]


def test_a_change_while_the_body_reads_is_refused(contents):
    with pytest.raises(ExportFileError, match="weights was changed while it was being read"):
        with contents.reading("weights") as path:
            flip(path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a//b", "./weights", "", "a\\b", "C:weights", "a\x1b[31m", "a/../b"]
)
def test_a_path_never_leaves_the_folder(contents, name):
    (contents.folder.parent / "secret").write_text("secret")
    with pytest.raises(ExportFileError, match="expected a plain path inside the exported folder") as refused:
        contents.path(name)
    assert "\x1b" not in str(refused.value)


def test_neither_does_a_link(contents):
    outside = contents.folder.parent / "outside"
    (contents.folder / "weights").rename(outside)
    (contents.folder / "weights").symlink_to(outside)
    with pytest.raises(ExportFileError, match="weights is a link that leaves the exported folder"):
        contents.path("weights")


def test_what_is_not_listed_is_not_read(contents):
    (contents.folder / "more").write_bytes(b"x")
    with pytest.raises(ExportFileError, match="more is not among the files that the manifest lists"):
        contents.path("more")
    (contents.folder / "package" / "more").write_bytes(b"x")
    with pytest.raises(ExportFileError, match="package/more is not among the files"):
        contents.package("package")
    with pytest.raises(ExportFileError, match="absent is missing, or no folder"):
        contents.package("absent")


def test_a_missing_or_cut_file_and_a_pipe_are_named(contents):
    (contents.folder / "weights").write_bytes(b"cut")
    with pytest.raises(ExportFileError, match="weights has 3 bytes, expected 256"):
        contents.check_sizes()
    (contents.folder / "weights").unlink()
    with pytest.raises(ExportFileError, match="weights is missing"):
        contents.check_sizes()
    os.mkfifo(contents.folder / "weights")
    with pytest.raises(ExportFileError, match="weights is not a regular file"):
        contents.check_sizes()
