"""The training loop that every stage of the pocket model runs: update, average, checkpoint, report, resume.

Invariant: step ``i`` depends only on the state after step ``i - 1`` and on ``fold_in(seed, i)``, so a run that was
interrupted and resumed from its last checkpoint ends with the same bits as one that was not.  This module knows no
network and no data; a ``Stage`` brings both.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one training stage optimises, on what data, and how it is judged.

    Attributes:
      name: folder of its checkpoints.
      num_steps: updates after which the stage is complete.
      init: returns the flat parameters at step 0.
      batch: maps a step number to the arrays of one batch; deterministic.
      loss: maps (params, batch, key) to a scalar and a dictionary of scalars to report.
      learning_rate: maps a step number to the rate, in the units of AdamW.
      adam_rate: the same for the parameters that AdamW updates; None: the learning rate.
      average: decay of the exponential moving average of the parameters that is judged and shipped.
      evaluate: maps averaged parameters to scores, run every ``evaluate_every`` steps.
      save_every: steps between checkpoints.
      report_every: steps between reports of the loss.
    """

    name: str
    num_steps: int
    init: Callable[[], Params]
    batch: Callable[[int], Any]
    loss: Callable[[Params, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    learning_rate: optax.Schedule
    average: float
    evaluate: Callable[[Params], dict[str, float]]
    evaluate_every: int
    adam_rate: optax.Schedule | None = None
    save_every: int = 500
    report_every: int = 50


def optimizer(
    learning_rate: optax.Schedule, params: Params, *, adam_rate: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Returns Muon on matrices and convolution kernels, AdamW on everything else, with clipped gradients."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            learning_rate,
            consistent_rms=0.2,
            muon_weight_dimension_numbers={name: _matrix_axes(name, value) for name, value in params.items()},
            weight_decay=0.01,
            adam_b2=0.99,
            adam_learning_rate=adam_rate,
        ),
    )


def _matrix_axes(name: str, value: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    rows = value.size // value.shape[-1]
    if not name.endswith("kernel") or min(rows, value.shape[-1]) < 8:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(value.ndim - 1)), value.ndim - 1)


def fit(stage: Stage, directory: Path, *, seed: int) -> Params:
    """Returns the averaged parameters of the completed stage, resuming from ``directory/<stage name>`` if it exists.

    Every report is one JSON object in ``directory/<stage name>.jsonl``: step, loss, seconds, scores, remaining time.
    """
    directory = directory.absolute()
    params = stage.init()
    transform = optimizer(stage.learning_rate, params, adam_rate=stage.adam_rate)
    state = {"params": params, "average": params, "optimizer": transform.init(params), "step": jnp.zeros((), jnp.int32)}
    root = jax.random.key(seed)

    def update(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        key = jax.random.fold_in(root, state["step"])
        (loss, aux), grads = jax.value_and_grad(stage.loss, has_aux=True)(state["params"], batch, key)
        updates, opt = transform.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        decay = jnp.minimum(stage.average, (1.0 + state["step"]) / (10.0 + state["step"]))
        average = jax.tree.map(lambda a, p: a * decay + p * (1 - decay), state["average"], params)
        return {"params": params, "average": average, "optimizer": opt, "step": state["step"] + 1}, aux | {"loss": loss}

    update = jax.jit(update, donate_argnums=0)
    with ocp.CheckpointManager(
        directory / stage.name, options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    ) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
            logger.info("%s: resumed at step %d of %d", stage.name, int(state["step"]), stage.num_steps)
        # Donated buffers must be distinct.
        state = jax.tree.map(jnp.copy, state)
        report = _Report(stage, directory / f"{stage.name}.jsonl", first_step=int(state["step"]))
        for step in range(int(state["step"]), stage.num_steps):
            state, aux = update(state, stage.batch(step))
            report.add(step, aux)
            done = step + 1
            if done % stage.evaluate_every == 0 or done == stage.num_steps:
                report.scores(step, stage.evaluate(state["average"]))
            if done % stage.save_every == 0 or done == stage.num_steps:
                manager.save(done, args=ocp.args.StandardSave(state))
    return state["average"]


class _Report:
    """Running means of the reported scalars, written as JSON lines with the remaining time."""

    def __init__(self, stage: Stage, path: Path, *, first_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stage, self.path, self.first_step = stage, path, first_step
        self.began = time.monotonic()
        self.pending: list[dict[str, jax.Array]] = []

    def add(self, step: int, aux: dict[str, jax.Array]) -> None:
        self.pending.append(aux)
        if (step + 1) % self.stage.report_every == 0 or step + 1 == self.stage.num_steps:
            means = {name: float(np.mean([float(entry[name]) for entry in self.pending])) for name in aux}
            self.pending.clear()
            per_step = (time.monotonic() - self.began) / (step + 1 - self.first_step)
            self._write(step, means | {"step_s": per_step, "remaining_s": per_step * (self.stage.num_steps - step - 1)})

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self._write(step, scores)

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step + 1, "of": self.stage.num_steps, "seconds": time.monotonic() - self.began}
        line |= {name: round(value, 6) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        words = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in line.items()]
        logger.info("%s %s", self.stage.name, " ".join(words))
