"""The README's example of the sampler alone: it runs, prints what the README says, and its ranking holds."""

import re
from pathlib import Path

import pytest

EXAMPLE = """import jax, jax.numpy as jnp
from sora_jax import Leap, Schedule, sample

mean, width = jnp.array([[0.7, -1.2]]), jnp.array([[0.3, 1.6]])  # the data: a Gaussian, so that the exact flow is known


def velocity(z, t):  # from noise (t = 1) to data (t = 0)
    t = t[:, None]
    return mean - (t - (1 - t) * width**2) / (((1 - t) * width) ** 2 + t**2) * (z - (1 - t) * mean)


noise = jax.random.normal(jax.random.key(0), (1000, 2))
for steps, options in [(30, {}), (16, {}), (30, {"leap": Leap.static(15)}), (16, {"solver": "ab2"})]:
    made = sample(velocity, noise, Schedule.uniform(steps, num_timesteps=1), **options)
    print(f"{made.batch_evaluations:.0f} evaluations, error {abs(made.z - (mean + width * noise)).max():.2f}")
"""
PRINTED = """30 evaluations, error 0.22
16 evaluations, error 0.40
16 evaluations, error 0.88
16 evaluations, error 0.02
"""


def test_the_example_prints_what_it_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(EXAMPLE, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed == PRINTED
    full, euler, leap, ab2 = (float(error) for error in re.findall(r"error (\S+)", printed))
    assert ab2 < full < euler < leap  # at 16 evaluations: AB2 beats 30 Euler steps, and a leap is the worst way to spend them


def test_the_readme_shows_this_example() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert EXAMPLE in readme
    assert PRINTED in readme
