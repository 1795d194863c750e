"""The memory of the exported sampler, beyond its weights."""

import dataclasses
from pathlib import Path

import pytest

from sora_jax.config import FLOAT32
from sora_jax.export import resident, stablehlo_sampler
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from tests.support.tiny_model import CONFIG

pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers (extra stablehlo)")

SIZE = Size(num_frames=17, height=16, width=16)


def temporary_bytes(folder: Path, depth: int) -> int:
    """Returns what a compiled sampler allocates beside weights, inputs and outputs."""
    folder.mkdir()
    config = dataclasses.replace(CONFIG, stdit3=dataclasses.replace(CONFIG.stdit3, depth=depth))
    stages = list_stages(config, (SIZE,), parts=("stdit3",), policy=FLOAT32)
    functions = stablehlo_sampler.sampler_functions(config, (SIZE,), stages, policy=FLOAT32)
    artefact = stablehlo_sampler.save(functions[:1], stages, folder, int8=False)[functions[0].name]
    compiled = resident._compiled(folder / artefact["file"], 0)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.artefacts
def test_deeper_transformers_need_no_more_memory_beside_their_weights(tmp_path):
    """XLA on a CPU would keep the caption's keys and values of every block, in both phases, from step to step."""
    caption_bytes = 4 * 2 * 2 * CONFIG.stdit3.model_max_length * CONFIG.stdit3.hidden_size  # float32, rows, keys and values
    shallow, deep = (temporary_bytes(tmp_path / str(depth), depth) for depth in (1, 3))
    assert deep - shallow < 2 * caption_bytes, "of the 4 blocks that it has more"
