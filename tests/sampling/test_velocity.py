"""What a velocity must bring: the protocols, named where one lacks, and no program that outlives an object's attributes."""

import dataclasses
import functools
import re
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from sora_jax import Plan, Schedule, sample, sampling
from sora_jax.sampling.captured import captured, restored
from sora_jax.sampling.sampler import Sampler
from sora_jax.sampling.velocity import ReusableVelocity, VideoVelocity
from tests.support.oracle_velocity import Wavy

Z = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2, 3, 2)), jnp.float32)
SCHEDULE = Schedule.uniform(3)
ONES = jnp.ones((2, 2))


def test_protocols_are_told_by_methods() -> None:
    assert isinstance(Wavy(ONES), ReusableVelocity)
    assert isinstance(Wavy(ONES), VideoVelocity)
    assert not isinstance(lambda z, t_B: z, VideoVelocity)


def minus(z: jax.Array, t_B: jax.Array) -> jax.Array:
    return -z


class OnlyEvaluates:
    def evaluate(self, z: jax.Array, t_B: jax.Array, *, frame_mask_BT: Any, merged: bool) -> jax.Array:
        assert frame_mask_BT is None
        assert merged is False
        return -z


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_steps": 1}, "merge_steps needs a velocity with evaluate(z, t_B, *, frame_mask_BT, merged); "),
        (
            {"frame_weights": np.ones((3, 4))},
            "frame_weights needs a velocity with evaluate(z, t_B, *, frame_mask_BT, merged); ",
        ),
        ({"plan": Plan.evaluate_at([0], 3)}, "evaluate_keeping(z, t_B, *, frame_mask_BT, merged) and reuse("),
    ],
)
def test_what_an_option_needs_and_the_velocity_lacks_is_named(options: dict[str, Any], message: str) -> None:
    for velocity in (minus, jax.jit(minus), Partial(lambda scale, z, t_B: -z * scale, 2.0)):
        with pytest.raises(ValueError, match=re.escape(message)) as fault:
            sample(velocity, Z, SCHEDULE, **options)
        assert "\n" not in str(fault.value)


def test_less_is_asked_of_a_velocity_where_options_need_less() -> None:
    held = Plan.evaluate_at([0], 3, keep="velocity")
    np.testing.assert_allclose(sample(minus, Z, SCHEDULE, plan=held).z, 0, atol=1e-6)
    np.testing.assert_array_equal(sample(OnlyEvaluates(), Z, SCHEDULE).z, sample(minus, Z, SCHEDULE).z)
    with pytest.raises(ValueError, match="needs a velocity with evaluate_keeping"):
        sample(OnlyEvaluates(), Z, SCHEDULE, plan=Plan.evaluate_at([0], 3))


class Scaled:
    """A plain class: JAX knows nothing of its attributes.  ``TRACES`` counts how often any of them is traced."""

    def __init__(self, scale: Any, power: Any = 1, **more: Any):
        self.scale, self.power = scale, power
        self.__dict__ |= more

    def __call__(self, z: jax.Array, t_B: jax.Array) -> jax.Array:
        TRACES.append(None)
        return jnp.ones_like(z) * self.scale**self.power


TRACES: list[None] = []


def moved(velocity: Any) -> float:
    """Returns by how much a constant velocity moves the latents: by itself."""
    return float(jnp.mean(sample(velocity, Z, SCHEDULE).z - Z))


@pytest.mark.parametrize(
    ("before", "after", "compiles"),
    [
        (jnp.asarray(2.0), jnp.asarray(3.0), False),
        (2.0, 3.0, True),
        (np.asarray(2.0, np.float32), np.asarray(3.0, np.float32), True),
    ],
    ids=["array", "number", "numpy"],
)
def test_an_attribute_that_changes_is_seen_by_the_next_call(before: Any, after: Any, compiles: bool) -> None:
    velocity = Scaled(before)
    for ways in (velocity, velocity.__call__, functools.partial(velocity)):
        velocity.scale = before
        assert moved(ways) == pytest.approx(2, rel=1e-6)
        TRACES.clear()
        velocity.scale = after
        assert moved(ways) == pytest.approx(3, rel=1e-6)
        assert bool(TRACES) is compiles
        velocity.scale = before
        TRACES.clear()
        assert moved(ways) == pytest.approx(2, rel=1e-6)
        assert not TRACES, "a value that was compiled before compiles anew"


