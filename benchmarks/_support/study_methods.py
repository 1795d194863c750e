"""The ways of sampling that `sampler_study` compares: names, settings, and which of them share their first steps.

A method may fork from another one: it takes over that one's state after a number of steps, which equals what it would have
computed itself.  A leap at step N of 30 is the plain sampling until then, so all leaps of a row cost one sampling and one
further step each.
Invariant: ``evaluations`` is the requested number; the sampler reports how many a clip really took.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sora_jax.pipeline.model_file import ModelFile
from sora_jax.pipeline.presets import TUNED
from sora_jax.sampling.leap import Leap
from sora_jax.sampling.reuse import Plan

EVALUATIONS = (8, 10, 12, 16, 21, 25, 30)
STEPS = 30
FINE_STEPS = 128
REFERENCE, FINE_REFERENCE = f"Euler {STEPS}", f"fine solution, AB2 {FINE_STEPS}"
MERGED_STEPS = (30, 25, 20, 15, 10)  # of the paper's table 4
LEAP_EVALUATIONS = (16, 21, 23, 25, 30)  # of the paper's table 3
# Of the times, on top of the model's own: 6 takes the embedded model's (0.4 times) to Open-Sora's at 51 frames of 240p (2.4).
OPEN_SORA_SHIFT = 6.0
SHIFTS = {"Euler": (2.0, OPEN_SORA_SHIFT), "AB2": (4.0, OPEN_SORA_SHIFT)}
THRESHOLDS = (0.1, 0.2, 0.4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way of sampling.

    Attributes:
      name: unique.
      family: methods that differ in their number of evaluations only.
      evaluations: the requested number; None where the leap rule decides.
      changes: settings that differ from Open-Sora's.
      calibrated: evaluations of its calibrated reuse plan; None: no plan.
      fork: name of the method whose state after so many steps this one takes over, and the number of steps.
    """

    name: str
    family: str
    evaluations: float | None
    changes: Mapping[str, Any]
    calibrated: int | None = None
    fork: tuple[str, int] | None = None


def methods() -> list[Method]:
    """Returns all methods but a model's own; one that another forks from comes first."""
    return [*references(), *leaps(), *solvers(), *plans(), *adaptive(), *guidance_rules(), *merges()]


def recipes(model: ModelFile) -> list[Method]:
    """Returns the recipes that a model brings, as its presets have them."""
    out = []
    for count in TUNED:
        recipe = model.recipe(count)
        if recipe is not None:
            given = recipe.said()
            steps = {"num_steps": len(given["plan"].codes)} if "plan" in given else {}
            out.append(Method(name=f"recipe {count}", family="recipe", evaluations=count, changes={**steps, **given}))
    return out


def plain(num_steps: int) -> dict[str, Any]:
    """Returns the settings of a plain sampling; its last step "leaps" to where it goes anyway, which saves a compilation."""
    return {"num_steps": num_steps, "leap": Leap.static(num_steps - 1)}


def references() -> list[Method]:
    """Returns the samplings that all others are compared with."""
    fine = {"solver": "ab2", "shift": OPEN_SORA_SHIFT, **plain(FINE_STEPS)}
    return [
        Method(name=REFERENCE, family="Euler", evaluations=STEPS, changes=plain(STEPS)),
        Method(name=FINE_REFERENCE, family="reference", evaluations=FINE_STEPS, changes=fine),
    ]


def leaps() -> list[Method]:
    """Returns linear proportional leaps out of 30 steps: static, extrapolated, dynamic and as released."""
    out = []
    for extrapolate, family in ((False, "LPL"), (True, "LPL extrapolated")):
        for count in sorted({*EVALUATIONS, *LEAP_EVALUATIONS} - {STEPS}):
            leap = Leap.static(count - 1, extrapolate=extrapolate)
            changes = {"num_steps": STEPS, "leap": leap}
            fork = (REFERENCE, count - 1)
            out.append(Method(name=f"{family} {count}", family=family, evaluations=count, changes=changes, fork=fork))
    for extrapolate, family in ((False, "LPL dynamic"), (True, "LPL dynamic extrapolated")):
        rule = Leap.dynamic(extrapolate=extrapolate)
        first = int(rule.rule(STEPS).first)  # until then every rule does the same
        changes = {"num_steps": STEPS, "leap": rule}
        out.append(Method(name=family, family=family, evaluations=None, changes=changes, fork=(REFERENCE, first)))
    released = {"num_steps": STEPS, "leap": Leap.released()}
    return [*out, Method(name="LPL released", family="LPL released", evaluations=None, changes=released)]


def solvers() -> list[Method]:
    """Returns multistep solvers and re-shifted times, each with as many steps as evaluations, and leaps of both."""
    named = {"AB2": "ab2", "AB3": "ab3", "DPM++": "dpmpp", "UniPC": "unipc"}
    rows: list[tuple[str, dict[str, Any]]] = [("Euler", {}), *((name, {"solver": solver}) for name, solver in named.items())]
    rows += [(f"{name} shift {shift:g}", {**given, "shift": shift}) for name, given in rows[:2] for shift in SHIFTS[name]]
    rows += [(f"{name} shift {OPEN_SORA_SHIFT:g}", {**given, "shift": OPEN_SORA_SHIFT}) for name, given in rows[2:5]]
    out = []
    for family, changes in rows:
        for count in EVALUATIONS:
            if f"{family} {count}" != REFERENCE:
                given = {**changes, **plain(count)}
                out.append(Method(name=f"{family} {count}", family=family, evaluations=count, changes=given))
    leaping: list[tuple[str, str, dict[str, Any], bool]] = [
        ("AB2 LPL extrapolated", "AB2", {"solver": "ab2"}, True),
        (f"LPL shift {OPEN_SORA_SHIFT:g}", f"Euler shift {OPEN_SORA_SHIFT:g}", {"shift": OPEN_SORA_SHIFT}, False),
    ]
    for family, full, changes, extrapolate in leaping:
        for count in EVALUATIONS[:-1]:
            given = {"num_steps": STEPS, **changes, "leap": Leap.static(count - 1, extrapolate=extrapolate)}
            fork = (f"{full} {STEPS}", count - 1)
            out.append(Method(name=f"{family} {count}", family=family, evaluations=count, changes=given, fork=fork))
    return out


