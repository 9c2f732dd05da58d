"""`samrobust recheck`: the finished runs of a table under PGD and AutoAttack.

PGD with few steps may flatter a method; AutoAttack, an ensemble of stronger attacks, is
what reviewers ask for. Both judge the same images of the same networks here, and the
table of both, with its differences to ST seed by seed, says whether what a method gains
under PGD is there under AutoAttack too.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from samrobust.checks import check
from samrobust.data import Dataset
from samrobust.experiments import building, reporting
from samrobust.experiments.identity import identity_of
from samrobust.experiments.networks import Trained, load_network
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.scoring import (
    Observer,
    Score,
    Scorer,
    evaluated_split,
    evaluation_work,
)
from samrobust.experiments.validation import validate
from samrobust.experiments.workdir import config_of_run, finished_runs, read_result
from samrobust.system import distributed
from samrobust.system.distributed import from_primary
from samrobust.system.files import check_writable
from samrobust.system.runtime import StopRequest
from samrobust.types import Config

__all__ = ["recheck_command"]

_NAME = "autoattack"  # of the table's files
_SUFFIXES = {"pgd": "", "autoattack": " AA"}  # of the columns, by attack


def recheck_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    """Attacks the finished runs of a table, shows and writes what it finds.

    Of AutoAttack every run keeps what became of every example, so that the command goes
    on where it was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      CheckpointError: if a run has no intact checkpoint.
      InterruptedRunError: if it was asked to stop.
    """
    check(not overrides, "no --config overrides for recheck", overrides=overrides)
    should_stop = distributed.join(stop)
    console = make_console(quiet=not distributed.is_primary())
    workdir = pathlib.Path(arguments.workdir)
    runs = from_primary(
        lambda: {
            path: {attack: _config(config, attack, arguments) for attack in _SUFFIXES}
            for path, config in finished_runs(workdir, arguments.rows or ()).items()
        }
    )
    from_primary(lambda: check_writable(workdir))
    judge = _Judge(should_stop)
    datasets = [judge.dataset(configs["pgd"]) for configs in runs.values()]
    works = [
        sum(evaluation_work(config, dataset) for config in configs.values())
        for configs, dataset in zip(runs.values(), datasets, strict=True)
    ]
    display, results = ProgressDisplay(console, sum(works)), []
    with display.live():
        for (path, configs), cost in zip(runs.items(), works, strict=True):
            config = configs["pgd"]
            shown = display.run(f"{config.label}, seed {config.seed}", 0.0, cost)
            results.append(judge.result(configs, workdir / path, shown))
    from_primary(lambda: _conclude(workdir, runs, results, console))
    return 0


def _config(config: Config, attack: str, arguments: argparse.Namespace) -> Config:
    """Returns a run's config with the flags written into it."""
    config = config.copy_and_resolve_references()
    evaluation: Config = config.evaluation
    evaluation.attack = attack
    if attack == "autoattack":
        if arguments.version is not None:
            evaluation.update(version=arguments.version, members=())
        if arguments.members is not None:
            evaluation.members = tuple(arguments.members)
    else:
        evaluation.update(version="standard", members=())  # which are not for PGD
    for norm in ("linf", "l2"):
        if getattr(arguments, norm) is not None:
            evaluation[norm] = tuple(getattr(arguments, norm))
    check(
        bool(evaluation.linf or evaluation.l2),
        "radii to attack at",
        "Give --linf or --l2.",
        linf=evaluation.linf,
        l2=evaluation.l2,
    )
    if arguments.dtype is not None:
        config.model.dtype = arguments.dtype
    if arguments.batch_size is not None:
        evaluation.batch_size = arguments.batch_size
    if arguments.num_examples is not None:
        check(
            evaluation.split == "test",
            "runs judged on test images with --num-examples",
            **{"evaluation.split": evaluation.split},
        )
        config.data.test_size = arguments.num_examples
    validate(config)
    return config


class _Judge:
    """Judge of one run after the other; runs alike share data and compiled programs."""

    def __init__(self, should_stop: Callable[[], bool]):
        self._should_stop = should_stop
        self._datasets: dict[str, Dataset] = {}
        self._scorers: dict[tuple[str, ...], Scorer] = {}

    def dataset(self, config: Config) -> Dataset:
        """Returns the data set of a config."""
        key = config.data.to_json_best_effort()
        if key not in self._datasets:
            self._datasets[key] = building.load_data(config)
        return self._datasets[key]

    def result(
        self, configs: dict[str, Config], folder: pathlib.Path, shown: Observer
    ) -> dict[str, Any]:
        """Returns what a run reports, with the accuracies under every attack."""
        config = configs["pgd"]
        dataset = self.dataset(config)
        checkpoint = config.evaluation.checkpoint
        network = load_network(config, dataset, folder, checkpoint)
        scores = {
            attack: self._score(configs[attack], folder, network, shown)
            for attack in _SUFFIXES
        }
        accuracy = {"natural": scores["pgd"].accuracy["natural"]}
        for attack, suffix in _SUFFIXES.items():
            for name, value in scores[attack].accuracy.items():
                if name != "natural":
                    accuracy[f"{name}{suffix}"] = value
        return {
            **scores["autoattack"].as_dict(),
            "dataset": config.data.name,
            "row": config.row,
            "seed": config.seed,
            "accuracy": accuracy,
            "num_test": len(evaluated_split(config, dataset)),
            "pgd_provenance": scores["pgd"].provenance,
            "training_provenance": from_primary(lambda: _provenance_of(folder)),
        }

    def _score(
        self,
        config: Config,
        folder: pathlib.Path,
        network: Trained,
        shown: Observer,
    ) -> Score:
        sections = (config.data, config.model, config.evaluation)
        key = tuple(section.to_json_best_effort() for section in sections)
        if key not in self._scorers:
            self._scorers[key] = Scorer(config, self.dataset(config))
        return self._scorers[key](network, folder, shown, self._should_stop)


def _provenance_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns where a finished run was trained."""
    result = read_result(folder, identity_of(config_of_run(folder), None))
    return {} if result is None else result["provenance"]


def _conclude(
    workdir: pathlib.Path,
    runs: dict[str, dict[str, Config]],
    results: list[dict[str, Any]],
    console: Console,
) -> None:
    """Shows and writes the table."""
    configs = [configs["pgd"] for configs in runs.values()]
    first = configs[0]
    table = reporting.summarize(
        results,
        rows=list({config.row: config.label for config in configs}.items()),
        title=f"PGD and AutoAttack on {first.data.name}",
        caption=_caption(next(iter(runs.values()))["autoattack"]),
    )
    console.print(reporting.to_rich(table))
    paths = reporting.write_table(table, workdir, _NAME)
    names = ", ".join(path.name for path in paths)
    console.print(f"Written to {workdir}: {names}", highlight=False)


def _caption(config: Config) -> str:
    evaluation = config.evaluation
    members = ", ".join(evaluation.members)
    return (
        f"{config.data.name}, {evaluation.split} images, {evaluation.checkpoint} "
        f"checkpoint, {config.model.dtype}. AA: AutoAttack, {evaluation.version}"
        f"{f' ({members})' if members else ''}; the columns beside it: PGD-"
        f"{evaluation.num_steps} on the {evaluation.loss} loss, {evaluation.judge} "
        "iterate judged."
    )
