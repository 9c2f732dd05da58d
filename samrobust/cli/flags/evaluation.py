"""The flags of `samrobust evaluate`, `recheck` and `curves`."""

import argparse
from collections.abc import Callable

from samrobust.cli.flags.kinds import (
    count,
    local_path,
    names_of,
    positive,
    radii,
    row_names,
    seed,
    size,
)

__all__ = ["add_curves", "add_evaluate", "add_recheck"]


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust evaluate`."""
    evaluate = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="attack a trained run again, under other attacks",
        description="Attacks the network of a finished or stopped run. Prints the "
        "accuracies and adds them to evaluations.jsonl in its workdir.",
    )
    add = evaluate.add_argument
    add("--workdir", type=local_path, required=True, metavar="DIR", help="of the run")
    add("--attack", choices=("pgd", "autoattack"), help="default: the run's")
    _add_version(add)
    add(
        "--save-examples",
        action="store_const",
        const=True,
        help="keep AutoAttack's adversarial images, beside the outcome",
    )
    add(
        "--num-examples",
        type=count,
        metavar="N",
        help="test images, spread evenly; default: the run's",
    )
    add("--norm", choices=("linf", "l2"), action="append", help="default: both")
    add(
        "--epsilon",
        type=positive,
        action="append",
        metavar="E",
        help="radius in 1/255, needs --norm; repeat for several; default: the run's",
    )
    add(
        "--step-size",
        type=positive,
        metavar="A",
        help="in 1/255; default as in the run",
    )
    add("--num-steps", type=count, metavar="N", help="default: the run's")
    add("--restarts", type=count, metavar="N", help="default: the run's")
    add("--loss", choices=("cross_entropy", "margin"), help="default: the run's")
    add("--judge", choices=("final", "any"), help="iterate judged; default: the run's")
    add(
        "--early-stop",
        action="store_const",
        const=True,
        help="leave broken images out of further steps; for --judge=any, same outcome",
    )
    add("--checkpoint", choices=("last", "best"), help="default: the run's")
    add("--step", type=size, metavar="N", help="of the checkpoint; default: the newest")
    add("--batch-size", type=count, metavar="N", help="default: the run's")
    _add_dtype(add, "the run's")
    add(
        "--seed",
        type=seed,
        metavar="N",
        help="of the random starts; default: the run's",
    )
    add(
        "--sanity",
        action="store_true",
        help="also look for signs of gradient masking; docs/sanity.md",
    )
    add(
        "--sanity-examples",
        type=count,
        metavar="N",
        help="with --sanity: images to look at, evenly spaced; default: 256",
    )
    add(
        "--transfer-from",
        type=local_path,
        action="append",
        metavar="DIR",
        help="with --sanity: another run whose adversarial images are tried; repeat",
    )


def add_recheck(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust recheck`."""
    recheck = commands.add_parser(
        "recheck",
        allow_abbrev=False,
        help="the runs of a table under AutoAttack, beside PGD",
        description="Attacks every finished run of a table with its PGD and with "
        "AutoAttack, on the same images, and writes the table of both: autoattack.md, "
        ".csv, .json and .png. Goes on where it was stopped.",
    )
    add = recheck.add_argument
    add("--workdir", type=local_path, required=True, metavar="DIR", help="of the table")
    add(
        "--rows",
        type=row_names,
        action="append",
        metavar="ROW",
        help="only these; default: all",
    )
    _add_version(add)
    for norm in ("linf", "l2"):
        add(
            f"--{norm}",
            type=radii(norm),
            metavar="E,...",
            help="radii in 1/255; default: the table's",
        )
    add(
        "--num-examples",
        type=count,
        metavar="N",
        help="test images, spread evenly; default: the table's",
    )
    add("--batch-size", type=count, metavar="N", help="default: the table's")
    _add_dtype(add, "the table's")


def add_curves(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust curves`."""
    curves = commands.add_parser(
        "curves",
        allow_abbrev=False,
        help="accuracy against the attack's radius, all methods of a table in one plot",
        description="Attacks every finished run of a table at a grid of radii (PGD, "
        "any iterate counts) and draws the means over seeds. Goes on where it was "
        "stopped.",
    )
    add = curves.add_argument
    add("--workdir", type=local_path, required=True, metavar="DIR", help="of the table")
    add(
        "--rows",
        type=row_names,
        action="append",
        metavar="ROW",
        help="only these; default: all",
    )
    for norm in ("linf", "l2"):
        add(
            f"--{norm}",
            type=radii(norm),
            metavar="E,...",
            help="radii in 1/255; default: 8 up to twice the table's largest",
        )
    add("--num-steps", type=count, metavar="N", help="of PGD; default: 20")
    add("--loss", choices=("cross_entropy", "margin"), help="default: cross_entropy")
    add(
        "--num-examples",
        type=count,
        metavar="N",
        help="images, evenly spaced; default: 256",
    )


def _add_dtype(add: Callable, default: str) -> None:
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"what the networks compute in; default: {default}",
    )


def _add_version(add: Callable[..., object]) -> None:
    """The flags that choose AutoAttack's members."""
    add(
        "--version",
        choices=("standard", "rand", "custom"),
        help="of AutoAttack; default: standard; rand: for random logits",
    )
    add(
        "--members",
        type=names_of("apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr"),
        metavar="NAMES",
        help="with --version=custom: of apgd-ce, apgd-t, fab-t, square, apgd-dlr",
    )
