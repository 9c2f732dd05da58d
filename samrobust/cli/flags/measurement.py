"""The flags of `samrobust bench` and `theory`."""

import argparse

from samrobust.cli.flags.kinds import (
    count,
    counts,
    few,
    file_and_row,
    local_path,
    names_of,
    positive,
    reals,
    size,
    sizes,
)

__all__ = ["add_bench", "add_theory"]


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
    add(
        "--config",
        type=file_and_row,
        default="configs/cifar10.py",
        metavar="FILE",
        help="%(default)s",
    )
    add(
        "--workdir",
        type=local_path,
        default="runs/bench",
        metavar="DIR",
        help="%(default)s",
    )
    add(
        "--measure",
        type=names_of("step", "epoch", "evaluation", "unrolled"),
        default=("step", "epoch", "evaluation"),
        metavar="KINDS",
        help="of step, epoch, evaluation, unrolled (AT with its loop written out); "
        "default: step,epoch,evaluation",
    )
    add(
        "--methods",
        type=names_of("st", "sam", "at", "at+sam"),
        default=("st", "sam", "at"),
        metavar="NAMES",
        help="of st, sam, at, at+sam; default: st,sam,at",
    )
    add("--batch-sizes", type=counts, default=(), metavar="N,...", help="the config's")
    add(
        "--precisions",
        type=names_of("float32", "bfloat16"),
        default=(),
        metavar="float32,bfloat16",
    )
    add(
        "--devices",
        type=sizes,
        default=(0,),
        metavar="N,...",
        help="how many (virtual ones on a CPU); default: all",
    )
    add(
        "--steps-per-call",
        type=sizes,
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
        help="time the same steps in PyTorch, in between; needs torch",
    )
    add(
        "--variants",
        type=names_of("reference", "resident", "tuned", "compiled"),
        default=("reference", "resident", "tuned", "compiled"),
        metavar="NAMES",
        help="of PyTorch; default: reference,resident,tuned,compiled",
    )
    add("--repeats", type=few, default=5, metavar="N", help="a process; %(default)s")
    add("--rounds", type=few, default=2, metavar="N", help="processes; %(default)s")
    add("--min-seconds", type=positive, default=2.0, metavar="S", help="of a repeat; 2")
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
    add("--p", type=reals, metavar=values, help="accuracy of x_1; 0.7,0.95")
    add("--eta", type=reals, metavar=values, help="of other features; 0.1,0.03,0.5")
    add("--d", type=reals, metavar="N,...", help="how many; 10,1,100,1000")
    add(
        "--epsilon",
        type=reals,
        metavar=values,
        help="radii of AT; default: 0.1, 0.3, 0.6 and 0.9 of each eta, at most of 1",
    )
    add("--rho", type=reals, metavar=values, help="radii of SAM; 0.1,1,3")
    add("--seeds", type=size, metavar="N", help="trained runs; 5; 0 trains nothing")
    add("--samples", type=count, metavar="N", help="of each of these; 300000")
    add("--batch-size", type=count, metavar="N", help="1000")
    add(
        "--workdir",
        type=local_path,
        default="runs/theory",
        metavar="DIR",
        help="%(default)s",
    )
