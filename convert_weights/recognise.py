"""Names what a file is that was taken for weights or a tokenizer: what failed downloads and forgotten steps leave behind.

Invariant: only the first bytes are looked at, and a file is named only where they leave no doubt.  Nothing is read further.
"""

from collections.abc import Callable

HEAD_BYTES = 512

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def what_is(head: bytes) -> str | None:
    """Returns what a file is that begins with ``head``, and what to do, or None where that is not clear."""
    if not head:
        return "is empty; download it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((answer for matches, answer in _KINDS if matches(head, text)), None)


def _starts(*prefixes: bytes) -> Callable[[bytes, bytes], bool]:
    return lambda head, text: head.startswith(prefixes)


_KINDS: tuple[tuple[Callable[[bytes, bytes], bool], str], ...] = (
    (
        lambda head, text: text.startswith(b"version https://git-lfs"),
        "is a git-LFS pointer, not the file itself; fetch it with: git lfs pull",
    ),
    (
        lambda head, text: text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")),
        "is an HTML page; the download gave an error or a login page",
    ),
    (lambda head, text: text.startswith(b"<?xml"), "is an XML document; the download gave an error message"),
    (_starts(b"\x1f\x8b"), "is a gzip archive; unpack it first"),
    (_starts(b"\x28\xb5\x2f\xfd"), "is a zstandard archive; unpack it first"),
    (_starts(b"7z\xbc\xaf\x27\x1c"), "is a 7-Zip archive; unpack it first"),
    (_starts(b"\x89HDF\r\n"), "is an HDF5 file; save the state dict as safetensors"),
    (_starts(b"GGUF"), "is a GGUF file; give it a name that ends in .gguf"),
    (_starts(_LEGACY_TORCH), "is not in PyTorch's zip format; files from before PyTorch 1.6 must be saved again"),
    (lambda head, text: len(head) == HEAD_BYTES and not any(head), "holds zeros where its header should be; download it again"),
)
