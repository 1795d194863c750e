"""The real widths through files on disk: written as upstream does, converted, loaded and compared with the reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert_weights.checkpoint import convert_checkpoint
from convert_weights.source_config import to_upstream
from sora_jax.networks import registry
from sora_jax.storage.checkpoint import load_network, unflatten
from tests.parity import wide
from tests.parity.fixtures import is_input, read_tensors
from tests.parity.limits import compare, limit_for
from tests.support import sources


def _through_files(folder: Path) -> Any:
    """Returns a stand-in for ``build`` that writes the state dict to disk and comes back through the converter."""

    def build(network: str, config: Any, arrays: dict[str, np.ndarray]) -> Any:
        source = folder / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(to_upstream(network, config)))
        if network == "t5":
            sources.write_torch_file(source / "pytorch_model.bin", arrays)
        else:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, source / "model.safetensors")
        arrays.clear()
        convert_checkpoint(network, source, folder / "model")
        loaded_config, flat = load_network(folder / "model", network)
        assert loaded_config == config
        return unflatten(registry.abstract(network, config), flat)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("case", ["t5_wide", "stdit3_wide", "tdtm_wide", "vae_wide"])
def test_the_real_widths_come_back_as_the_reference(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "build", _through_files(tmp_path))
    computed = wide.compute(sources.GOLDEN / "wide", case)
    expected = {
        name: x for name, x in read_tensors(sources.GOLDEN / "wide" / f"{case}.safetensors").items() if not is_input(name)
    }
    assert computed.keys() == expected.keys()
    for name, reference in expected.items():
        verdict = compare(np.asarray(computed[name]), reference, limit_for("wide", case, name))
        assert verdict.passed, (name, verdict)
