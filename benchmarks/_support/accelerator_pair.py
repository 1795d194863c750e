"""A pair of blocks in several forms of attention and in PyTorch, timed alternately after their outputs were compared.

Invariant: a candidate that cannot run stands in the result with the reason; a whole evaluation of PyTorch is never measured,
only called 28 times its pair.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._support.accelerator_work import Arrays, Work, compiled_pair, pair_arrays, peak_flop_per_s, relative_l2
from benchmarks._support.interleaved import interleaved

PAIRS = 28  # of the released network


def measure_pair(work: Work, dtype: str, forms: tuple[str, ...], *, repeats: int, rival: bool) -> dict[str, Any]:
    """Returns what each candidate took, its operations a second, and its distance from the first."""
    arrays = pair_arrays(work)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for form in forms:
        start = time.perf_counter()
        try:
            runs[form] = compiled_pair(work, arrays, dtype=dtype, attention=form)
            found[form] = {"compile_s": round(time.perf_counter() - start, 2)}
        except (ValueError, RuntimeError) as error:  # not here, a library is missing, or too large for the card
            found[form] = {"left_out": str(error)[:300]}
    ours = list(runs)
    if rival:
        runs |= _torch_runs(arrays, dtype, found)
    expected = _host(runs[ours[0]]())
    for name, run in runs.items():
        found[name]["rel_l2"] = relative_l2(_host(run()), expected)
    for name, seconds in interleaved(runs, repeats).items():
        found[name] |= times(seconds, work.pair_flop(), dtype)
        if name not in ours:
            found[name]["evaluation_s_as_28_pairs"] = round(PAIRS * found[name]["median_s"], 4)
    compiled, best = found.get("torch compiled", {}).get("median_s"), min(found[name]["median_s"] for name in ours)
    gain = {"times_faster_than_torch_compiled": round(compiled / best, 3)} if compiled else {}
    return {"tokens": 2 * work.frames * work.places, "dtype": dtype, "candidates": found, **gain}


def times(seconds: list[float], flop: float, dtype: str) -> dict[str, Any]:
    """Returns median and minimum, operations a second, and the share of the card's peak where that is known."""
    median = statistics.median(seconds)
    peak = peak_flop_per_s(jax.devices()[0].device_kind, dtype)
    share = {} if peak is None else {"share_of_peak": round(flop / median / peak, 3)}
    return {
        "median_s": round(median, 6),
        "min_s": round(min(seconds), 6),
        "tflop_per_s": round(flop / median / 1e12, 3),
        **share,
    }


def _torch_runs(arrays: Arrays, dtype: str, found: dict[str, dict[str, Any]]) -> dict[str, Callable[[], Any]]:
    """Returns PyTorch's pair, eager and compiled, on the card if PyTorch sees one; what it lacks goes into ``found``."""
    try:
        import torch  # noqa: TID251  # the rival

        from benchmarks._support.torch_pair import to_torch, torch_pair
    except ModuleNotFoundError as error:
        found["torch"] = {"left_out": f"needs the package {error.name}"}
        return {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flats, inputs = arrays
    weights = {
        kind: {name: to_torch(jnp.asarray(value, dtype)).to(device) for name, value in flat.items()}
        for kind, flat in flats.items()
    }
    given = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
    given |= {name: given[name].to(getattr(torch, dtype)) for name in ("x", "caption")}

    def run(pair: Callable[..., Any]) -> Callable[[], Any]:
        def once() -> Any:
            with torch.no_grad():
                out = pair(weights, given)
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        return once

    runs = {"torch eager": run(torch_pair), "torch compiled": run(torch.compile(torch_pair))}
    for name, once in list(runs.items()):
        start = time.perf_counter()
        try:
            once()
            found[name] = {"device": device, "version": torch.__version__, "first_s": round(time.perf_counter() - start, 2)}
        except Exception as error:  # no compiler for it, or not enough memory: the other rival stays
            found[name] = {"left_out": f"{type(error).__name__}: {str(error)[:300]}"}
            del runs[name]
    return runs


def _host(x: Any) -> np.ndarray:
    return x.float().cpu().numpy() if hasattr(x, "cpu") else np.asarray(x, np.float32)
