"""Names of hardware, and what is refused."""

import pytest

from sora_jax.planning import h100
from sora_jax.planning.request import Request
from sora_jax.planning.targets import CHIPS, parse_target


@pytest.mark.parametrize(
    ("text", "topology", "platform"),
    [
        ("v5e:4x4", "4x4", "tpu"),
        ("v5e", "2x2", "tpu"),
        ("v6e", "2x2", "tpu"),
        ("v5p:2x2x2", "2x2x2", "tpu"),
        ("h100", "1x1x1", "cuda"),
        ("h100:1x4x8", "1x4x8", "cuda"),
    ],
)
def test_a_target_is_a_chip_and_a_topology(text: str, topology: str, platform: str) -> None:
    target = parse_target(text)
    assert (target.topology, target.chip.platform) == (topology, platform)
    assert parse_target(target.text) == target
    assert target.title == f"one {target.chip.title} of {target.text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", r"target 'a100' is unknown; expected v5e, v6e, v5p, h100, or one of them with a topology, as v5e:4x4\."),
        ("", "target '' is unknown"),
        ("V5E:4x4", "is unknown"),
        ("v5e:4", r"target 'v5e:4' has topology '4'; expected 2 numbers, as v5e:8x8\."),
        ("v5e:4x4x4", "expected 2 numbers"),
        ("v5e:0x4", "expected 2 numbers"),
        ("v5e:", "has topology ''"),
        ("v5p:2x2", r"expected 3 numbers, as v5p:2x2x2\."),
        ("h100:8", r"expected 3 numbers, as h100:1x4x8\."),
    ],
)
def test_what_is_no_target_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_target(text)


def test_every_chip_has_what_an_estimate_needs() -> None:
    for chip in CHIPS.values():
        assert set(chip.flops_per_s) == {"float32", "bfloat16"}
        assert chip.flops_per_s["bfloat16"] > 5 * chip.flops_per_s["float32"] > 0
        assert all(topology.count("x") + 1 == chip.axes for topology in chip.topologies)
    assert f"device_memory_size: {CHIPS['h100'].memory_bytes} " in h100.DESCRIPTION


def test_a_mesh_takes_all_devices_of_a_topology() -> None:
    assert [parse_target(text).num_devices for text in ("v5e:4x4", "h100", "h100:1x4x8")] == [16, 1, 32]
    request = Request(model="pocket", target="v5e:4x4", mesh="guidance=2,sequence=8")
    assert Request.from_json(request.to_json()).hardware.title == "each TPU v5e of v5e:4x4 in the mesh guidance=2,sequence=8"
