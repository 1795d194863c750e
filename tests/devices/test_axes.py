"""Meshes and shares as users write them, read without JAX."""

import pytest

from sora_jax.devices.axes import check_mesh_request, parse_axes, written
from sora_jax.devices.shares import parse_share


def test_axes_are_read_in_one_order_and_written_as_users_write_them() -> None:
    sizes = parse_axes(" sequence=4, guidance=2 ")
    assert sizes == {"data": 1, "guidance": 2, "sequence": 4}
    assert written(sizes) == "guidance=2,sequence=4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "names the axis 'model'; expected data, guidance, sequence"),
        ("", "names the axis ''"),
        ("data=2,data=2", "names the axis data twice"),
        ("data=0", "has '0' devices in axis data; expected a whole number from 1"),
        ("data", "has '' devices in axis data"),
        ("data=2.5", "has '2.5' devices"),
        ("guidance=3", "mesh has guidance=3; expected 1 or 2"),
    ],
)
def test_what_is_no_mesh_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axes(text)


@pytest.mark.parametrize(
    ("guided", "num_clips", "message"),
    [
        (False, 2, "mesh data=2,guidance=2 spreads the rows of guidance, but with guidance 1 there is one row"),
        (True, 3, "a batch of 3 cannot be divided over data=2; expected a multiple of 2 clips"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused(guided: bool, num_clips: int, message: str) -> None:
    sizes = parse_axes("data=2,guidance=2")
    check_mesh_request(sizes, guided=True, num_clips=4)
    with pytest.raises(ValueError, match=message):
        check_mesh_request(sizes, guided=guided, num_clips=num_clips)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_are_a_partition_of_whole_batches(group: int, count: int) -> None:
    shares = [parse_share(f"{i}/{count}") for i in range(count)]
    owners = [[i for i, share in enumerate(shares) if share.has(position, group)] for position in range(17)]
    assert all(len(owner) == 1 for owner in owners)
    assert all(owners[position] == owners[position - position % group] for position in range(17))
    assert sum(share.number_of(17, group) for share in shares) == 17


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "1/0", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected I/N with 0 <= I < N"):
        parse_share(text)
