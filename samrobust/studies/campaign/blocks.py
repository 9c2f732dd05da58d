"""The plan of a campaign: what is measured, in which order, for how long at most.

The order is that of what is missed most where the time ends early.
"""

import dataclasses
import os
import pathlib
import sys
from importlib import metadata
from typing import Any

__all__ = [
    "FLAGS",
    "MORE_FLAGS",
    "ROOT",
    "ROWS",
    "Block",
    "Campaign",
    "Command",
    "missing_wheels",
    "plan",
]

ROOT = pathlib.Path(__file__).resolve().parents[3]  # of the checkout
_STUDY = "samrobust.studies.campaign"
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
# XLA's options that may pay, by a short name. One that this version of XLA does not
# know fails its own row. A list replaces XLA's default, which `_GRAPHS` is. The others
# wait until all else but the rows is measured.
FLAGS = {
    "graphs-loop": f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION,WHILE",
    "conv-fusion": "--xla_gpu_experimental_enable_conv_fusion=true",
}
MORE_FLAGS = {
    "graphs-convolutions": f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION",
    "graphs-concurrent": f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION "
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "deterministic": "--xla_gpu_deterministic_ops=true",
    "excluding": "--xla_gpu_exclude_nondeterministic_ops=true",
    "runtime-fusion": "--xla_gpu_use_runtime_fusion=true",
}
_SAM = ("sam,rho=0.1", "sam,rho=0.2")
# Rows of the tables that are missed most, by the config and data set of each; those of
# a table that are done stay in it.
ROWS = (
    ("cifar10", _SAM),
    ("cifar100", ("st", "sam,rho=0.4")),
    ("cifar10", (*_SAM, *(f"at,norm=linf,eps={epsilon}" for epsilon in (1, 2, 8)))),
)
_TRIAL = (
    *("--config.model.width=2", "--config.model.blocks=(1,)"),
    *("--config.data.train_size=96", "--config.data.test_size=48"),
    *("--config.training.batch_size=32", "--config.training.epochs=2"),
    *("--config.evaluation.batch_size=48", "--config.evaluation.num_steps=2"),
    "--config.attack.num_steps=2",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A process of a block.

    Attributes:
      words: of its command line.
      environment: that it wants beside its parent's.
      killed: whether it is meant to end by SIGKILL.
    """

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    killed: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the campaign.

    Attributes:
      name: of its folder.
      seconds: that it may take.
      commands: run one after another, each whatever became of the one before.
      at_once: run all of them at the same time instead.
    """

    name: str
    seconds: float
    commands: tuple[Command, ...]
    at_once: bool = False


@dataclasses.dataclass(frozen=True)
class Campaign:
    """A campaign, by its folders.

    Attributes:
      workdir: receives everything.
      bundle: of `launch/gpu_bundle.sh`: `wheels/`, `data/NAME/` and, for a comparison,
        `before/`, another version of the package. What is not there is left out.
      trial: everything at the tiniest size, to see whether it runs.
    """

    workdir: pathlib.Path
    bundle: pathlib.Path
    trial: bool = False


def plan(campaign: Campaign) -> list[Block]:
    """Returns the blocks of a campaign, in order."""
    workdir, bundle = campaign.workdir, campaign.bundle
    config = "--config=configs/cifar10.py"
    overrides = _TRIAL if campaign.trial else ()
    short = ("--repeats=3", "--min-seconds=1")
    short = ("--repeats=1", "--min-seconds=0.05") if campaign.trial else short
    cache = workdir / "cache"
    cached = (("JAX_COMPILATION_CACHE_DIR", str(cache)),)

    def module(name: str, *words: str, **options: Any) -> Command:
        return Command((sys.executable, "-m", name, *words), **options)

    def bench(name: str, seconds: float, *flags: str) -> Block:
        words = (
            "bench",
            config,
            f"--workdir={workdir / name}",
            "--precisions=bfloat16",
        )
        words += (f"--cache={workdir / 'cache'}", "--rounds=1", *short)
        words += ("--measure=step", *flags, *overrides)
        return Block(name, seconds, (module("samrobust.cli", *words),))

    def epochs(
        output: str, *words: str, package: pathlib.Path = ROOT, **options: Any
    ) -> Command:
        """Returns a command that knows of the package by PYTHONPATH alone."""
        program = (
            sys.executable,
            "-P",
            str(pathlib.Path(__file__).parent / "epochs.py"),
        )
        own = (f"--config={package / 'configs' / 'cifar10.py'}:st",)
        own += (f"--output={workdir / output}.json", "--config.model.dtype=bfloat16")
        paths = map(str, (package, workdir / "site", os.environ.get("PYTHONPATH", "")))
        own_package = (("PYTHONPATH", os.pathsep.join(paths)),)
        environment = (*own_package, *cached, *options.pop("environment", ()))
        return Command((*program, *own, *words, *overrides), environment, **options)

    def compare(flag: tuple[str, str]) -> Block:
        name, flags = flag
        both = ("--xla-flags=", f"--xla-flags={flags}")
        return bench(f"flag-{name}", 90, "--methods=st", "--no-rates", *both)

    blocks = []
    if wheels := missing_wheels(bundle / "wheels"):
        target = ("--target", str(workdir / "site"), *map(str, wheels))
        words = ("install", "--no-index", "--no-deps", "--no-compile", *target)
        blocks.append(Block("install", 60, (module("pip", *words),)))
    words = (config, f"--workdir={workdir / 'machine'}", *overrides)
    blocks.append(Block("machine", 90, (module(f"{_STUDY}.machine", *words),)))
    # Twice: compiled into an empty cache, and from there.
    blocks.append(bench("st", 240, "--methods=st", "--rounds=2"))
    if (bundle / "before").is_dir():
        before = bundle / "before"
        runs = (("now", ROOT), ("before", before), ("again", ROOT))
        commands = [
            epochs(f"before-after/{name}", package=package) for name, package in runs
        ]
        blocks.append(Block("before-after", 180, tuple(commands)))
    blocks += map(compare, FLAGS.items())
    commands = []
    for mode, field in (("usual", "False"), ("deterministic", "True")):
        # The same run twice, once of it killed on the way: do they end at equal bits?
        words = (f"--config.training.deterministic={field}",)
        few = () if campaign.trial else ("--config.data.train_size=9984",)
        kept = f"--workdir={workdir / 'deterministic' / mode}"
        commands += [
            epochs(f"deterministic/{mode}-whole", *words, *few),
            epochs(
                *(f"deterministic/{mode}-killed", *words, *few, kept, "--kill"),
                killed=True,
            ),
            epochs(f"deterministic/{mode}-resumed", *words, *few, kept),
        ]
    blocks.append(Block("deterministic", 240, tuple(commands)))
    blocks.append(bench("methods", 300, "--methods=st,sam,at", "--no-rates"))
    for method, variants in (
        ("st", "graphed,compiled,pure,autotuned"),
        ("at", "graphed,compiled"),
    ):
        words = (f"--methods={method}", "--compare=pytorch", f"--variants={variants}")
        blocks.append(bench(f"pytorch-{method}", 240, *words, "--no-rates"))
    profile = bench("profile", 90, "--methods=st", "--profile")
    told = module(f"{_STUDY}.trace", str(workdir / "profile"))
    blocks.append(dataclasses.replace(profile, commands=(*profile.commands, told)))
    half = (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45"),)
    long = () if campaign.trial else ("--epochs=20",)  # they begin not quite at once
    for name, count in (("alone", 1), ("two-at-once", 2)):
        commands = [
            epochs(f"seeds-{name}/{i}", f"--config.seed={i}", *long, environment=half)
            for i in range(count)
        ]
        blocks.append(Block(f"seeds-{name}", 120, tuple(commands), at_once=True))
    blocks += map(compare, MORE_FLAGS.items())
    for data, rows in ROWS:
        if not (bundle / "data" / data).is_dir():
            continue
        file = workdir / "data" / f"{data}.npz"
        words = ("unpack", str(bundle / "data" / data), str(file))
        unpack = module(f"{_STUDY}.pieces", *words)
        words = ("table", f"--config=configs/{data}.py", f"--config.data.name={file}")
        words += (f"--workdir={workdir / 'rows' / data}", "--seeds=1")
        words += ("--config.model.dtype=bfloat16", "--config.checkpoint.minutes=1")
        words += tuple(f"--rows={row}" for row in rows)
        command = module("samrobust.cli", *words, *overrides, environment=cached)
        name = f"rows-{data}-{rows[-1].partition(',')[0]}"
        blocks.append(Block(name, float("inf"), (unpack, command)))
    return blocks


def missing_wheels(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the wheels in a folder whose packages are not installed, sorted."""
    return [
        path
        for path in sorted(folder.glob("*.whl"))
        if not _is_installed(path.name.partition("-")[0])
    ]


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
