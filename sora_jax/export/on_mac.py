"""What lies beside Core ML packages and Core AI assets for somebody with a Mac: a script that compiles, and one that verifies.

Invariant: both files say at their top that they were never run; nothing here runs them.
"""

import shutil
from pathlib import Path

from sora_jax.export import verify_on_mac
from sora_jax.export.entries import TargetName

VERIFY_FILE, COMPILE_FILE = "verify_on_mac.py", "compile.sh"
_COMMANDS: dict[TargetName, tuple[str, str]] = {
    "coreml": ("mlpackage", 'xcrun coremlcompiler compile "$program" compiled'),
    "coreai": (
        "aimodel",
        'xcrun coreai-build compile "$program" --output compiled --platform iOS --preferred-compute neural-engine',
    ),
}


def write(folder: Path, target: TargetName) -> None:
    """Writes both files into an export of a target that runs on Apple's devices; nothing for other targets."""
    if target not in _COMMANDS:
        return
    suffix, command = _COMMANDS[target]
    lines = (
        "#!/bin/sh",
        "# NEVER RUN SO FAR.  Compiles every program of this folder on a Mac with Xcode, into the folder compiled.",
        "set -eu",
        'cd "$(dirname "$0")"',
        "mkdir -p compiled",
        f"for program in *.{suffix}; do",
        f"  {command}",
        "done",
    )
    (folder / COMPILE_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / COMPILE_FILE).chmod(0o755)
    shutil.copyfile(verify_on_mac.__file__, folder / VERIFY_FILE)
