"""`samrobust table`: all rows of a config, as one worker or as one of many."""

import argparse
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from samrobust.checks import check, naming
from samrobust.cli import flags
from samrobust.cli.planning import Plan, add_plan_flags, make_plan
from samrobust.system.runtime import FAILED

if TYPE_CHECKING:
    from rich.console import Console

    from samrobust.data import Dataset
    from samrobust.experiments.reporting.progress import RunDisplay
    from samrobust.experiments.run import PlannedRun
    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]


ABOUT = {
    "help": "all rows of a config, trained, attacked and printed as a table",
    "description": "Trains and attacks every row of a config's table. Can be killed "
    f"at any moment. {flags.SHARED}",
    "epilog": flags.ANY_FIELD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add_plan_flags(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--collect",
        action="store_true",
        help="train nothing: build the table of the finished runs, list missing ones; "
        "exit code 0: none is missing, 1: some are, 2: all are",
    )
    instead.add_argument(
        "--list",
        action="store_true",
        help="train nothing: print the runs, one per line: index, row, seed, state, "
        "separated by tabs",
    )


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Trains and shows a table, or lists or collects it; returns the exit code.

    Raises:
      ValueError: for flags, rows, fields or values that are not valid.
      WorkdirError: if the workdir cannot be written; with `--collect` if nothing has
        finished.
      ClaimedError: if the workdir was removed or moved meanwhile.
    """
    from samrobust.cli.shared import join, once_per, open_workdir
    from samrobust.experiments import building, sweep
    from samrobust.experiments.rehearsal import rehearse
    from samrobust.experiments.reporting.console import make_console
    from samrobust.experiments.tracking import check_trackers
    from samrobust.experiments.trunks import remove_finished
    from samrobust.system.distributed import broadcast_from_primary, starts_first

    check(
        not (arguments.collect and arguments.shard),
        "--collect without --shard",
        "The table is made of all runs.",
        shard=arguments.shard,
    )
    plan = make_plan(arguments)
    if arguments.list or arguments.collect:
        if not starts_first():
            return 0
        if arguments.list:
            return _list(plan)
        return _conclude(plan, arguments, make_console(), {})
    check_trackers(plan.runs[0].config, plan.workdir)
    should_stop, console = join(stop)
    share = plan.runs[plan.shard]
    sweep.check_seeds_per_program(arguments.seeds_per_program, share)
    broadcast_from_primary(lambda: sweep.refuse_other_configs(plan.workdir, plan.runs))
    confirm = open_workdir(plan.workdir)
    load_data = once_per(building.load_data, "data")
    done = broadcast_from_primary(lambda: [planned.has_result for planned in plan.runs])
    left = [p for p, is_done in zip(plan.runs, done, strict=True) if not is_done]
    for planned in {planned.config.row: planned for planned in left}.values():
        with naming(planned.config.label):  # before hours of others, here or elsewhere
            rehearse(planned.config, load_data(planned.config))
    works = _foresee(share, done[plan.shard], load_data)
    broadcast_from_primary(confirm)
    broadcast_from_primary(lambda: sweep.record_plan(plan.workdir, plan.runs))
    how = console, should_stop, arguments.seeds_per_program, confirm
    failed = _train(share, works, load_data, *how) if share else {}
    broadcast_from_primary(confirm)
    shared = [trunk for planned in plan.runs for trunk in planned.shared]
    broadcast_from_primary(lambda: remove_finished(shared))
    broadcast_from_primary(lambda: _conclude(plan, arguments, console, failed))
    return FAILED if failed else 0


def _list(plan: Plan) -> int:
    """Prints the runs for programs to read: nothing else goes to standard output."""
    from samrobust.experiments.survey import survey_run

    for index in range(len(plan.runs))[plan.shard]:
        planned = plan.runs[index]
        config, state = planned.config, survey_run(planned.workdir).state
        print(index, config.row, config.seed, state, sep="\t")
    return 0


Works: TypeAlias = dict[pathlib.Path, tuple[float, float, float]]


def _foresee(
    runs: "Sequence[PlannedRun]",
    done: Sequence[bool],
    load_data: "Callable[[Config], Dataset]",
) -> Works:
    """Returns what the training, the judging and the epochs given of each run cost."""
    from samrobust.experiments.run import work
    from samrobust.experiments.trunks import epochs_given

    works: Works = {}
    given = epochs_given(planned.shared for planned in runs)
    for planned, is_done, first in zip(runs, done, given, strict=True):
        config, training, judged = planned.config, 0.0, 0.0
        if not is_done:
            dataset = load_data(config)
            with naming(config.label):
                training, judged = work(config, dataset)
        left = training * first / config.training.epochs
        works[planned.workdir] = training, judged, left
    return works


def _train(
    runs: "Sequence[PlannedRun]",
    works: Works,
    load_data: "Callable[[Config], Dataset]",
    console: "Console",
    should_stop: Callable[[], bool],
    seeds_per_program: int,
    confirm: Callable[[], None],
) -> dict[pathlib.Path, str]:
    """Trains and attacks a share; returns which runs failed, and why.

    Process 0 calls `confirm` before each attempt: it raises if the workdir is gone.
    """
    from samrobust.cli.shared import show_failures
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.experiments.sweep import run_all
    from samrobust.system.distributed import broadcast_from_primary

    total = sum(training + judged - left for training, judged, left in works.values())
    display = ProgressDisplay(console, total)
    failed: dict[pathlib.Path, str] = {}

    def observe(group: "Sequence[PlannedRun]") -> "list[RunDisplay]":
        broadcast_from_primary(confirm)
        return display.run_together({p.name: works[p.workdir] for p in group})

    def on_wait(held: "Sequence[PlannedRun]") -> None:
        display.wait_for(planned.name for planned in held)

    with display.live():
        run_all(
            runs,
            load_data,
            observe,
            on_failure=lambda planned, why: failed.update({planned.workdir: why}),
            on_wait=on_wait,
            should_stop=should_stop,
            seeds_per_program=seeds_per_program,
        )
    why = {p.name: failed[p.workdir] for p in runs if p.workdir in failed}
    show_failures(console, why)
    return failed


def _conclude(
    plan: Plan,
    arguments: argparse.Namespace,
    console: "Console",
    failed: Mapping[pathlib.Path, str],
) -> int:
    """Shows the table of the finished runs, and which are missing."""
    from samrobust.experiments.sweep import collect
    from samrobust.system.files import WorkdirError

    results, missing = collect(plan.runs, failed)
    total, shard = len(plan.runs), arguments.shard
    if results and not (missing and shard):
        _show(plan, results, console)
    elif missing and shard:
        console.print(
            f"This share is done. {len(missing)} of the table's {total} runs are "
            "missing: `samrobust status` shows them, and the same command with "
            f"--collect instead of --shard={shard} builds the table."
        )
    told = [  # of training it was said why a run has no result, but not of one that has
        (planned.name, why)
        for planned, why in missing
        if planned.workdir not in failed and (arguments.collect or planned.has_result)
    ]
    for why in dict.fromkeys(why for _, why in told):
        names = "; ".join(name for name, its in told if its == why)
        console.print(f"missing {names}: {why}")
    if not arguments.collect:
        return 0
    if not results:
        raise WorkdirError(
            f"Expected a finished run in {plan.workdir}, got none of the {total}. "
            "Train them first: the same command without --collect."
        )
    return FAILED if missing else 0


def _show(plan: Plan, results: list[dict[str, Any]], console: "Console") -> None:
    """Prints and writes the table."""
    from samrobust.cli.shared import passes_of, show_written
    from samrobust.experiments import reporting
    from samrobust.experiments.workdir import concluding

    configs = list(plan.configs.values())
    table = reporting.summarize(
        results,
        rows=[(row, c.label) for row, c in plan.configs.items()],
        paper={row: dict(c.paper) for row, c in plan.configs.items() if c.paper},
        passes=passes_of(results, plan.configs),
        title=f"Natural and robust accuracy on {configs[0].data.name}",
        caption=_caption(configs) + plan.note,
    )
    console.print(reporting.to_rich(table))
    with concluding(plan.workdir):
        paths = reporting.write_table(table, plan.workdir)
    show_written(console, plan.workdir, paths)


def _caption(configs: "Sequence[Config]") -> str:
    """Returns the training and the judging of all rows that do not name another."""
    from samrobust.experiments.reporting import names

    def told(named: str, say: "Callable[[Config], str]") -> str:
        """Returns what is to say of the rows whose names leave it open, or of all."""
        silent = [c for c in configs if not re.search(f",{named}", c.row)]
        return " or ".join(filter(None, dict.fromkeys(map(say, silent or configs))))

    def images(config: "Config") -> str:
        size = config.data.train_size
        return "" if size is None else f"{size:,} training images"

    first, evaluation = configs[0], configs[0].evaluation
    data = (
        first.data.name,
        told(r"data\.train_size=", images),
        f"{evaluation.split} set",
    )
    training = (
        told(r"model\.(?!dtype=)", _network_in_words),
        told(r"training\.epochs=", lambda c: f"{c.training.epochs} epochs"),
        first.model.dtype,
    )
    judged = names.attack_in_words(evaluation), names.checkpoint_in_words(evaluation)
    parts = (", ".join(filter(None, part)) for part in (data, training, judged))
    return "; ".join(parts) + "."


def _network_in_words(config: "Config") -> str:
    from samrobust.experiments.components import model_fields

    model = config.model
    fields = [
        f"{name} {'-'.join(map(str, v)) if isinstance(v, tuple | list) else v}"
        for name in model_fields(model.name)
        for v in (model[name],)
    ]
    return f"{model.name} of {', '.join(fields)}" if fields else model.name
