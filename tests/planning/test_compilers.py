"""The real compilers for TPUs and the H100, in the interpreters that have them; skipped where there is none."""

import importlib.util
import os
import sys

import pytest

from sora_jax.planning.ahead import VARIABLES, compile_ahead
from sora_jax.planning.outcome import Outcome
from sora_jax.planning.request import Request
from sora_jax.planning.targets import parse_target

pytestmark = [pytest.mark.ahead]
MODULES = {"tpu": "libtpu", "cuda": "jax_plugins"}


def compiled(target: str, program: str, model: str = "open-sora-1.2", **options: object) -> Outcome:
    platform = parse_target(target).chip.platform
    python = os.environ.get(VARIABLES[platform])
    if python is None and importlib.util.find_spec(MODULES[platform]) is None:
        pytest.skip(f"{sys.executable} has no {MODULES[platform]}, and {VARIABLES[platform]} names no interpreter that has it")
    attention = str(options.pop("attention", "auto"))
    mesh = options.pop("mesh", None)
    request = Request(
        model=model,
        target=target,
        options=options,
        attention=attention,
        programs=(program,),
        mesh=None if mesh is None else str(mesh),
    )
    (outcome,) = compile_ahead(request)
    return outcome


def test_dense_attention_at_720p_is_refused_by_one_v5e() -> None:
    outcome = compiled("v5e:4x4", "evaluation", resolution="720p", num_frames=51, attention="dense")
    assert not outcome.fits
    assert "RESOURCE_EXHAUSTED" in outcome.why


@pytest.mark.slow
def test_chunked_attention_at_720p_fits_one_v5e() -> None:
    outcome = compiled("v5e:4x4", "evaluation", resolution="720p", num_frames=51, attention="chunked")
    assert outcome.fits
    assert 2.4e9 < outcome.argument_bytes < 2.5e9  # the weights in bfloat16
    assert outcome.peak_bytes < 8e9


@pytest.mark.parametrize("target", ["v5e", "h100"])
def test_the_sampler_is_one_program_without_float64_and_without_the_host(target: str) -> None:
    outcome = compiled(target, "sampler", model="pocket", attention="chunked")
    assert outcome.fits
    assert outcome.loops == 1
    assert outcome.host_transfers == []
    assert "f64" not in outcome.dtypes
    assert outcome.collectives == {}


def test_attention_at_480p_on_an_h100_is_what_dense_and_chunks_differ_in() -> None:
    dense, chunked = (
        compiled("h100", "evaluation", resolution="480p", num_frames=51, attention=a) for a in ("dense", "chunked")
    )
    assert chunked.operations == pytest.approx(dense.operations, rel=0.01)
    assert dense.temporary_bytes - chunked.temporary_bytes > 4.9e9  # the logits of one spatial attention, in float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "mesh", "sequence", "most_bytes"),
    [("v5e:4x4", "guidance=2,sequence=8", 8, 3.0e9), ("h100:1x1x8", "guidance=2,sequence=4", 4, 3.2e9)],
)
def test_720p_on_a_mesh_fits_with_two_exchanges_a_pair(target: str, mesh: str, sequence: int, most_bytes: float) -> None:
    """51 frames are 15 latent frames of 3,600 places; what a device brings is its row's tokens in bfloat16."""
    outcome = compiled(target, "evaluation", resolution="720p", num_frames=51, attention="chunked", mesh=mesh)
    assert outcome.fits
    assert outcome.peak_bytes <= most_bytes
    assert outcome.collectives["all-to-all"] == {"number": 56, "bytes": 56 * 16 * 3600 // sequence * 1152 * 2}
