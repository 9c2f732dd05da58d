"""The flags of every subcommand, nothing else.

No JAX and no Flax here: `--help` stays quick.
"""

import argparse

from samrobust.evaluation_flags import add_curves, add_evaluate, floats, words

__all__ = ["ADDERS"]

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
    table.add_argument("--config", default=_CONFIG, metavar="FILE", help="%(default)s")
    table.add_argument(
        "--workdir", metavar="DIR", help="default: runs/NAME for configs/NAME.py"
    )
    table.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs a row: 0 .. N-1"
    )
    table.add_argument(
        "--rows",
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
        "--config", required=True, metavar="FILE:ROW", help="configs/digits.py:st"
    )
    train.add_argument("--workdir", required=True, metavar="DIR", help="of this run")


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
        "--workdir", required=True, metavar="DIR", help="of a table or of a run"
    )
    status.add_argument(
        "--watch", action="store_true", help="again and again, until all are done"
    )


def add_bench(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust bench`."""
    bench = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="how fast training is here, beside its FLOPs, the paper and PyTorch",
        description="Times training steps, epochs and evaluations, each row in a "
        "process of its own, and projects the hours of the config's table. Images are "
        "made up: nothing is downloaded.",
        epilog="Any field: --config.model.width=16. See configs/base.py.",
    )
    add = bench.add_argument
    add("--config", default="configs/cifar10.py", metavar="FILE", help="%(default)s")
    add("--workdir", default="runs/bench", metavar="DIR", help="%(default)s")
    add(
        "--measure",
        type=words,
        default=("step", "epoch", "evaluation"),
        metavar="KINDS",
        help="of step, epoch, evaluation, unrolled (AT with its loop written out); "
        "default: step,epoch,evaluation",
    )
    add(
        "--methods",
        type=words,
        default=("st", "sam", "at"),
        metavar="NAMES",
        help="of st, sam, at, at+sam; default: st,sam,at",
    )
    add(
        "--batch-sizes", type=_numbers, default=(), metavar="N,...", help="the config's"
    )
    add("--precisions", type=words, default=(), metavar="float32,bfloat16")
    add(
        "--devices",
        type=_numbers,
        default=(0,),
        metavar="N,...",
        help="how many (virtual ones on a CPU); default: all",
    )
    add(
        "--steps-per-call",
        type=_numbers,
        default=(0,),
        metavar="N,...",
        help="default: as in training",
    )
    add(
        "--xla-flags",
        action="append",
        metavar="FLAGS",
        help="added to XLA_FLAGS; repeat for variants to compare; '' adds none",
    )
    add(
        "--compare",
        choices=("pytorch",),
        help="time the same steps in PyTorch, in between; needs torch and a checkout",
    )
    add(
        "--variants",
        type=words,
        default=("reference", "resident", "tuned", "compiled"),
        metavar="NAMES",
        help="of PyTorch; default: reference,resident,tuned,compiled",
    )
    add("--repeats", type=int, default=5, metavar="N", help="a process; %(default)s")
    add("--rounds", type=int, default=2, metavar="N", help="processes; %(default)s")
    add("--min-seconds", type=float, default=2.0, metavar="S", help="of a repeat; 2")
    add(
        "--profile",
        action="store_true",
        help="write perfetto traces, one a row, instead of measuring",
    )


def add_theory(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust theory`."""
    theory = commands.add_parser(
        "theory",
        allow_abbrev=False,
        help="the paper's Section 4, checked: formulas, exact minima, training",
        description="Holds Theorems 4.1 to 4.5 against the exact minimum of the loss "
        "over a grid of worlds, trains the first of them, and prints what holds where.",
        epilog="docs/theory.md tells the story.",
    )
    add = theory.add_argument
    values = "X,..."
    add("--p", type=floats, metavar=values, help="accuracy of x_1; 0.7,0.95")
    add("--eta", type=floats, metavar=values, help="of other features; 0.1,0.03,0.5")
    add("--d", type=floats, metavar="N,...", help="how many; 10,1,100,1000")
    add(
        "--epsilon",
        type=floats,
        metavar=values,
        help="radii of AT; default: 0.1, 0.3, 0.6 and 0.9 of each eta, at most of 1",
    )
    add("--rho", type=floats, metavar=values, help="radii of SAM; 0.1,1,3")
    add("--seeds", type=int, metavar="N", help="trained runs; 5; 0 trains nothing")
    add("--samples", type=int, metavar="N", help="of each of these; 300000")
    add("--batch-size", type=int, metavar="N", help="1000")
    add("--workdir", default="runs/theory", metavar="DIR", help="%(default)s")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


ADDERS = (
    add_table,
    add_train,
    add_status,
    add_evaluate,
    add_curves,
    add_bench,
    add_theory,
)
