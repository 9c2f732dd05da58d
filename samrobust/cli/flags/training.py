"""The flags of `samrobust table`, `train` and `status`."""

import argparse

from samrobust.cli.flags.kinds import few, file_and_row, local_path, row_names

__all__ = ["add_status", "add_table", "add_train"]

_CONFIG = "configs/digits.py"


def add_table(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust table`."""
    table = commands.add_parser(
        "table",
        allow_abbrev=False,
        help="all rows of a config, trained, attacked and printed as a table",
        description="Trains and attacks every row of a config's table. Can be killed "
        "and started again: finished runs are kept, the others go on. Several workers "
        "may share a workdir, each takes what no other holds.",
        epilog="Any field: --config.training.epochs=2. See configs/base.py.",
    )
    table.add_argument(
        "--config",
        type=file_and_row,
        default=_CONFIG,
        metavar="FILE",
        help="%(default)s",
    )
    table.add_argument(
        "--workdir",
        type=local_path,
        metavar="DIR",
        help="default: runs/NAME for configs/NAME.py",
    )
    table.add_argument(
        "--seeds",
        type=few,
        default=1,
        metavar="N",
        help="runs a row, 0 .. N-1; --config.seed=S: S .. S+N-1",
    )
    table.add_argument(
        "--rows",
        type=row_names,
        action="append",
        metavar="ROW",
        help="only these, as in --rows=st --rows=sam,rho=0.2; or separated by ';'",
    )
    table.add_argument(
        "--shard",
        metavar="I/N",
        help="train every N-th run from the I-th on (0 <= I < N) and no other; whoever "
        "finishes the last run of all builds the table",
    )
    instead = table.add_mutually_exclusive_group()
    instead.add_argument(
        "--collect",
        action="store_true",
        help="train nothing: build the table of what has finished, say what is "
        "missing; exit code 0: nothing, 1: something, 2: everything",
    )
    instead.add_argument(
        "--list",
        action="store_true",
        help="train nothing: print the runs, a line each: index, row, seed, state, "
        "separated by tabs",
    )


def add_train(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust train`."""
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="one row: train, attack, write result.json",
        description="Trains and attacks one row. Goes on where it was stopped.",
        epilog="Any field: --config.training.epochs=2. See configs/base.py.",
    )
    train.add_argument(
        "--config",
        type=file_and_row,
        required=True,
        metavar="FILE:ROW",
        help="configs/digits.py:st",
    )
    train.add_argument(
        "--workdir", type=local_path, required=True, metavar="DIR", help="of this run"
    )


def add_status(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust status`."""
    status = commands.add_parser(
        "status",
        allow_abbrev=False,
        help="which runs are done, at work, failed; how long it will take",
        description="Shows the runs of a table, or one run: state, epochs, loss, "
        "accuracy, ETA of the training, and the last error. Changes nothing.",
    )
    status.add_argument(
        "--workdir",
        type=local_path,
        required=True,
        metavar="DIR",
        help="of a table or of a run",
    )
    status.add_argument(
        "--watch", action="store_true", help="again and again, until all are done"
    )
