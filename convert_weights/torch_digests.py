"""Prints the checksums of the tensors in a PyTorch or safetensors file as PyTorch reads them; a program of its own.

``convert verify --source`` runs it in a child process where PyTorch is installed: a reader that shares nothing with ours.
Invariant: one line of JSON for each tensor (name, dtype, shape, sha256 of its bytes in C order), and a few MB of memory besides
what PyTorch needs.  It imports nothing of this package, so that it can be run from its file.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

_SLICE_BYTES = 4 << 20


def main() -> None:
    """Reads the path and, if any, the state dict's name from the command line."""
    path, section = (*sys.argv[1:], "")[:2]
    torch: Any = importlib.import_module("torch")  # never a part of the package's own process
    for name, tensor in _tensors(torch, path, section):
        digest = hashlib.sha256()
        rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
        row_bytes = rows[0].numel() * rows.element_size() if rows.numel() else 0
        step = max(1, _SLICE_BYTES // max(row_bytes, 1))
        for start in range(0, len(rows) if rows.numel() else 0, step):
            digest.update(rows[start : start + step].contiguous().reshape(-1).view(torch.uint8).numpy().data)
        fields = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest.hexdigest()]
        sys.stdout.write(json.dumps(fields) + "\n")


def _tensors(torch: Any, path: str, section: str) -> Iterator[tuple[str, Any]]:
    if path.endswith(".safetensors"):
        with importlib.import_module("safetensors").safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                yield name, file.get_tensor(name)
        return
    tree = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    yield from (tree[section] if section else tree).items()


if __name__ == "__main__":
    main()
