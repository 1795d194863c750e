"""Time of loading a transformer into memory, every byte compared, beside plain reads of the same files.

Command:  python -m benchmarks.speed.load_speed WEIGHTS_DIR
          (writes 1 GB of random weights, 12 blocks of the released width in float32, unless they are there)
Needs:    free cores, 3 GB of memory, files in the page cache (a first round reads them); about a minute.
Expect:   verified over plain at most 1.25 where hashing on all cores is as fast as one core reads; SHA-256 sets the floor: a
          machine whose cores hash together at H GB/s cannot load faster than that, however fast it reads.  On two idle cores
          it is (cpu_seconds of hashing + of known) / 2 over those of plain.
Rival:    ``readinto`` of every file into a fresh array, which compares nothing; tensorstore into a fresh array, a block of rows
          at a time, which compares nothing either; and the same load once the checksums are known.

Rounds are interleaved; files are touched before each verified load, so that what is known of them does not count.
"""

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._support import streaming_model
from benchmarks._support.machine import environment, write_report
from sora_jax.storage.checkpoint import load_parameters
from sora_jax.storage.directory import Manifest, array_location, open_network
from sora_jax.storage.pieces import StoredArray, pieces_of
from sora_jax.storage.place import Folder

RESULTS = Path(__file__).parents[1] / "results" / "load_speed.json"


def main() -> None:
    """Measures what the command line asks for, prints and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    manifest = open_network(streaming_model.write(options.weights, num_blocks=options.blocks), "stdit3")
    report = {
        "setting": {"blocks": options.blocks, "rounds": options.rounds, "gigabytes": round(manifest.nbytes / 1e9, 3)},
        "environment": environment(),
        "result": measured(manifest, options.rounds),
    }
    write_report(report, options.out, show=True)


def measured(manifest: Manifest, rounds: int) -> dict[str, Any]:
    """Returns seconds and ratios of the rivals, interleaved; those of the processor are hardly moved by other load."""
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(manifest),
        "tensorstore": lambda: by_tensorstore(manifest),
        "verified": lambda: load_parameters(manifest),
        "known": lambda: load_parameters(manifest),
        "hashing": lambda: hashed(manifest.nbytes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):  # the first fills the page cache
        for name, run in runs.items():
            if name == "verified":
                touch(manifest)
            began, cpu_began = time.perf_counter(), time.process_time()
            held = run()
            if number:
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - cpu_began)
            del held
    return {
        "seconds": {name: {"min": round(min(s), 3), "median": round(statistics.median(s), 3)} for name, s in seconds.items()},
        "cpu_seconds": {name: round(min(s), 3) for name, s in processor.items()},  # all threads together
        "verified_over_plain": ratio(seconds["verified"], seconds["plain"]),
        "tensorstore_over_plain": ratio(seconds["tensorstore"], seconds["plain"]),
        "known_over_plain": ratio(seconds["known"], seconds["plain"]),
        "hashing_over_plain": ratio(seconds["hashing"], seconds["plain"]),
    }


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Returns the quotient of the fastest rounds, and the median of the rounds' quotients."""
    quotients = [a / b for a, b in zip(one, other, strict=True)]
    return {"of_minima": round(min(one) / min(other), 3), "median": round(statistics.median(quotients), 3)}


def plain(manifest: Manifest) -> list[np.ndarray]:
    """Returns every array, read into fresh memory and not compared."""
    arrays = []
    for name, parameter in manifest.parameters.items():
        array = np.empty(parameter.shape, parameter.numpy_dtype)
        with open(manifest.chunk_path(name), "rb", buffering=0) as file:
            file.readinto(array.reshape(-1).view(np.uint8).data)
        arrays.append(array)
    return arrays


def by_tensorstore(manifest: Manifest) -> list[np.ndarray]:
    """Returns every array, read through tensorstore as the reader does with files that are in another order."""
    arrays, folder = [], Folder(manifest.path)
    for name, parameter in manifest.parameters.items():
        array = np.empty(parameter.shape, parameter.numpy_dtype)
        stored = StoredArray(parameter, folder.store(array_location(name, manifest.layers).as_posix()))
        raw = array.reshape(-1).view(np.uint8)
        for reading in [stored.read(piece, raw[piece.start : piece.stop]) for piece in pieces_of(parameter)]:
            reading.result()
        arrays.append(array)
    return arrays


def hashed(num_bytes: int) -> None:
    """Hashes as many bytes, from the processor's cache, on every core."""
    piece, cores = np.zeros(4 << 20, np.uint8).data, len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        for _ in pool.map(lambda _: hashlib.sha256(piece).digest(), range(num_bytes // len(piece))):
            pass


def touch(manifest: Manifest) -> None:
    """Changes the time of every file, so that its checksum has to be compared again."""
    for name in manifest.parameters:
        os.utime(manifest.chunk_path(name))
    time.sleep(0.05)  # a file that changed just now would not be remembered


if __name__ == "__main__":
    main()
