"""Plans made better by small changes: every change costs as much, and the best plan is found where there is one to find."""

import random

import pytest

from sora_jax.pipeline.plan_search import grown, neighbour, refined
from sora_jax.sampling.reuse import FULL, HALF, REUSE, Plan


@pytest.mark.parametrize("halves", [False, True])
def test_every_change_is_a_plan_that_costs_as_much(halves: bool) -> None:
    draw, codes = random.Random(1), (FULL, FULL, REUSE, FULL, REUSE, REUSE, REUSE, FULL, REUSE, REUSE)
    seen = {codes}
    for _ in range(500):
        codes = neighbour(codes, draw, halves=halves)
        assert Plan(codes=codes).evaluations == 4
        seen.add(codes)
    assert len(seen) > 50
    assert any(HALF in each for each in seen) == halves
    every = (FULL, FULL, FULL)
    assert {neighbour(every, draw, halves=True) for _ in range(50)} == {every}  # nothing to move an evaluation to


def test_the_best_plan_is_found() -> None:
    """The nearer the evaluations lie to those of a plan that the search does not know, the smaller the error."""
    wanted = (0, 2, 3, 9)
    asked = []

    def error_db(codes: tuple[int, ...], prompts: int) -> float:
        asked.append(prompts)
        steps = [step for step, code in enumerate(codes) if code == FULL]
        return -float(sum(abs(step - best) for step, best in zip(steps, wanted, strict=True)))

    start = (FULL,) * 4 + (REUSE,) * 8
    assert refined(start, error_db, num_prompts=12, halves=False) == Plan.evaluate_at(wanted, 12).codes
    assert set(asked) == {3, 12}


def test_half_steps_are_found_where_they_are_better() -> None:
    found = refined((FULL,) * 4 + (REUSE,) * 8, lambda codes, prompts: float(codes.count(HALF)), num_prompts=12, halves=True)
    assert Plan(codes=found).evaluations == 4
    assert found.count(HALF) == 6


def test_a_plan_grows_where_it_helps_most() -> None:
    start = Plan.evaluate_at([0, 4], 8).codes
    worth = [0, 3, 0, 2, 0, 0, 1, 0]

    def error_db(codes: tuple[int, ...], prompts: int) -> float:
        return float(sum(w for w, code in zip(worth, codes, strict=True) if code == FULL))

    found = grown(start, error_db, evaluations=4, num_prompts=4)
    assert found == Plan.evaluate_at([0, 1, 3, 4], 8).codes
    assert grown(start, lambda *_: 0.0, evaluations=2, num_prompts=4) == start
