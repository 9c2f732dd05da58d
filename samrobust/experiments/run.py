"""Experiments: a run trains, evaluates, and leaves its `result.json`.

Everything here can be killed at any moment and started again with the same call:
a finished run is read, another one goes on from its last checkpoint.
"""

import contextlib
import dataclasses
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from samrobust.attacks import ATTACKS_VERSION
from samrobust.data import Dataset, fingerprint
from samrobust.experiments import building, methods, scoring, trunks
from samrobust.experiments.identity import Identity, check_alike, identity_of
from samrobust.experiments.networks import Trained, checkpoints_of, load_network
from samrobust.experiments.tracking import Tracking
from samrobust.experiments.workdir import OtherConfigError, read_result, settle_config
from samrobust.system.claims.lease import Claim, ClaimedError, claim
from samrobust.system.distributed import broadcast_from_primary, lost_a_peer
from samrobust.system.failures import is_transient, recording_failure
from samrobust.system.fields import differences
from samrobust.system.files import (
    WorkdirError,
    read_json_lines,
    read_sealed,
    write_sealed,
)
from samrobust.system.provenance import provenance
from samrobust.training import FitResult, InterruptedRunError, Progress, fit
from samrobust.training.fit import Validate
from samrobust.training.lockstep import Companion
from samrobust.training.trunks import BranchFolder
from samrobust.types import Config

__all__ = ["PlannedRun", "run", "train", "work"]

_SCORES = "scores.json"  # of the checkpoints judged so far, until there is a result


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A row of a table with a seed: its config, its workdir, the trunks it shares."""

    config: Config
    workdir: pathlib.Path
    shared: Sequence[trunks.PlannedTrunk] = ()

    @property
    def name(self) -> str:
        """For messages: `SAM (rho = 0.2), seed 1`."""
        return f"{self.config.label}, seed {self.config.seed}"

    @property
    def has_result(self) -> bool:
        """Says whether there is a result, of whatever config: the file alone counts."""
        return (self.workdir / "result.json").exists()


def work(config: Config, dataset: Dataset) -> tuple[float, float]:
    """Returns the predicted cost of training and of evaluation, for an ETA.

    Returns:
      Both in forward and backward passes with weight gradients on one example: a
      forward pass is 1/3, an attack step 2/3.

    Raises:
      ValueError: as `scoring.evaluation_work`.
    """
    training = len(dataset.train) * methods.training_cost(config)
    return training, scoring.evaluation_work(config, dataset)


def run(
    config: Config,
    workdir: pathlib.Path,
    observer: scoring.Observer,
    *,
    dataset: Dataset,
    should_stop: Callable[[], bool] = lambda: False,
    companion: Companion | None = None,
    shared: Sequence[trunks.PlannedTrunk] = (),
) -> dict[str, Any]:
    """Trains and evaluates one row, or goes on where that was stopped.

    Args:
      config: validated.
      workdir: receives config.json, metrics.jsonl, checkpoints/ and result.json.
      observer: is told of progress.
      dataset: that of `config.data`.
      should_stop: asked now and then; see `samrobust.training.fit`.
      companion: see there.
      shared: what it has in common with other runs, so that it is trained once.

    Of several processes all must call this; 0 alone sees the workdir.

    Returns:
      The content of `result.json`.

    Raises:
      InterruptedRunError: after `should_stop`; the same call goes on.
      TrainingDivergedError: if the loss stops being finite.
      ClaimedError: if another process works in the workdir, or took it over.
      WorkdirError: if the workdir cannot be written, or holds another run, or a result
        of another run or of other images.

    Any failure of the run itself is also left in `failure.json`.
    """
    claims: list[Claim] = []  # of process 0
    tracking = Tracking(config, workdir)
    with contextlib.ExitStack() as held:

        def begin() -> dict[str, Any] | None:
            claims.append(held.enter_context(claim(workdir)))
            held.enter_context(recording_failure(workdir, is_failure=_is_failure))
            held.enter_context(contextlib.closing(tracking))
            settle_config(workdir, config)
            result = read_result(workdir, identity_of(config, dataset))
            if result is not None:
                _check_images(result, config, dataset, workdir)
                (workdir / _SCORES).unlink(missing_ok=True)  # of a kill just before
            return result

        result = broadcast_from_primary(begin)
        check_alike(config, dataset)
        if result is not None:
            return result
        on_progress = observer.on_progress
        for mine in claims:
            should_stop = mine.guard(should_stop)
            on_progress = tracking.following(on_progress)
        outcome = train(
            config,
            dataset,
            workdir,
            on_progress=on_progress,
            should_stop=should_stop,
            may_write=lambda: claims[0].confirm(),
            companion=companion,
            shared=shared,
        )
        identity = outcome.identity
        assert isinstance(identity, Identity)  # it was given to the log
        evaluate = scoring.Scorer(config, dataset)
        images = fingerprint(scoring.evaluated_split(config, dataset))
        scores = broadcast_from_primary(lambda: _read_scores(workdir, images))

        def keep() -> None:
            claims[0].confirm()
            stored = {which: score._asdict() for which, score in scores.items()}
            write_sealed(workdir / _SCORES, stored)

        judged = checkpoints_of(config)
        parts = scoring.in_parts(observer.on_batch, [1] * len(judged))
        for which, part in zip(judged, parts, strict=True):
            if which == "last":
                model = building.make_model(config, dataset)
                variables = outcome.state.eval_variables
                network = Trained(model, variables, config, outcome.step, identity)
            else:
                network = load_network(config, dataset, workdir, which)
            known = (score for score in scores.values() if score.is_of(network))
            scores[which] = next(known, None) or evaluate(
                network, workdir, part, should_stop
            )
            broadcast_from_primary(keep)

        def finish() -> dict[str, Any]:
            result = _describe(config, dataset, outcome, identity, scores)
            lines = read_json_lines(workdir / "metrics.jsonl")
            if origin := trunks.trained_by(lines):
                result["provenance"]["trunk"] = origin
            claims[0].confirm()
            tracking.finish(result["accuracy"])  # first: it may be repeated
            write_sealed(workdir / "result.json", result)
            (workdir / _SCORES).unlink(missing_ok=True)
            return result

        return broadcast_from_primary(finish)


def train(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    validate: Validate | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    may_write: Callable[[], None] = lambda: None,
    companion: Companion | None = None,
    shared: Sequence[trunks.PlannedTrunk] = (),
) -> FitResult:
    """Trains a row, or the rest of one that was stopped.

    Args:
      config: validated.
      dataset: that of `config.data`.
      workdir: receives `metrics.jsonl` and `checkpoints/`; claimed by the caller.
      validate: see `samrobust.training.fit`; None: accuracy on the held-out images, if
        there are some.
      on_progress: see `samrobust.training.fit`.
      should_stop: see there.
      may_write: called before each checkpoint, by process 0; raises if not.
      companion: see `samrobust.training.fit`.
      shared: what it has in common with other runs; begun with where one has left it,
        and left to them.

    Raises:
      ValueError: if the batches, groups and devices do not fit the data, or radii the
        images.

    And as `samrobust.training.fit`.
    """
    training = config.training
    building.check_images(config, dataset)
    plan = building.make_plan(config, len(dataset.train))
    log = BranchFolder(
        workdir,
        minutes=config.checkpoint.minutes,
        keep=config.checkpoint.keep,
        identity=identity_of(config, dataset),
        may_write=may_write,
        clock=time.monotonic if companion is None else companion.clock,
        trunks=[
            trunks.make_trunk(planned, workdir, dataset, plan.num_steps)
            for planned in shared
        ],
    )
    judge = scoring.make_judge(config, dataset)
    labels = dataset.validation.labels
    built = building.make_training(config, dataset, plan.num_steps)
    return fit(
        built.method,
        dataset.train,
        epochs=training.epochs,
        batch_size=training.batch_size,
        key=jax.random.key(config.seed),
        earlier=built.earlier,
        **building.augmentation(config),
        drop_remainder=training.drop_remainder,
        replays=plan.replays,
        steps_per_call=training.steps_per_call,
        deterministic=training.deterministic,
        log=log,
        schedules={"learning_rate": built.learning_rate},
        after_epoch=scoring.make_after_epoch(judge, labels, built.admit),
        validate=validate or scoring.make_validate(judge),
        on_progress=on_progress,
        should_stop=should_stop,
        companion=companion,
    )


def _read_scores(workdir: pathlib.Path, images: str) -> dict[str, scoring.Score]:
    """Returns the scores that a stop between two has left, by today's attacks."""
    try:
        stored = read_sealed(workdir / _SCORES) or {}
    except WorkdirError as error:  # it saves time alone
        warnings.warn(f"{error} All checkpoints are judged.", stacklevel=2)
        return {}
    wanted = {"images": images, "attacks_version": ATTACKS_VERSION}
    return {
        which: scoring.Score(**fields)
        for which, fields in stored.items()
        if fields.items() >= wanted.items()
    }


