"""The flags of `samrobust export` and `import`."""

import argparse

from samrobust.cli.flags.kinds import file_and_row, local_path, size

__all__ = ["add_export", "add_import"]


def add_export(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust export`."""
    export = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="a run's network for PyTorch, as safetensors, or for RobustBench",
        description="Writes the network of a run by the names of the paper's PyTorch "
        "code.",
        epilog="docs/interchange.md shows what the files hold.",
    )
    add = export.add_argument
    add("--workdir", type=local_path, required=True, metavar="DIR", help="of the run")
    add(
        "--format",
        required=True,
        choices=("safetensors", "pytorch", "robustbench"),
        help="the last two need torch",
    )
    add(
        "--output",
        type=local_path,
        required=True,
        metavar="PATH",
        help="a file; robustbench: a folder",
    )
    add("--checkpoint", choices=("last", "best"), help="default: the run's")
    add("--step", type=size, metavar="N", help="of the checkpoint; default: the newest")


def add_import(commands: argparse._SubParsersAction) -> None:
    """The flags of `samrobust import`."""
    importing = commands.add_parser(
        "import",
        allow_abbrev=False,
        help="a network from a .safetensors or .pth file, to evaluate",
        description="Makes a workdir of a file of weights; `samrobust evaluate` takes "
        "it. Width, blocks and classes are read from the tensors.",
        epilog="Any field: --config.model.mean='(0.5, 0.5, 0.5)'. See configs/base.py.",
    )
    add = importing.add_argument
    add(
        "--input",
        type=local_path,
        required=True,
        metavar="FILE",
        help="tensors alone; nothing is run",
    )
    add("--workdir", type=local_path, required=True, metavar="DIR", help="a new one")
    add(
        "--config",
        type=file_and_row,
        default="configs/cifar10.py:st",
        metavar="FILE:ROW",
        help="how it is evaluated; %(default)s",
    )
    add(
        "--dataset",
        choices=("cifar10", "cifar100", "digits"),
        help="default: the config's",
    )
