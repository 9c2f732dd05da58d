"""`samrobust recheck`: the finished runs of a table under PGD and AutoAttack.

PGD with few steps may flatter a method; AutoAttack, an ensemble of stronger attacks, is
what reviewers ask for. Both judge the same images of the same networks here. The table
of both, with its differences to ST seed by seed, shows whether a method keeps under
AutoAttack what it gains under PGD.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from samrobust.checks import NORMS, check
from samrobust.cli import flags

if TYPE_CHECKING:
    from rich.console import Console

    from samrobust.experiments.reporting.progress import RunDisplay
    from samrobust.experiments.scoring import Score
    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]

_NAME = "autoattack"  # of the table's files
_ATTACKS = ("pgd", "autoattack")


ABOUT = {
    "help": "the runs of a table under AutoAttack, next to PGD",
    "description": "Attacks every finished run of a table with its PGD and with "
    "AutoAttack, on the same images, and writes the table of both: autoattack.md, "
    f".csv, .json and .png. {flags.SHARED}",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the table")
    add("--rows", **flags.ROWS, help="only these; default: all")
    add("--version", **flags.VERSION)
    add("--members", **flags.MEMBERS)
    for norm in NORMS:
        radii = "radii in 1/255; default: the table's"
        add(f"--{norm}", **flags.radii(norm), help=radii)
    images = "test images, evenly spread; default: the table's"
    add("--num-examples", **flags.COUNT, help=images)
    add("--batch-size", **flags.COUNT, help="default: the table's")
    add("--dtype", **flags.PRECISION, help="of the networks; default: the table's")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Attacks the finished runs of a table, shows and writes what it finds.

    AutoAttack stores the outcome of every example beside each run, so a rerun resumes
    where the command was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      CheckpointError: if no run has a network that can be read.
      InterruptedRunError: if it was asked to stop.
    """
    from samrobust.cli import shared
    from samrobust.cli.measuring import FinishedRuns
    from samrobust.experiments import networks, scoring
    from samrobust.experiments.reporting.results import num_steps
    from samrobust.system.distributed import broadcast_from_primary

    opened = FinishedRuns(arguments, stop)
    console, workdir, load_data = opened.console, opened.workdir, opened.load_data
    runs = broadcast_from_primary(
        lambda: {
            path: {attack: _config(config, attack, arguments) for attack in _ATTACKS}
            for path, config in opened.configs.items()
        }
    )
    scorer = shared.once_per(
        lambda c: scoring.Scorer(c, load_data(c)),
        *("data", "model", "evaluation", "training"),  # of that its batch size
    )
    trained = opened.read_results()

    works = {
        path: [scoring.evaluation_work(c, load_data(c)) for c in by_attack.values()]
        for path, by_attack in runs.items()
    }

    def judge(path: str, shown: "RunDisplay") -> dict[str, Any]:
        configs, scores = runs[path], {}
        config = configs["pgd"]
        dataset, judged = load_data(config), networks.checkpoints_of(config)
        parts = iter(scoring.in_parts(shown.on_batch, works[path] * len(judged)))
        for which in judged:
            network = opened.load_network(path, config, which)
            pgd, autoattack = (
                scorer(configs[attack])(
                    network, workdir / path, next(parts), opened.should_stop
                )
                for attack in _ATTACKS
            )
            scores[which] = _beside(pgd, autoattack)
        return {
            **scoring.as_result(scores),
            "dataset": config.data.name,
            "row": config.row,
            "seed": config.seed,
            "num_test": len(scoring.evaluated_split(config, dataset)),
            "training_steps": num_steps(trained[path]),
            "training_provenance": trained[path]["provenance"],
        }

    total = {path: sum(parts) for path, parts in works.items()}
    results = list(opened.judge_each(judge, total).values())

    def conclude() -> tuple[pathlib.Path, ...]:
        readable = {path: runs[path] for path in opened.configs}
        with opened.concluding():
            return _conclude(workdir, readable, results, console)

    shared.show_written(console, workdir, broadcast_from_primary(conclude))
    return opened.exit_code


def _config(config: "Config", attack: str, arguments: argparse.Namespace) -> "Config":
    """Returns a run's config for an attack, with the flags written into it."""
    from samrobust.cli.shared import apply_flags
    from samrobust.experiments.validation import validate

    own = {"version": None, "members": None} if attack == "pgd" else {}
    config = apply_flags(config, vars(arguments) | own | {"attack": attack})
    evaluation = config.evaluation
    check(
        bool(evaluation.linf or evaluation.l2),
        "radii to attack at",
        "Give --linf or --l2.",
        linf=evaluation.linf,
        l2=evaluation.l2,
    )
    validate(config)
    return config


def _beside(pgd: "Score", autoattack: "Score") -> "Score":
    """Returns AutoAttack's score of a network with PGD's columns beside its own."""
    details = dict(autoattack.details)
    if "column_provenance" in details:
        details["column_provenance"] = _named(details["column_provenance"])
    return autoattack._replace(
        accuracy=pgd.accuracy | _named(autoattack.accuracy),
        details={**details, "pgd_provenance": pgd.provenance},
    )


def _named(under_autoattack: Mapping[str, Any]) -> dict[str, Any]:
    """Returns columns of AutoAttack by the names they have beside PGD's.

    >>> _named({"natural": 90.0, "linf 8/255": 40.0})
    {'linf 8/255 AA': 40.0}
    """
    named = under_autoattack.items()
    return {f"{name} AA": value for name, value in named if name != "natural"}


def _conclude(
    workdir: pathlib.Path,
    runs: "Mapping[str, dict[str, Config]]",
    results: list[dict[str, Any]],
    console: "Console",
) -> tuple[pathlib.Path, ...]:
    """Shows and writes the table."""
    from samrobust.cli.shared import passes_of
    from samrobust.experiments import reporting
    from samrobust.experiments.reporting import names

    configs = [by_attack["pgd"] for by_attack in runs.values()]
    by_row = {config.row: config for config in configs}
    first, name = configs[0], configs[0].data.name
    pgd, autoattack = (c.evaluation for c in next(iter(runs.values())).values())
    table = reporting.summarize(
        results,
        rows=[(row, config.label) for row, config in by_row.items()],
        passes=passes_of(results, by_row),
        title=f"PGD and AutoAttack on {name}",
        caption=f"{name}, {pgd.split} images, {names.checkpoint_in_words(pgd)}, "
        f"{first.model.dtype}. AA: {names.attack_in_words(autoattack)}; the columns "
        f"beside it: {names.attack_in_words(pgd)}.",
    )
    console.print(reporting.to_rich(table))
    return reporting.write_table(table, workdir, _NAME)