def _is_failure(error: Exception) -> bool:
    """Tells whether what ends a run is its failure, not that of its surroundings."""
    others = (InterruptedRunError, ClaimedError, OtherConfigError)
    passes = lost_a_peer(error) or is_transient(error)
    return not (isinstance(error, others) or passes)


def _check_images(
    result: dict[str, Any], config: Config, dataset: Dataset, workdir: pathlib.Path
) -> None:
    """Refuses a result on other images than those at hand."""
    images = fingerprint(scoring.evaluated_split(config, dataset))
    if result["images"] != images:
        raise WorkdirError(
            f"Expected a result on the {config.evaluation.split} images at hand in "
            f"{workdir}, got one on others: {result['images']}, not {images}. Restore "
            "the data, or choose another --workdir."
        )


def _describe(
    config: Config,
    dataset: Dataset,
    outcome: FitResult,
    identity: Identity,
    scores: Mapping[str, scoring.Score],
) -> dict[str, Any]:
    """Returns the content of `result.json`."""
    made = provenance()
    return {
        "dataset": config.data.name,
        "row": config.row,
        "label": config.label,
        "seed": config.seed,
        **scoring.as_result(scores),
        **_judged_elsewhere(next(iter(scores.values())), made),
        "run": identity.as_dict(),
        "num_test": len(scoring.evaluated_split(config, dataset)),
        "split": config.evaluation.split,
        "checkpoint": config.evaluation.checkpoint,
        "training_steps": outcome.step,  # `step` is that of the network judged
        "training_seconds": outcome.seconds,
        "step_seconds": outcome.step_seconds,
        "provenance": made | {"seconds": outcome.seconds},
    }


def _judged_elsewhere(score: scoring.Score, made: dict[str, Any]) -> dict[str, Any]:
    """Returns who judged each column of a score, unless it was as `made` says.

    A stop between two checkpoints, or after AutoAttack, leaves them to another process.
    """
    if differences(score.provenance, made).keys() <= {"date"}:
        return {}
    columns = dict.fromkeys(score.accuracy, score.provenance)
    return {"column_provenance": columns | score.details.get("column_provenance", {})}
