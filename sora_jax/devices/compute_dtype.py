"""Which dtype a device computes in where nobody names one, and whether this processor multiplies bfloat16.

Invariant: on a CPU the answer is float32 whatever the processor can do, so that the same command makes the same clip on every
machine without an accelerator.  bfloat16 has to be asked for by name there.
"""

from pathlib import Path

from sora_jax.devices.names import AUTO

_HALF_PLATFORMS = ("gpu", "tpu")
_CPU_INFORMATION = Path("/proc/cpuinfo")
_FLAGS = {"flags": {"avx512_bf16", "amx_bf16"}, "Features": {"bf16"}}  # of x86 and of Arm


def choose_dtype(dtype: str, *, platform: str) -> str:
    """Returns the compute dtype that a name stands for on a platform: ``auto`` is bfloat16 on a GPU or TPU, else float32."""
    if dtype != AUTO:
        return dtype
    return "bfloat16" if platform in _HALF_PLATFORMS else "float32"


def multiplies_bfloat16(information: Path = _CPU_INFORMATION) -> bool | None:
    """Returns whether the processor has products of bfloat16, by its flags; None where the system lists none."""
    try:
        lines = information.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in _FLAGS:
            return bool(_FLAGS[name.strip()] & set(flags.split()))
    return None


def dtype_note(dtype: str, *, platform: str) -> str:
    """Returns what a user who asks for a dtype by name should know; empty: nothing."""
    if dtype == "bfloat16" and platform == "cpu" and multiplies_bfloat16() is False:
        return "this processor has no products of bfloat16, so bfloat16 may take longer than float32."
    return ""
