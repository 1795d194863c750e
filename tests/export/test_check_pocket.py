"""What the limits of the export's check let pass and what they do not: on the embedded model's own activations."""

from collections.abc import Mapping

import jax
import numpy as np
import pytest

from sora_jax import Pipeline
from sora_jax.export import capture, check
from sora_jax.export.palettes import nearest_table
from sora_jax.export.program import load_parameters
from sora_jax.export.size import Size
from sora_jax.export.stages import list_stages
from sora_jax.pipeline.model_file import POCKET
from sora_jax.storage.directory import open_network
from sora_jax.storage.quantisation import dequantise, quantise

SIZE = Size(num_frames=34, height=64, width=64)


def compressed(name: str, matrix: np.ndarray, weights: str) -> np.ndarray:
    """Returns the matrix as it comes back from its stored form."""
    if weights == "int8":
        return dequantise(name, *quantise(name, matrix))
    if weights == "lut6":
        table, indices = nearest_table(matrix, 64)
        return table[indices].reshape(matrix.shape)
    blocks = matrix.reshape(-1, 32, matrix.shape[1])
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
    return (np.rint(blocks / scale) * scale).reshape(matrix.shape).astype(np.float32)


@pytest.mark.slow
def test_a_matrix_of_zeros_is_refused_and_compression_is_not():
    """Where a few large values make the peak, PSNR alone would let zeros pass as int4."""
    pipeline = Pipeline.from_pretrained()
    settings = pipeline.resolve({"num_frames": SIZE.num_frames, "height": SIZE.height, "width": SIZE.width})
    values = capture.start(pipeline.config, pipeline.tokenizer, SIZE, settings)
    for stage in list_stages(pipeline.config, [SIZE], parts=("t5", "stdit3")):
        params, function = load_parameters(open_network(POCKET, stage.network), stage), stage.functions[0]
        call = jax.jit(lambda params, given, function=function: function.call(params, **given))
        inputs = capture.stage_inputs(function, values)
        expected = jax.device_get(call(params, inputs))
        if stage.name == "stdit3_pair_00":
            break
        values = capture.after_stage(stage, values, expected, settings.guidance)
    cases = {"captured": inputs, "outliers": check.with_outliers(inputs)}
    references = {case: jax.device_get(call(params, given)) for case, given in cases.items()}

    def measured(stored: Mapping[str, np.ndarray], weights: str) -> list[check.Check]:
        limits = check.limits("float16", weights)
        outputs = {case: jax.device_get(call(stored, given)) for case, given in cases.items()}
        return [one for case in cases for one in check.compare(case, cases[case], references[case], outputs[case], limits)]

    matrices = [name for name in params if name.endswith("kernel")]
    for weights in ("int8", "lut6", "int4"):
        stored = params | {name: compressed(name, params[name], weights) for name in matrices}
        assert all(one.passed for one in measured(stored, weights))
        for name in (name for name in matrices if "cross_attn" not in name):
            broken = measured(stored | {name: np.zeros_like(params[name])}, weights)
            assert not all(one.passed for one in broken), name
            if name == "spatial.attn.proj.kernel":
                assert min(one.psnr_db for one in broken) > check.limits("float16", "int4").floor_db
