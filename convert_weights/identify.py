"""Which network a checkpoint holds, from the names of its arrays.

Invariant: a network is named only where the tables of the others take none of the arrays; otherwise the error says what each
takes. Names alone are looked at; whether shapes fit is decided by the plan of a conversion.
"""

from collections.abc import Collection, Mapping
from typing import Any

from convert_weights import table
from convert_weights.errors import SourceError, some
from convert_weights.opening import SPATIAL_PREFIX
from convert_weights.readers import Checkpoint
from convert_weights.rules import common_prefix, takes
from sora_jax.config import NETWORKS, open_sora_1_2

SPATIAL = "spatial"  # the VAE's AutoencoderKL alone
ADAPTER = "adapter"


def taken(names: Collection[str]) -> dict[str, int]:
    """Returns how many of the names the table of each network takes, ``spatial`` for the spatial part of a VAE alone."""
    prefix = common_prefix(names)
    bare = [name.removeprefix(prefix) for name in names]
    counts = {network: _count(network, bare) for network in NETWORKS}
    counts[SPATIAL] = _count("vae", [SPATIAL_PREFIX + name for name in bare])
    return {network: count for network, count in counts.items() if count}


def part_of(checkpoint: Checkpoint) -> str | None:
    """Returns ``spatial`` or ``adapter`` for what is no network by itself, else None."""
    counts = taken(checkpoint.arrays)
    if not counts and any(".lora_A." in name or ".lora_B." in name for name in checkpoint.arrays):
        return ADAPTER
    return SPATIAL if list(counts) == [SPATIAL] else None


def network_of_arrays(checkpoint: Checkpoint) -> str:
    """Returns the network whose arrays a checkpoint holds.

    Raises:
      SourceError: they belong to none, to several, or to a part of one.
    """
    counts, path = taken(checkpoint.arrays), checkpoint.path
    if len(counts) > 1:
        found = ", ".join(f"{count} arrays of {network}" for network, count in counts.items())
        network = next(iter(counts))
        raise SourceError(f"{path} holds {found}; say which one is meant: sora-jax convert {network} {path} MODEL_DIR.")
    if not counts:
        raise SourceError(f"{path} {_what_else(checkpoint)}")
    network = next(iter(counts))
    if network == SPATIAL:
        raise SourceError(
            f"{path} is the spatial part of a VAE alone; name it next to the temporal part: "
            f"sora-jax convert vae SOURCE MODEL_DIR --spatial {path}."
        )
    return network


def _count(network: str, names: Collection[str]) -> int:
    rules, _ = table(network, _any_config(network))
    return takes(rules, names)


def _any_config(network: str) -> Any:
    return getattr(open_sora_1_2, network)  # names are the same for every size


def _what_else(checkpoint: Checkpoint) -> str:
    names: Mapping[str, Any] = checkpoint.arrays
    if part_of(checkpoint) == ADAPTER:
        return f"is an adapter of low rank; add it while its network is converted: --lora {checkpoint.path}."
    return f"holds {len(names)} arrays that belong to none of {', '.join(NETWORKS)}: {some(list(names), 3)}."
