"""Held-out images: what judges a network while it is trained."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np

from samrobust.data import Dataset
from samrobust.evaluation import Outcome, make_evaluator
from samrobust.experiments import building, scoring
from samrobust.system.compiler import deterministic_programs
from samrobust.system.distributed import data_mesh, replicated
from samrobust.training import TrainState
from samrobust.training.fit import AfterEpoch, Validate
from samrobust.types import Config, PyTree

__all__ = ["Judge", "make_after_epoch", "make_judge", "make_validate"]

Judge: TypeAlias = Callable[[PyTree], Outcome]  # of a network's variables


def make_judge(config: Config, dataset: Dataset) -> Judge | None:
    """Builds the verdict on a network by the held-out images; None without such.

    Attacked as `building.validation_attacks` says.
    """
    if len(dataset.validation) == 0:
        return None
    with deterministic_programs(config.training.deterministic):  # a part of it
        evaluate = make_evaluator(
            building.make_model(config, dataset),
            building.validation_attacks(config),
            batch_size=config.evaluation.batch_size,
        )
    key = scoring.validation_key(config)
    return lambda variables: evaluate(variables, dataset.validation, key)


def make_validate(judge: Judge | None) -> Validate | None:
    """Builds the score of a state for `fit`; None without a judge.

    Its `score` is robust accuracy in rows with an attack, else natural accuracy.
    """
    if judge is None:
        return None

    def validate(state: TrainState) -> dict[str, float]:
        accuracy = judge(state.eval_variables).accuracy
        return {**accuracy, "score": accuracy.get("robust", accuracy["natural"])}

    return validate


def make_after_epoch(
    judge: Judge | None, labels: np.ndarray, admit: Callable[..., PyTree] | None
) -> AfterEpoch | None:
    """Builds what shows each epoch's worst class to an average; None if none asks.

    Args:
      judge: None without held-out images.
      labels: of its images.
      admit: as of `samrobust.training.Averaging`.
    """
    if judge is None or admit is None:
        return None
    admit = jax.jit(admit, out_shardings=replicated(data_mesh()))

    def after_epoch(state: TrainState) -> tuple[TrainState, dict[str, float]]:
        correct = judge(state.variables).correct
        right = correct.get("robust", correct["natural"])
        worst = min(float(np.mean(right[labels == k])) for k in np.unique(labels))
        average = admit(state.average, state.variables, worst)
        return dataclasses.replace(state, average=average), {"worst_class": 100 * worst}

    return after_epoch
