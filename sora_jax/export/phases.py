"""Which stages an export has by name, and in what phases a host runs them.

Invariant: the names of the stages decide the phases, and a model's depth the names; so a manifest that lacks a pair, or has
two in the wrong order, can be distinguished from one that was exported so.
"""

from collections.abc import Mapping, Sequence

from sora_jax.export.entries import FunctionEntry, PhaseEntry, StageEntry, Unload

CAPTION = "stdit3_caption"  # the stage that projects the caption, where that is not the front's work
_PHASES: tuple[tuple[str, str, tuple[str, ...], Unload], ...] = (
    ("text", "clip", ("t5_",), "after_use"),
    ("caption", "clip", (CAPTION,), "after_use"),
    ("step", "step", ("stdit3_front", "stdit3_pair", "stdit3_final"), "after_use"),
    ("decode_chunk", "chunk", ("vae_temporal_decoder",), "after_phase"),
    ("decode_frame", "frame", ("vae_spatial_decoder",), "after_phase"),
    ("encode_frame", "frame", ("vae_spatial_encoder",), "after_phase"),
    ("encode_chunk", "chunk", ("vae_temporal_encoder",), "after_phase"),
)


def phases(stages: Sequence[str]) -> list[PhaseEntry]:
    """Returns the order of stages: what is repeated together, and when each may be unloaded."""
    entries: list[PhaseEntry] = []
    for name, repeat, prefixes, unload in _PHASES:
        mine = [stage for stage in stages if stage.startswith(prefixes)]
        if mine:
            entries.append({"name": name, "repeat": repeat, "stages": mine, "unload": unload})
    return entries


def stage_names(depths: Mapping[str, int], stages: Sequence[str], pairs_per_package: int = 1) -> list[str]:
    """Returns all stages of those parts of a model of which ``stages`` has any, in order.

    Args:
      depths: number of blocks of ``t5`` and of pairs of ``stdit3``.
      stages: names that a manifest has.
      pairs_per_package: pairs of blocks that are one stage.
    """
    pair, packages = (
        ("stdit3_pair", depths["stdit3"]) if pairs_per_package == 1 else ("stdit3_pairs", depths["stdit3"] // pairs_per_package)
    )
    caption = [CAPTION] if CAPTION in stages else []
    parts = {
        "t5_": ["t5_embed", *(f"t5_block_{i:02}" for i in range(depths["t5"])), "t5_final"],
        "stdit3_": [*caption, "stdit3_front", *(f"{pair}_{i:02}" for i in range(packages)), "stdit3_final"],
        "decoder": ["vae_temporal_decoder", "vae_spatial_decoder"],
        "encoder": ["vae_spatial_encoder", "vae_temporal_encoder"],
    }
    return [name for part, names in parts.items() if any(part in stage for stage in stages) for name in names]


def base_name(function: str, form: str | None) -> str:
    """Returns a function's name without its form of attention: functions of one base compute the same."""
    return function if form is None else function.removesuffix(f"_{form}")


def program_name(stage: str) -> str:
    """Returns the program of a stage: its name without the number of its blocks."""
    head, _, number = stage.rpartition("_")
    return head if number.isdecimal() else stage


def network_name(stage: str) -> str:
    """Returns the network that a stage's weights come from."""
    return stage.partition("_")[0]


def stage_function(stage: StageEntry, size: str, variant: str, form: str | None = None) -> FunctionEntry:
    """Returns the stage's function for a size: the variant asked for, or the only one there is.

    Args:
      stage: what is run.
      size: key of the size.
      variant: see `program.Function`.
      form: form of attention, where the stage has several; None: the first.

    Raises:
      ValueError: there is none.
    """
    mine = [function for function in stage["functions"] if size in function["sizes"]]
    mine = [function for function in mine if function.get("attention") == form] or mine
    matching = [function for function in mine if function["variant"] == variant] or [
        function for function in mine if function["variant"] == "main"
    ]
    if not matching:
        have = ", ".join(function["variant"] for function in mine)
        raise ValueError(f"stage {stage['name']} has no function {variant} for size {size}; it has {have or 'none'}.")
    return matching[0]
