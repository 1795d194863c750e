"""The registry names every network once, and makes shapes without parameters."""

import jax
import pytest

from sora_jax.config import BFLOAT16, NETWORKS, pocket
from sora_jax.networks import registry


def test_the_registry_has_the_names_of_the_configuration():
    assert tuple(registry.CLASSES) == NETWORKS


@pytest.mark.parametrize("network", NETWORKS)
def test_an_abstract_network_has_shapes_and_no_arrays(network):
    leaves = jax.tree.leaves(registry.abstract(network, getattr(pocket, network), policy=BFLOAT16))
    assert {type(leaf) for leaf in leaves} == {jax.ShapeDtypeStruct}
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_an_unknown_network_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown network 'unet'; expected one of t5, stdit3, vae"):
        registry.abstract("unet", None)
