"""`samrobust evaluate`: a trained run under other attacks."""

import argparse
import pathlib
from collections.abc import Sequence

from rich.console import Console

from samrobust.checks import check
from samrobust.cli.sanity import check_surrogates, largest_balls, sanity_of_run
from samrobust.data import Dataset
from samrobust.experiments import building
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.run import work
from samrobust.experiments.scoring import Score, evaluate_run, evaluated_split
from samrobust.experiments.validation import validate
from samrobust.experiments.workdir import config_of_run
from samrobust.system import distributed
from samrobust.system.files import append_json_line, check_writable
from samrobust.system.runtime import StopRequest
from samrobust.types import Config

__all__ = ["evaluate_command", "print_accuracies"]

_EVALUATIONS = "evaluations.jsonl"
_SHARED = ("attack", "checkpoint", "batch_size")
_OF_PGD = (
    "num_steps",
    "restarts",
    "loss",
    "judge",
    "early_stop",
)
_OF_AUTOATTACK = ("version", "members")
_SANITY_EXAMPLES = 256


def evaluate_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    """Attacks a run's network again, prints and keeps the accuracies.

    Raises:
      ValueError: for flags that do not go together, or values out of range.
      CheckpointError: if the run has no intact checkpoint of that kind.
      InterruptedRunError: if it was asked to stop.
    """
    check(
        not overrides,
        "no --config overrides for evaluate",
        "The run's own config is used; see `samrobust evaluate --help`.",
        overrides=list(overrides),
    )
    workdir = pathlib.Path(arguments.workdir)
    should_stop = distributed.join(stop)
    console = make_console(quiet=not distributed.is_primary())
    config, surrogates = distributed.from_primary(lambda: _inputs(workdir, arguments))
    dataset: Dataset = building.load_data(config)
    works = work(config, dataset)
    display = ProgressDisplay(console, works[1])
    with display.live():
        score = evaluate_run(
            config,
            workdir,
            display.run(config.label, 0.0, works[1]),
            dataset=dataset,
            step=arguments.step,
            should_stop=should_stop,
            keep_examples=arguments.save_examples is True,
        )
    line = {
        **score.as_dict(),
        "evaluation": config.evaluation.to_dict(),
        "dtype": config.model.dtype,
        "num_test": len(evaluated_split(config, dataset)),
        "seed": config.seed,
    }
    print_accuracies(console, config.label, score.accuracy)
    _print_details(console, workdir, score)
    path = workdir / _EVALUATIONS
    distributed.from_primary(lambda: append_json_line(path, line))
    console.print(f"Added to {path}", highlight=False)
    if arguments.sanity:
        sanity_of_run(
            *(config, workdir, console),
            dataset=dataset,
            surrogates=surrogates,
            num_examples=arguments.sanity_examples or _SANITY_EXAMPLES,
            step=arguments.step,
            should_stop=should_stop,
        )
    return 0


def print_accuracies(console: Console, name: str, accuracy: dict[str, float]) -> None:
    """A line with the accuracy of every column."""
    cells = ", ".join(f"{column} {value:.2f}" for column, value in accuracy.items())
    console.print(f"{name}: {cells} (accuracy in %)", highlight=False)


def _print_details(console: Console, workdir: pathlib.Path, score: Score) -> None:
    """What each member of AutoAttack left, and where each example's fate is."""
    details = score.details.get("autoattack")
    if details is None:
        return
    for column, left in details["after_each"].items():
        cells = ", ".join(f"{member} {value:.2f}" for member, value in left.items())
        console.print(f"{column} after {cells}", highlight=False)
    console.print(f"What broke which image: {workdir / details['outcome']}")


def _inputs(
    workdir: pathlib.Path, arguments: argparse.Namespace
) -> tuple[Config, list[tuple[str, Config]]]:
    """The run's config, and those of the runs to transfer from."""
    number, others = arguments.sanity_examples, arguments.transfer_from or []
    check(
        arguments.sanity or not (others or number is not None),
        "--sanity with --transfer-from and --sanity-examples",
        transfer_from=others,
        sanity_examples=number,
    )
    check(
        number is None or number >= 1, "--sanity-examples >= 1", sanity_examples=number
    )
    config = _evaluation_config(workdir, arguments)
    check(
        not arguments.sanity or bool(largest_balls(config)),
        "a radius > 0 with --sanity",
        "Give --norm and --epsilon.",
        linf=config.evaluation.linf,
        l2=config.evaluation.l2,
    )
    check_writable(workdir, _EVALUATIONS)
    return config, check_surrogates(config, others)


def _evaluation_config(workdir: pathlib.Path, arguments: argparse.Namespace) -> Config:
    """The run's config with the flags written into it."""
    config = config_of_run(workdir)
    evaluation: Config = config.evaluation
    _write(evaluation, arguments, _SHARED)
    if evaluation.attack == "pgd":
        evaluation.update(version="standard", members=())  # which are not for PGD
    _check_flags(evaluation.attack, arguments)
    _write(evaluation, arguments, (*_OF_PGD, *_OF_AUTOATTACK))
    if arguments.dtype is not None:
        config.model.dtype = arguments.dtype
    if arguments.seed is not None:
        config.seed = arguments.seed
    if arguments.num_examples is not None:
        check(
            evaluation.split == "test",
            "evaluation.split=test with --num-examples",
            **{"evaluation.split": evaluation.split},
        )
        config.data.test_size = arguments.num_examples
    _set_radii(evaluation, arguments)
    validate(config)
    return config


def _write(
    evaluation: Config, arguments: argparse.Namespace, names: Sequence[str]
) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            evaluation[name] = value


def _check_flags(attack: str, arguments: argparse.Namespace) -> None:
    """Refuses flags of another attack, which would be ignored."""
    of_pgd, of_autoattack = (*_OF_PGD, "step_size"), (*_OF_AUTOATTACK, "save_examples")
    names = of_pgd if attack == "autoattack" else of_autoattack
    given = [n for n in names if getattr(arguments, n) is not None]
    check(
        not given,
        f"no {', '.join('--' + n.replace('_', '-') for n in names)} with that attack",
        "AutoAttack chooses its steps itself." if attack == "autoattack" else "",
        attack=attack,
        flags=given,
    )


def _set_radii(evaluation: Config, arguments: argparse.Namespace) -> None:
    norms, epsilons = arguments.norm or ["linf", "l2"], arguments.epsilon
    check(
        epsilons is None or len(norms) == 1,
        "one --norm with --epsilon",
        "For several norms call the command once for each.",
        norm=arguments.norm,
        epsilon=epsilons,
    )
    for norm in ("linf", "l2"):
        if norm not in norms:
            evaluation[norm] = ()
        elif epsilons is not None:
            evaluation[norm] = tuple(epsilons)
    step_size = arguments.step_size
    if step_size is not None:
        radii = [r for norm in norms for r in evaluation[norm]]
        check(
            len(radii) == 1,
            "one --norm and one --epsilon with --step-size",
            step_size=step_size,
            radii=radii,
        )
        evaluation[f"{norms[0]}_step"] = step_size / radii[0]
