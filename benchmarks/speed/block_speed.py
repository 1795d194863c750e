"""Time of one pair of STDiT3 blocks at real width, against the same pair in PyTorch, eager and compiled.

Command:  python -m benchmarks.speed.block_speed [--repeats 10] [--frames 5 --height 20 --width 20] [--dtypes float32 bfloat16]
Needs:    torch in addition to the package; about 1 GB of memory; 5 seconds a repeat on two cores, a minute for compiling.
Expect:   float32: PyTorch not faster. bfloat16: at least 1.7 times as fast as PyTorch's float32, and as its bfloat16.
Rival:    `_support.torch_pair`, written with torch.nn.functional (fused attention, fused layer norm), eager and by
          torch.compile (which needs a C++ compiler).

The candidates alternate within each repeat, on the same threads, after their outputs were compared.  Wall time suffers
from whatever else the machine does: read it only where the recorded load is below the number of threads, and CPU seconds
(which include PyTorch's threads waiting for each other) otherwise.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # noqa: TID251  # the rival
from flax import nnx
from torch.nn import functional  # noqa: TID251

from benchmarks._support.machine import environment, write_report
from benchmarks._support.torch_pair import to_torch, torch_pair
from sora_jax.config import BFLOAT16, FLOAT32, open_sora_1_2
from sora_jax.networks.merging import Merge
from sora_jax.networks.stdit3 import Conditioning, STDiT3Block
from sora_jax.storage.checkpoint import flatten, unflatten

CONFIG = open_sora_1_2.stdit3
PRODUCT_ROWS = 2048  # of the matrix product that shows what the cores can do
RESULTS = Path(__file__).parents[1] / "results" / "block_speed.json"
# Relative L2 between the rivals: sums in another order; in bfloat16 also roundings at other places.
AGREEMENT = {"float32": 1e-5, "bfloat16": 3e-2}

Candidate = Callable[[], None]


def main() -> None:
    """Measures what the command line asks for, prints and writes it."""
    options = parse()
    if options.threads:
        os.sched_setaffinity(0, range(options.threads))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = {
        "setting": {name: value for name, value in vars(options).items() if name != "out"},
        "environment": environment(),
        "results": {},
    }
    for dtype in options.dtypes:
        candidates = prepare(options, dtype)
        report["results"][dtype] = measure(candidates, options)
        print(dtype, json.dumps(report["results"][dtype], indent=1))
    report["environment"]["versions"]["torch"] = torch.__version__
    report["load_after"] = environment()["load"]
    write_report(report, options.out)


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="2 is one guided sample")
    parser.add_argument("--frames", type=int, default=5, help="latent frames")
    parser.add_argument("--height", type=int, default=20, help="latent rows")
    parser.add_argument("--width", type=int, default=20, help="latent columns")
    parser.add_argument("--threads", type=int, default=0, help="cores to use; 0 takes all this process may use")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def prepare(options: argparse.Namespace, dtype: str) -> dict[str, Candidate]:
    """Returns the candidates by name, compiled, and checked against each other."""
    policy = {"float32": FLOAT32, "bfloat16": BFLOAT16}[dtype]
    flats = {kind: random_block(kind, policy, seed) for seed, kind in enumerate(("spatial", "temporal"))}
    arrays = random_inputs(options)
    x, conditioning = jax_inputs(arrays, jnp.dtype(dtype))
    plain, merged = (compiled(flats, policy, x, conditioning, rule) for rule in (None, Merge()))
    torch_flats = {kind: {name: to_torch(value) for name, value in flat.items()} for kind, flat in flats.items()}
    torch_arrays = {name: torch.from_numpy(value) for name, value in arrays.items()}
    torch_arrays |= {name: torch_arrays[name].to(getattr(torch, dtype)) for name in ("x", "caption")}
    rivals = {
        "torch": functools.partial(torch_pair, torch_flats, torch_arrays),
        "torch compiled": functools.partial(torch.compile(torch_pair), torch_flats, torch_arrays),
    }
    for name, rival in rivals.items():
        check_agreement(f"{dtype}, {name}", plain(), rival, AGREEMENT[dtype])
    a, b = (jnp.ones(shape, dtype) for shape in ((PRODUCT_ROWS, CONFIG.hidden_size), (CONFIG.hidden_size, CONFIG.mlp_size)))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    torch_a, torch_b = to_torch(a.T), to_torch(b)  # which transposes
    return {
        "jax": lambda: jax.block_until_ready(plain()),
        "jax merged": lambda: jax.block_until_ready(merged()),
        **rivals,
        "jax product": lambda: jax.block_until_ready(product(a, b)),
        "torch product": lambda: functional.linear(torch_a, torch_b),
    }


def check_agreement(name: str, ours: jax.Array, rival: Callable[[], torch.Tensor], limit: float) -> None:
    """Makes sure that a rival computes the same.

    Raises:
      ValueError: it does not.
    """
    with torch.no_grad():
        theirs = rival().float().numpy()
    error = float(np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs))
    if not error < limit:
        raise ValueError(f"{name}: the rivals differ by rel L2 {error:.2e}, expected < {limit:.0e}; nothing was timed.")
    print(f"{name}: rivals agree to rel L2 {error:.1e}", flush=True)


def measure(candidates: dict[str, Candidate], options: argparse.Namespace) -> dict[str, Any]:
    """Returns wall and CPU seconds of the candidates, whose runs alternate, and the operations done in a CPU second."""
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(options.repeats + 1):
        for name, run in candidates.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            with torch.no_grad():
                run()
            if repeat:  # the first round warms caches
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    work = gflop(options)
    return {
        name: {
            "wall_min_s": round(min(wall[name]), 4),
            "wall_median_s": round(statistics.median(wall[name]), 4),
            "cpu_min_s": round(min(cpu[name]), 4),
            "cpu_median_s": round(statistics.median(cpu[name]), 4),
            "gflop": round(work[name], 2),
            "gflop_per_wall_s": round(work[name] / min(wall[name]), 1),
            "gflop_per_cpu_s": round(work[name] / min(cpu[name]), 1),
        }
        for name in candidates
    }


def gflop(options: argparse.Namespace) -> dict[str, float]:
    """Returns the operations of every candidate, 2 for each multiply-add.

    Merging halves the frames of the attentions and their linear maps; MLPs and the captions' keys stay.
    """
    places, captions = -(-options.height // 2) * -(-options.width // 2), CONFIG.model_max_length
    width, frames = CONFIG.hidden_size, options.frames

    def pair(attended: int) -> float:
        mlps = 2 * options.batch * frames * places * 2 * width * CONFIG.mlp_size
        keys = 2 * options.batch * captions * 2 * width**2
        linear = 2 * options.batch * attended * places * 6 * width**2
        products = options.batch * attended * places * 2 * width * (places + attended + 2 * captions)
        return 2 * (mlps + keys + linear + products) / 1e9

    product = 2 * PRODUCT_ROWS * width * CONFIG.mlp_size / 1e9
    return {
        "jax": pair(frames),
        "jax merged": pair(-(-frames // 2)),
        "torch": pair(frames),
        "torch compiled": pair(frames),
        "jax product": product,
        "torch product": product,
    }


def random_block(kind: str, policy: Any, seed: int) -> dict[str, jax.Array]:
    """Returns the parameters of a block, scaled so that activations neither grow nor vanish."""
    shell = jax.eval_shape(lambda: STDiT3Block(CONFIG, temporal=kind == "temporal", policy=policy, rngs=nnx.Rngs(0)))
    generator = np.random.default_rng(seed)
    return {
        name: jnp.asarray(generator.standard_normal(x.shape, np.float32) * x.shape[0] ** -0.5 + ("norm" in name), x.dtype)
        for name, x in flatten(shell).items()
    }


def random_inputs(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns tokens, captions of different lengths, and modulation."""
    generator = np.random.default_rng(7)
    places = -(-options.height // 2) * -(-options.width // 2)
    lengths = np.linspace(40, CONFIG.model_max_length, options.batch).astype(int)
    return {
        "x": generator.standard_normal((options.batch, options.frames, places, CONFIG.hidden_size), np.float32),
        "caption": generator.standard_normal((options.batch, CONFIG.model_max_length, CONFIG.hidden_size), np.float32),
        "mask": np.arange(CONFIG.model_max_length)[None] < lengths[:, None],
        "mod": generator.standard_normal((options.batch, 6, CONFIG.hidden_size), np.float32) * np.float32(0.3),
    }


def jax_inputs(arrays: dict[str, np.ndarray], dtype: Any) -> tuple[jax.Array, Conditioning]:
    """Returns the inputs of our block."""
    conditioning = Conditioning(
        caption_BLD=jnp.asarray(arrays["caption"], dtype),
        mask_BL=jnp.asarray(arrays["mask"]),
        mod_BF6D=jnp.asarray(arrays["mod"])[:, None],
        t_BD=jnp.zeros((len(arrays["x"]), CONFIG.hidden_size)),
        t0_BD=None,
        frame_mask_BT=None,
    )
    return jnp.asarray(arrays["x"], dtype), conditioning


def compiled(
    flats: dict[str, dict[str, jax.Array]], policy: Any, x: jax.Array, conditioning: Conditioning, rule: Merge | None
) -> Callable[[], jax.Array]:
    """Returns the pair as one compiled program, its weights being arguments."""
    shells = {
        kind: jax.eval_shape(
            lambda kind=kind: STDiT3Block(CONFIG, temporal=kind == "temporal", policy=policy, rngs=nnx.Rngs(0))
        )
        for kind in flats
    }

    @jax.jit
    def pair(flats: dict[str, dict[str, jax.Array]], x: jax.Array, conditioning: Conditioning) -> jax.Array:
        for kind in ("spatial", "temporal"):
            x = unflatten(shells[kind], flats[kind])(x, conditioning, merge=rule)
        return x

    start = time.perf_counter()
    program = pair.lower(flats, x, conditioning).compile()
    print(f"compiled {'merged' if rule else 'plain'} pair in {time.perf_counter() - start:.1f} s")
    return lambda: program(flats, x, conditioning)


if __name__ == "__main__":
    main()
