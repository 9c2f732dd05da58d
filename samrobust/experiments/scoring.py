"""Evaluation of a run's network by its config's attacks, and by held-out images."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
from flax import linen as nn

from samrobust.attacks import ATTACKS_VERSION
from samrobust.checks import check
from samrobust.data import Dataset, Split, fingerprint
from samrobust.evaluation import (
    Archive,
    Evaluator,
    OnBatch,
    Outcome,
    make_autoattack_evaluator,
    make_evaluator,
    make_skip_broken_evaluator,
)
from samrobust.experiments import building
from samrobust.experiments.networks import Trained, checkpoints_of
from samrobust.experiments.reporting.names import attacked_in_words
from samrobust.system.claims.lease import Claim, claim
from samrobust.system.compiler import deterministic_programs
from samrobust.system.distributed import broadcast_from_primary, data_mesh, replicated
from samrobust.system.provenance import provenance
from samrobust.system.resolve import is_reference
from samrobust.system.runtime import RESUME
from samrobust.training import InterruptedRunError, Progress, TrainState
from samrobust.training.fit import AfterEpoch, Validate
from samrobust.types import Config, PyTree

__all__ = [
    "Observer",
    "Score",
    "Scorer",
    "as_result",
    "check_alone",
    "evaluated_split",
    "evaluation_key",
    "evaluation_work",
    "in_parts",
    "make_after_epoch",
    "make_judge",
    "make_validate",
    "passes_to_judge",
    "until_stopped",
]

# Folded into the key that training splits. `fold_in(key, 1)` is the second half of the
# split, but every draw of an evaluation has the checksum of a name in its key, and none
# of a training has: no number is drawn twice.
_EVALUATION_STREAM, _VALIDATION_STREAM = 1, 2
_FINE = 10**6  # parts that a whole evaluation is shown in

Judge: TypeAlias = Callable[[PyTree], Outcome]  # of a network's variables


class Observer(Protocol):
    """Spectator of a run, who is told how it proceeds and shows it."""

    def on_progress(self, progress: Progress) -> None:
        """Shows where the training is, after each call of the device."""

    def on_batch(self, done: int, num_examples: int, doing: str = "") -> None:
        """Shows how many examples are evaluated; `doing` may say what was done."""


def in_parts(on_batch: OnBatch, works: Sequence[float]) -> list[OnBatch]:
    """Returns listeners to the parts of an evaluation, in their order.

    Args:
      on_batch: listens to the whole.
      works: predicted costs of the parts, in any unit.
    """
    shares = np.asarray(works) / sum(works)
    begins = np.cumsum(shares) - shares

    def listen(
        begin: float, share: float, done: int, num_examples: int, doing: str = ""
    ) -> None:
        doing = doing or attacked_in_words(done, num_examples)
        on_batch(round((begin + share * done / num_examples) * _FINE), _FINE, doing)

    return [
        functools.partial(listen, *pair) for pair in zip(begins, shares, strict=True)
    ]


class Score(NamedTuple):
    """Outcome of an evaluation, and of which network.

    Attributes:
      accuracy: in percent, by the attacks' names, `natural` first.
      step: after which the network was saved.
      identity: the hash of its run's identity.
      images: the hash of the images that it was judged on.
      attacks_version: `ATTACKS_VERSION` of the attacks that it was judged by.
      provenance: of the process that ended the evaluation, also where it is only read
        again.
      details: what there is beyond that, in JSON's types. Of AutoAttack, `autoattack`:
        by column, the accuracy after each member, the file with what became of every
        example, relative to the workdir, and the provenance of the process that began
        it; and `column_provenance`, of the columns that another process ended than
        the last. `non_finite`: by attack, the images whose highest logit is NaN or
        infinite.
      network: its checksum; empty in what older versions stored.
    """

    accuracy: dict[str, float]
    step: int
    identity: str
    images: str
    attacks_version: int
    provenance: dict[str, Any]
    details: dict[str, Any]
    network: str = ""

    def is_of(self, network: Trained) -> bool:
        """Returns whether it is the score of this network."""
        own = network.step, network.identity.hash, network.checksum()
        return (self.step, self.identity, self.network) == own

    def as_dict(self) -> dict[str, Any]:
        """Returns it in JSON's types."""
        fields = self._asdict()
        return fields.pop("details") | fields