def plans() -> list[Method]:
    """Returns reuse of the block stack by calibrated plans of 30 steps, and of the guidance difference."""
    out = []
    moved = {"shift": OPEN_SORA_SHIFT}
    rows: list[tuple[str, dict[str, Any]]] = [("reuse", {}), ("reuse AB2", {"solver": "ab2"})]
    rows += [(f"{family} shift {OPEN_SORA_SHIFT:g}", {**given, **moved}) for family, given in rows]
    rows += [(f"{family}, extrapolated", {**given, "reuse_order": 1}) for family, given in rows[1::2]]
    for family, given in rows:
        for count in EVALUATIONS[:-1]:
            changes = {"num_steps": STEPS, **given}
            name = f"{family} {count}"
            out.append(Method(name=name, family=family, evaluations=count, changes=changes, calibrated=count))
    family = "guidance reuse"
    for count in EVALUATIONS[:-1]:
        plan = guidance_plan(count)
        changes = {"num_steps": len(plan.codes), "plan": plan}
        out.append(Method(name=f"{family} {count}", family=family, evaluations=plan.evaluations, changes=changes))
    return out


def adaptive() -> list[Method]:
    """Returns reuse decided in every step: by the input's change (TeaCache) and by the first block's, as far as they go."""
    out = []
    for times, given in (("", {}), (f" shift {OPEN_SORA_SHIFT:g}", {"solver": "ab2", "shift": OPEN_SORA_SHIFT})):
        for rule, name in (("input", "TeaCache"), ("first-block", "first block")):
            for order, family in ((0, f"{name}{times}"), (1, f"{name}{times}, extrapolated")):
                for threshold in THRESHOLDS:
                    reuse = {"reuse": rule, "reuse_threshold": threshold, "reuse_order": order}
                    changes = {"num_steps": STEPS, **given, **reuse}
                    out.append(Method(name=f"{family} {threshold:g}", family=family, evaluations=None, changes=changes))
    return out


def guidance_rules() -> list[Method]:
    """Returns AB2 at Open-Sora's times with other guidance: only below a time, only above one, CFG-Zero*, rescaled."""
    base = {"solver": "ab2", "shift": OPEN_SORA_SHIFT}
    rules: dict[str, dict[str, Any]] = {
        "guided below 0.9": {"guidance_high": 0.9},
        "guided above 0.1": {"guidance_low": 0.1},
        "CFG-Zero*": {"guidance_rule": "zero-star"},
        "rescaled 0.7": {"guidance_rescale": 0.7},
    }
    return [
        Method(
            name=f"AB2 {family} {count}", family=f"AB2 {family}", evaluations=None, changes={"num_steps": count, **base, **rule}
        )
        for family, rule in rules.items()
        for count in EVALUATIONS
    ]


def guidance_plan(evaluations: int) -> Plan:
    """Returns a plan of full steps followed by steps that reuse the guidance difference, with that many evaluations in all.

    It has 30 steps if that leaves at least two full ones, and fewer below 16 evaluations.
    """
    num_steps = min(STEPS, 2 * evaluations - 2)
    return Plan.evaluate_at(range(num_steps), num_steps).with_half_steps(2 * evaluations - num_steps)


def merges() -> list[Method]:
    """Returns temporal token merging in the first steps of 30, alone and before a leap."""
    first = f"TDTM {MERGED_STEPS[0]}"
    out = [Method(name=first, family="TDTM", evaluations=STEPS, changes={"num_steps": STEPS, "merge_steps": MERGED_STEPS[0]})]
    for count in MERGED_STEPS[1:]:
        changes = {"num_steps": STEPS, "merge_steps": count}
        out.append(Method(name=f"TDTM {count}", family="TDTM", evaluations=STEPS, changes=changes, fork=(first, count)))
    for count in (10, 15):
        changes = {"num_steps": STEPS, "merge_steps": count, "leap": Leap.static(15)}
        out.append(Method(name=f"LPL 16, TDTM {count}", family="LPL and TDTM", evaluations=16, changes=changes))
    return out


def chosen(all_methods: Iterable[Method], names: Iterable[str]) -> list[Method]:
    """Returns the methods of those names, the references, and what they fork from, in their order."""
    by_name = {method.name: method for method in all_methods}
    wanted = {*names, REFERENCE, FINE_REFERENCE}
    wanted |= {fork[0] for name in wanted if name in by_name and (fork := by_name[name].fork)}
    return [method for method in by_name.values() if method.name in wanted]


def frontier(rows: Iterable[Mapping[str, Any]], measure: str) -> list[str]:
    """Returns the names of the methods that no other one beats: fewer or equal evaluations and a higher median."""
    ordered = sorted(rows, key=lambda row: (row["evaluations"], -row[measure]["median"]))
    best, out = -math.inf, []
    for row in ordered:
        if row[measure]["median"] > best:
            best = row[measure]["median"]
            out.append(row["name"])
    return out