def test_what_changes_inside_an_attribute_is_seen() -> None:
    weights = np.asarray(2.0, np.float32)
    inner = Scaled(weights)

    class Outer:
        def __init__(self) -> None:
            self.layers = [inner]

        def __call__(self, z: jax.Array, t_B: jax.Array) -> jax.Array:
            return self.layers[0](z, t_B)

    outer = Outer()
    assert moved(outer) == pytest.approx(2, rel=1e-6)
    weights[...] = 4
    assert moved(outer) == pytest.approx(4, rel=1e-6)
    inner.power = 2
    assert moved(outer) == pytest.approx(16, rel=1e-6)
    outer.layers.insert(0, Scaled(7.0))
    assert moved(outer) == pytest.approx(7, rel=1e-6)


def test_a_sampler_keeps_the_velocity_it_was_made_with() -> None:
    velocity = Scaled(2.0, extra=np.arange(3))
    sampler = Sampler.create(velocity, SCHEDULE)
    velocity.scale = 3.0
    carry = sampler.run(sampler.start(Z), 3)
    np.testing.assert_allclose(carry.z - Z, 2.0, rtol=1e-5)


def test_a_capture_restores_what_it_was_made_from() -> None:
    @dataclasses.dataclass(frozen=True)
    class Holder:
        array: Any
        names: tuple[str, ...]

    class Slotted:
        __slots__ = ("value",)

    slotted = Slotted()
    slotted.value = {"a": [1, jnp.ones(2)]}
    parts = (Holder(np.arange(4), ("x",)), slotted, functools.partial(minus, ONES), None, 3)
    again = restored(captured(parts))
    np.testing.assert_array_equal(again[0].array, np.arange(4))
    assert again[0].names == ("x",)
    np.testing.assert_array_equal(again[1].value["a"][1], np.ones(2))
    np.testing.assert_array_equal(again[2](None), -np.ones((2, 2)))
    assert again[3:] == (None, 3)


def test_state_that_cannot_be_read_is_named() -> None:
    velocity = Scaled(2.0, generator=np.random.default_rng(0))
    with pytest.raises(ValueError, match=re.escape("velocity.generator is a Generator, whose state cannot be read")):
        sample(velocity, Z, SCHEDULE)
    velocity = Scaled(2.0)
    velocity.__dict__["me"] = velocity
    with pytest.raises(ValueError, match=re.escape("velocity.me refers to itself")):
        sample(velocity, Z, SCHEDULE)


def test_lambdas_made_anew_and_their_arguments() -> None:
    """A new lambda is a new function; a Partial of one function is one program."""
    ends = [moved(lambda z, t_B, scale=scale: jnp.ones_like(z) * scale) for scale in (1.0, 2.0)]
    assert ends == pytest.approx([1, 2], rel=1e-6)

    def scaled(scale: jax.Array, z: jax.Array, t_B: jax.Array) -> jax.Array:
        TRACES.append(None)
        return jnp.ones_like(z) * scale

    TRACES.clear()
    assert [moved(Partial(scaled, scale)) for scale in (1.0, 2.0, 3.0)] == pytest.approx([1, 2, 3], rel=1e-6)
    assert len(TRACES) == 1


@pytest.mark.parametrize(
    ("velocity", "message"),
    [
        (3, "velocity is 3; expected a callable (z, t_B), or an object with evaluate(z, t_B, *, frame_mask_BT, merged)."),
        (OnlyEvaluates, "velocity is the class OnlyEvaluates; expected an instance of it."),
        (lambda z, t_B: None, "the velocity returned None; expected a floating-point array like the latents, float32(3, 4"),
        (lambda z, t_B: z * 1j, "the velocity returned an array of complex64; expected a floating-point array"),
        (lambda z, t_B: z.astype(int), "the velocity returned an array of int32; expected a floating-point array"),
        (lambda z, t_B: z[..., :1], "the velocity returned shape (3, 4, 2, 3, 1) for latents of shape (3, 4, 2, 3, 2)"),
    ],
)
def test_what_is_no_velocity_is_named(velocity: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as fault:
        Sampler.create(velocity, SCHEDULE).run(Sampler.create(minus, SCHEDULE).start(Z), 1) if callable(
            velocity
        ) and not isinstance(velocity, type) else Sampler.create(velocity, SCHEDULE)
    assert "\n" not in str(fault.value)


def test_the_examples_of_the_package_run_as_they_are_told() -> None:
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", sampling.__doc__ or "")
    assert len(blocks) == 3
    names: dict[str, Any] = {"jax": jax, "jnp": jnp, "Leap": sampling.Leap, "sample": sampling.sample}
    names |= {"velocity": minus, "z": Z, "schedule": SCHEDULE}
    for block in blocks:
        exec(textwrap.dedent(block), names)
    assert names["end"].z.shape == Z.shape
