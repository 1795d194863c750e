"""Python arguments of the wrong kind: one line each that says what, got, expected, and how to mend it.

The calls run in a process of their own, without the type checker of the tests, which would speak first.
"""

import json
import subprocess
import sys

import pytest

# Each call and what its message holds.
CALLS: dict[str, str] = {
    "Leap.static(1.5)": "leap index is 1.5; expected a whole number of at least 0.",
    "Leap.static(True)": "leap index is True; expected a whole number",
    "Leap.static('3')": "leap index is '3'; expected a whole number",
    "Leap.dynamic(patience=2.5)": "leap patience is 2.5; expected a whole number of at least 1.",
    "Leap.dynamic(tolerance='small')": "leap tolerance is 'small'; expected a number.",
    "Leap.dynamic(tolerance=(0.1, float('inf')))": "leap tolerance is inf; expected a finite number.",
    "Leap(mode='late')": "leap mode is 'late'; expected static, dynamic, released.",
    "Leap.static(2, extrapolate=1)": "leap extrapolate is 1; expected True or False.",
    "Plan.evaluate_at([0, 2.5], 8)": "a step that the plan evaluates is 2.5; expected a whole number of at least 0.",
    "Plan.evaluate_at([0], 2.5)": "num_steps is 2.5; expected a whole number of at least 1.",
    "Plan(codes=(0, 'x'))": "plan has the codes ['x']; expected 0 (full), 1 (reuse) or 2 (half).",
    "Plan(codes=3)": "plan has the codes 3; expected one for each step.",
    "Schedule.uniform(2.5)": "num_steps is 2.5; expected a whole number of at least 1.",
    "Schedule.uniform(3, shift='2')": "shift is '2'; expected a number.",
    "Schedule.uniform(3, num_timesteps=float('nan'))": "num_timesteps is nan; expected a finite number.",
    "Schedule.from_times('abc')": "times is 'abc'; expected a sequence of numbers.",
    "Schedule.open_sora(3, height_px=64.5, width_px=64, num_frames=17)": "height_px is 64.5; expected a whole number",
    "sample(flow, z, 30)": "schedule is 30; expected a sora_jax.Schedule, for example Schedule.uniform(30).",
    "sample(flow, z, schedule, leap=2)": "leap is 2; expected a sora_jax.Leap, for example Leap.static(15).",
    "sample(flow, z, schedule, plan=[0, 1])": "plan is [0, 1]; expected a sora_jax.Plan, for example Plan.evaluate_at(",
    "sample(flow, z, schedule, merge_steps=3.5)": "merge_steps is 3.5; expected a whole number of at least 0.",
    "sample(flow, z, schedule, guidance=float('nan'))": "guidance is nan; expected a finite number.",
    "sample(flow, z, schedule, guidance='3')": "guidance is '3'; expected a number.",
    "sample(flow, z, schedule, guidance=True)": "guidance is True; expected a number.",
    "sample(flow, z, schedule, guidance=2j)": "guidance is 2j; expected a number.",
    "sample(flow, z, schedule, solver=3)": "solver 3 is unknown; expected one of euler, ab2,",
    "sample(flow, z, schedule, seed=1.5)": "seed is 1.5; expected a whole number from 0 to 4294967295.",
    "sample(flow, z, schedule, frame_weights='x')": "frame_weights is 'x'; expected numbers [B, T] from 0 to 1.",
    "sample(flow, z, schedule, noise_per_step=[1, 2])": "noise_per_step is [1, 2]; expected an array [steps, B, ...].",
    "sample(flow, z, schedule, callback=3)": "callback is 3; expected a function of the carry.",
    "sample(flow, z, schedule, gudance=3)": "there is no option 'gudance'; expected guidance, solver,",
    "sample(flow, [[1.0]], schedule)": "z is [[1.0]]; expected an array of latents [B, ...], float32.",
    "sample(flow, jnp.ones((2, 2), int), schedule)": "z has dtype int32; expected float32, in which latents are integrated",
    "sample(flow, z.astype('bfloat16'), schedule)": "z has dtype bfloat16; expected float32, in which latents are integrated",
    "sample(flow, jnp.ones(()), schedule)": "z has shape (); expected latents [B, ...] of at least one sample.",
    "sample(flow, jnp.ones((0, 2)), schedule)": "z has shape (0, 2); expected latents [B, ...] of at least one sample.",
    "sample(lambda z, t: None, z, schedule)": "the velocity returned None; expected a floating-point array",
    "sample(lambda z, t: z + 0j, z, schedule)": "the velocity returned an array of complex64; expected a floating-point",
    "integrate(flow, z, 30)": "schedule is 30; expected a sora_jax.Schedule",
    "integrate(flow, [1.0], schedule)": "z is [1.0]; expected an array of latents",
    "calibrate(flow, z, schedule, plan=Plan.evaluate_at([0], 3))": "calibrate measures every step of a full sampling;",
    "calibrate(flow, z, 30)": "schedule is 30; expected a sora_jax.Schedule",
}

SCRIPT = """
import json, sys
import jax.numpy as jnp
from sora_jax import Leap, Plan, Schedule, calibrate, integrate, sample

flow, z, schedule = (lambda z, t_B: -z), jnp.ones((2, 3)), Schedule.uniform(3)
said = {}
for call in json.load(sys.stdin):
    try:
        eval(call)
        said[call] = "no error"
    except (ValueError, TypeError) as error:
        said[call] = f"{error}"
    except Exception as error:
        said[call] = f"foreign: {type(error).__name__} {error}"
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps([*CALLS]), capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_named_in_one_line(said: dict[str, str], call: str) -> None:
    assert CALLS[call] in said[call]
    assert "\n" not in said[call]