def as_result(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Returns what a result says of the checkpoints of a run, in JSON's types.

    Args:
      scores: by the names of the checkpoints.

    Returns:
      Of the first, all as it would be alone. Of another, its columns, as in `linf 8/255
      best`, beside those, and the rest under its name.
    """
    (_, first), *others = scores.items()
    result = first.as_dict()
    result["accuracy"] = dict(first.accuracy)
    for which, score in others:
        result[which] = score.as_dict()
        columns = result[which].pop("accuracy")
        result["accuracy"] |= {f"{name} {which}": x for name, x in columns.items()}
    return result


class Scorer:
    """Evaluation of a config, compiled once for as many networks as come.

    Args:
      config: its `model` and `evaluation` count, and of training the batch size: groups
        of BatchNorm that are the batch are none.
      dataset: that of `config.data`.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self._split = evaluated_split(config, dataset)
        make: Callable[..., Evaluator]
        if config.evaluation.attack == "autoattack":
            make, attacks = make_autoattack_evaluator, building.autoattacks(config)
        elif config.evaluation.early_stop:
            make, attacks = make_skip_broken_evaluator, building.staged_attacks(config)
        else:
            make, attacks = make_evaluator, building.evaluation_attacks(config)
        self._model = building.make_model(config, dataset)
        size = config.evaluation.batch_size
        self._evaluate = make(self._model, attacks, batch_size=size)

    def __call__(
        self,
        network: Trained,
        workdir: pathlib.Path,
        on_batch: OnBatch,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        keep_examples: bool = False,
    ) -> Score:
        """Returns the score of a network.

        Args:
          network: as `load_network` gives it; its config's seed draws the numbers.
          workdir: where AutoAttack keeps what became of every example.
          on_batch: is told of progress.
          should_stop: asked after every batch.
          keep_examples: keep AutoAttack's adversarial images too.

        Raises:
          InterruptedRunError: after `should_stop`. The same call begins again with
            PGD, and resumes with AutoAttack.
          ClaimedError: if another process keeps adversarial images there.
          ValueError: for a network that `check_alone` refuses.
        """
        if is_reference(network.config.model.name):
            check_alone(self._model, network.variables, self._split.images)
        now = provenance()
        archive = Archive(workdir / "autoattack", keep_examples, now)
        key = evaluation_key(network.config)
        claims: list[Claim] = []  # of process 0
        with contextlib.ExitStack() as held:

            def hold() -> None:
                claims.append(held.enter_context(claim(archive.folder)))

            if keep_examples:  # their file is written in place
                broadcast_from_primary(hold)
            for mine in claims:
                should_stop = mine.guard(should_stop)
            outcome = self._evaluate(
                *(network.variables, self._split, key),
                archive=archive,
                on_batch=until_stopped(on_batch, should_stop, "during evaluation"),
            )
        by_column = outcome.ended_by
        begun = [own.provenance[0] for own in outcome.fates.values() if own.provenance]
        if begun:  # by the call that was the first to look at these images
            by_column["natural"] = min(begun, key=_date)
        last = max(by_column.values(), key=_date, default=now)
        others = {c: made for c, made in by_column.items() if made != last}
        return Score(
            accuracy=outcome.accuracy,
            step=network.step,
            identity=network.identity.hash,
            images=fingerprint(self._split),
            attacks_version=ATTACKS_VERSION,
            provenance=last,
            details=outcome.details | ({"column_provenance": others} if others else {}),
            network=network.checksum(),
        )


def _date(made: Mapping[str, Any]) -> str:
    """Returns the date of a provenance, which sorts as text."""
    return made.get("date", "")


def check_alone(model: nn.Module, variables: Any, images: np.ndarray) -> None:
    """Refuses a network whose logits of an image depend on what is beside it.

    Its accuracy would be another with every size of a batch and its padding.

    Args:
      model: somebody's own.
      variables: of the network.
      images: uint8 [N, H, W, C], of which a few are looked at.

    Raises:
      ValueError: see above.
    """
    few = images[:4].astype(np.float32) / 255
    apply = jax.jit(functools.partial(model.apply, train=False))
    with_itself, with_others = (
        np.asarray(apply(variables, batch), np.float64)[0]
        for batch in (few[[0] * len(few)], few)
    )
    check(
        np.allclose(with_itself, with_others, rtol=1e-3, atol=1e-3),
        "logits that do not depend on the other images of the batch",
        "Normalize by the batch, and draw, only where train=True.",
        with_itself=with_itself.round(3).tolist(),
        with_others=with_others.round(3).tolist(),
    )


def until_stopped(
    on_batch: Callable[..., None], should_stop: Callable[[], bool], when: str
) -> OnBatch:
    """Returns a listener that raises `InterruptedRunError` when it is asked to stop.

    Args:
      on_batch: is told of every batch.
      should_stop: asked after every batch but the last.
      when: for the message: stopped when.
    """

    def listen(done: int, num_examples: int, doing: str = "") -> None:
        on_batch(done, num_examples, doing)
        if should_stop() and done < num_examples:
            raise InterruptedRunError(f"Stopped {when}. {RESUME}")

    return listen


def evaluation_key(config: Config) -> jax.Array:
    """Returns the key of the random numbers in an evaluation."""
    return _key(config, _EVALUATION_STREAM)


def _key(config: Config, stream: int) -> jax.Array:
    """Returns a key of threefry, which gives each example numbers of its own."""
    return jax.random.fold_in(jax.random.key(config.seed, impl="threefry2x32"), stream)


def passes_to_judge(config: Config, num_classes: int) -> float:
    """Returns the predicted passes to judge an image once, if it is never broken.

    Counted as in `methods.StepPasses`.
    """
    evaluation = config.evaluation
    if evaluation.attack == "autoattack":
        passes = [
            member.cost * member.num_parts(num_classes)
            for attack in building.autoattacks(config).values()
            for member in attack.members
        ]
        return (1 + sum(passes)) / 3
    attacks = len(evaluation.linf) + len(evaluation.l2)
    attacked = evaluation.restarts * evaluation.num_steps * 2 / 3
    return (1 + attacks) / 3 + attacks * attacked


def evaluation_work(config: Config, dataset: Dataset) -> float:
    """Returns the predicted cost of the evaluation, in the unit of `run.work`.

    Raises:
      ValueError: as `building.check_radii`: every command asks before it begins.
    """
    building.check_radii(config, dataset)
    count = len(evaluated_split(config, dataset)) * len(checkpoints_of(config))
    return passes_to_judge(config, dataset.num_classes) * count


def evaluated_split(config: Config, dataset: Dataset) -> Split:
    """Returns the split that `config.evaluation.split` names."""
    return dataset.test if config.evaluation.split == "test" else dataset.validation


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
    key = _key(config, _VALIDATION_STREAM)
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
