"""Local search: a reuse plan made better by small changes, each judged by what the whole sampling comes to.

A calibration chooses a plan by the errors that single steps suffer (`sampling.calibration`); what they add up to at the end is
another question.  Here a plan changes in one or two steps at a time, at the same number of evaluations, and a change that
brings the end nearer to the flow is kept.

Invariant: every plan it tries evaluates the first step in full and costs as much as the one it began with.
"""

import random
from collections.abc import Callable, Sequence

from sora_jax.sampling.reuse import FULL, HALF, REUSE, Plan

PROPOSALS = 160  # for each plan that is refined
_REACH = 3  # steps that an evaluation is moved by, at most
_CLEARLY_WORSE_DB = 0.7  # on the first prompts, which are then all that a proposal is tried on
_BETTER_DB = 0.01


def refined(
    codes: Sequence[int], error_db: Callable[[tuple[int, ...], int], float], *, num_prompts: int, halves: bool
) -> tuple[int, ...]:
    """Returns the best plan found from ``codes`` on.

    Args:
      codes: what each step does, see `sampling.reuse.Plan`.
      error_db: mean over the first so many prompts of how far the end lies below the flow in dB; higher is nearer.
      num_prompts: prompts that count.
      halves: whether half steps are tried, which only a guided sampling has.
    """
    draw, best, tried = random.Random(0), tuple(codes), {tuple(codes)}
    few = max(2, num_prompts // 4)
    reached = error_db(best, num_prompts)
    for _ in range(PROPOSALS):
        proposal = neighbour(best, draw, halves=halves)
        if proposal in tried:
            continue
        tried.add(proposal)
        if error_db(proposal, few) < error_db(best, few) - _CLEARLY_WORSE_DB:
            continue
        if (found := error_db(proposal, num_prompts)) > reached + _BETTER_DB:
            best, reached = proposal, found
    return best


def grown(
    codes: Sequence[int], error_db: Callable[[tuple[int, ...], int], float], *, evaluations: int, num_prompts: int
) -> tuple[int, ...]:
    """Returns a plan with full steps in place of reused ones until it has so many evaluations, each where it helps most.

    Args:
      codes: a plan with fewer evaluations, by a whole number.
      error_db: as for `refined`.
      evaluations: of the plan that is wanted.
      num_prompts: prompts that count, of which a part decides.
    """
    found, few = tuple(codes), max(2, num_prompts // 4)
    while Plan(codes=found).evaluations < evaluations:
        more = [(*found[:step], FULL, *found[step + 1 :]) for step in range(len(found)) if found[step] == REUSE]
        found = max(more, key=lambda plan: error_db(plan, few))
    return found


def neighbour(codes: tuple[int, ...], draw: random.Random, *, halves: bool) -> tuple[int, ...]:
    """Returns a plan that costs as much and differs in two steps; the same one where the drawn change is impossible."""
    at = {code: [step for step in range(1, len(codes)) if codes[step] == code] for code in (FULL, REUSE, HALF)}
    changed = list(codes)
    change = draw.choice(("move", "move", "split", "join", "swap") if halves else ("move",))
    if change == "move" and (evaluated := at[FULL] + at[HALF]):
        step = draw.choice(evaluated)
        if near := [other for other in at[REUSE] if abs(other - step) <= _REACH]:
            other = draw.choice(near)
            changed[step], changed[other] = codes[other], codes[step]
    elif change == "split" and at[FULL] and at[REUSE]:
        changed[draw.choice(at[FULL])] = changed[draw.choice(at[REUSE])] = HALF
    elif change == "join" and len(at[HALF]) > 1:
        step, other = draw.sample(at[HALF], 2)
        changed[step], changed[other] = FULL, REUSE
    elif change == "swap" and at[FULL] and at[HALF]:
        changed[draw.choice(at[FULL])], changed[draw.choice(at[HALF])] = HALF, FULL
    return tuple(changed)
