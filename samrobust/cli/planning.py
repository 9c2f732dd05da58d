"""Runs of a table as a command line asks for them: flags, and the plan they make."""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from samrobust.checks import LARGEST_SEED, check, check_whole
from samrobust.cli import flags

if TYPE_CHECKING:
    from samrobust.experiments.run import PlannedRun
    from samrobust.types import Config

__all__ = ["Plan", "add_plan_flags", "make_plan"]


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which runs a table has."""
    add = parser.add_argument
    add("--config", **flags.CONFIG, default="configs/digits.py")
    add("--workdir", **flags.WORKDIR, help="default: runs/NAME for configs/NAME.py")
    seeds = "runs of a row, 0 .. N-1; with --config.seed=S: S .. S+N-1"
    add("--seeds", **flags.FEW, default=1, help=seeds)
    program = "seeds of a row to train together, as one program on one device"
    add("--seeds-per-program", **flags.FEW, default=1, help=program)
    rows = (
        "only these, as in --rows=st --rows=sam,rho=0.2; or separated by ';'; "
        "FILE.py:NAME stands for a list of that name in a config file"
    )
    add("--rows", **flags.ROWS, help=rows)
    add(
        "--shard",
        metavar="I/N",
        help="every N-th run from the I-th on (0 <= I < N) and no other; of `table`, "
        "the worker that finishes the last run of all builds the table",
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table as it is asked for.

    Attributes:
      workdir: of the table.
      configs: by row, in order.
      runs: all of them, the first seed of every row first: the whole table comes
        before its spread.
      shard: which of them this process is to do.
      note: what was changed from the config file, a sentence or empty.
    """

    workdir: pathlib.Path
    configs: "dict[str, Config]"
    runs: "Sequence[PlannedRun]"
    shard: slice
    note: str


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Builds the plan of a command line.

    Raises:
      ValueError: for rows, fields or values that are not valid, and for rows that are
        not judged alike.
    """
    from samrobust.experiments import config_files, configuration
    from samrobust.experiments.reporting.results import check_comparable
    from samrobust.experiments.run import PlannedRun
    from samrobust.experiments.trunks import plan_trunks
    from samrobust.experiments.workdir import run_folder
    from samrobust.system.fields import is_among

    name = pathlib.Path(arguments.config).stem
    workdir = arguments.workdir or pathlib.Path("runs", name)
    rows = config_files.rows_named(arguments.rows or ())
    configs = {
        row: configuration.load_config(f"{arguments.config}:{row}", arguments.overrides)
        for row in rows or config_files.load_rows(arguments.config)
    }
    shaping = {row: configuration.shaping_fields(c) for row, c in configs.items()}
    check_comparable(shaping, "Make one table for each.")

    def seeded(row: str, seed: int) -> "Config":
        check_whole(0, LARGEST_SEED, seed=seed)
        config = configs[row].copy_and_resolve_references()
        config.seed = seed
        return config

    folders = {
        run_folder(workdir, row, config.seed + i): seeded(row, config.seed + i)
        for i in range(arguments.seeds)
        for row, config in configs.items()
    }
    shared = plan_trunks(workdir, folders)
    runs = [PlannedRun(config, path, shared[path]) for path, config in folders.items()]
    given = [item.removeprefix("--config.") for item in arguments.overrides]
    # Nor where to: what changes no number is nothing that a reader has to know.
    silent = configuration.CHANGES_NO_RESULT
    told = (item for item in given if not is_among(item.partition("=")[0], silent))
    changed = ", ".join(told)
    note = f" Changed from {arguments.config}: {changed}." if changed else ""
    return Plan(workdir, configs, runs, _shard(arguments.shard), note)


def _shard(text: str | None) -> slice:
    """Reads which runs `--shard` names."""
    if text is None:
        return slice(None)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    fix = "The first of four shards is --shard=0/4, the last one --shard=3/4."
    check(index < count, "--shard=I/N with 0 <= I < N", fix, shard=text)
    return slice(index, None, count)
