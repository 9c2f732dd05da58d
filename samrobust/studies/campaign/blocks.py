"""The plan of a campaign: what is measured, in which order, for how long at most.

The order is that of what is missed most where the time ends early.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

__all__ = [
    "FLAGS",
    "MORE_FLAGS",
    "OPPONENTS",
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
_CONFIG = "--config=configs/cifar10.py"
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
# The steps of several seeds in one program are independent of each other, but run one
# after the other unless the whole loop is a graph with branches.
_SIDE_BY_SIDE = (
    f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION,WHILE "
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
)
# The variants of PyTorch, by method: the one that starts first comes first.
OPPONENTS = {"st": "graphed,compiled,pure,autotuned", "at": "graphed,compiled"}
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

    @property
    def cached(self) -> tuple[tuple[str, str], ...]:
        """Returns the environment that keeps compiled programs with the rest."""
        return (("JAX_COMPILATION_CACHE_DIR", str(self.workdir / "cache")),)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Returns overrides of every config."""
        return _TRIAL if self.trial else ()

    def bench(self, name: str, seconds: float, *flags: str) -> Block:
        """Returns a block of `samrobust bench`, which times steps in bfloat16."""
        short = ("--repeats=3", "--min-seconds=1")
        short = ("--repeats=1", "--min-seconds=0.05") if self.trial else short
        words = ("bench", _CONFIG, f"--workdir={self.workdir / name}", "--measure=step")
        words += (f"--cache={self.workdir / 'cache'}", "--precisions=bfloat16")
        words += ("--rounds=1", *short, *flags, *self.overrides)
        return Block(name, seconds, (_module("samrobust.cli", *words),))

    def compare(self, flag: tuple[str, str]) -> Block:
        """Returns a block that times ST without and with XLA's options, by name."""
        name, flags = flag
        both = ("--xla-flags=", f"--xla-flags={flags}")
        return self.bench(f"flag-{name}", 90, "--methods=st", "--no-rates", *both)

    def epochs(
        self, output: str, *words: str, package: pathlib.Path = ROOT, **options: Any
    ) -> Command:
        """Returns a command that times epochs of ST by some version of the package.

        Args:
          output: its file, in the workdir, without the suffix.
          *words: further ones.
          package: a checkout, found by PYTHONPATH alone.
          **options: of `Command`.
        """
        script = pathlib.Path(__file__).with_name("epochs.py")
        own = (f"--config={package / 'configs' / 'cifar10.py'}:st",)
        own += (f"--output={self.workdir / output}.json",)
        own += ("--config.model.dtype=bfloat16", *words, *self.overrides)
        places = (package, self.workdir / "site", os.environ.get("PYTHONPATH", ""))
        path = (("PYTHONPATH", os.pathsep.join(map(str, places))),)
        environment = (*path, *self.cached, *options.pop("environment", ()))
        return Command(
            (sys.executable, "-P", str(script), *own), environment, **options
        )


def plan(campaign: Campaign) -> list[Block]:
    """Returns the blocks of a campaign, in order."""
    workdir, bench = campaign.workdir, campaign.bench
    words = (_CONFIG, f"--workdir={workdir / 'machine'}", *campaign.overrides)
    profile = bench("profile", 90, "--methods=st", "--profile")
    told = _module(f"{_STUDY}.trace", str(workdir / "profile"))
    return [
        *_install(campaign),
        Block("machine", 90, (_module(f"{_STUDY}.machine", *words),)),
        # Twice: compiled into an empty cache, and from there.
        bench("st", 240, "--methods=st", "--rounds=2"),
        *_before_and_after(campaign),
        *map(campaign.compare, FLAGS.items()),
        _bits(campaign),
        bench("methods", 300, "--methods=st,sam,at", "--no-rates"),
        *itertools.starmap(functools.partial(_opponents, campaign), OPPONENTS.items()),
        dataclasses.replace(profile, commands=(*profile.commands, told)),
        *(_seeds(campaign, *each) for each in (("alone", 1), ("two-at-once", 2))),
        bench(
            *("seeds-in-one-program", 180, "--methods=st", "--no-rates"),
            *(
                "--seeds-per-program=1,2",
                "--xla-flags=",
                f"--xla-flags={_SIDE_BY_SIDE}",
            ),
        ),
        *map(campaign.compare, MORE_FLAGS.items()),
        *_rows(campaign),
    ]


def _module(name: str, *words: str, **options: Any) -> Command:
    return Command((sys.executable, "-m", name, *words), **options)


def _install(campaign: Campaign) -> list[Block]:
    """Installs what is missing, into a folder of its own."""
    wheels = missing_wheels(campaign.bundle / "wheels")
    target = ("--target", str(campaign.workdir / "site"), *map(str, wheels))
    words = ("install", "--no-index", "--no-deps", "--no-compile", *target)
    return [Block("install", 60, (_module("pip", *words),))] if wheels else []


def _before_and_after(campaign: Campaign) -> list[Block]:
    """Times epochs of this version, of the other one, and of this one again."""
    before = campaign.bundle / "before"
    runs = (("now", ROOT), ("before", before), ("again", ROOT))
    commands = [campaign.epochs(f"before-after/{n}", package=p) for n, p in runs]
    return [Block("before-after", 180, tuple(commands))] if before.is_dir() else []


def _bits(campaign: Campaign) -> Block:
    """Asks whether a run that was killed ends at the bits of one that was not."""
    commands = []
    for mode, field in (("usual", "False"), ("deterministic", "True")):
        words = [f"--config.training.deterministic={field}"]
        words += [] if campaign.trial else ["--config.data.train_size=9984"]
        kept = f"--workdir={campaign.workdir / 'deterministic' / mode}"
        name = f"deterministic/{mode}"
        commands += [
            campaign.epochs(f"{name}-whole", *words),
            campaign.epochs(f"{name}-killed", *words, kept, "--kill", killed=True),
            campaign.epochs(f"{name}-resumed", *words, kept),
        ]
    return Block("deterministic", 240, tuple(commands))


def _opponents(campaign: Campaign, method: str, variants: str) -> Block:
    words = (f"--methods={method}", "--compare=pytorch", f"--variants={variants}")
    return campaign.bench(f"pytorch-{method}", 240, *words, "--no-rates")


def _seeds(campaign: Campaign, name: str, count: int) -> Block:
    """Times epochs of seeds in processes of their own, each with part of the memory."""
    part = (("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45"),)
    long = () if campaign.trial else ("--epochs=20",)  # they begin not quite at once
    commands = [
        campaign.epochs(
            *(f"seeds-{name}/{seed}", f"--config.seed={seed}", *long), environment=part
        )
        for seed in range(count)
    ]
    return Block(f"seeds-{name}", 120, tuple(commands), at_once=True)


def _rows(campaign: Campaign) -> Iterator[Block]:
    """Trains rows of the tables whose data the bundle has, as long as there is time."""
    for data, rows in ROWS:
        pieces = campaign.bundle / "data" / data
        file = campaign.workdir / "data" / f"{data}.npz"
        words = ("table", f"--config=configs/{data}.py", f"--config.data.name={file}")
        words += (f"--workdir={campaign.workdir / 'rows' / data}", "--seeds=1")
        words += ("--config.model.dtype=bfloat16", "--config.checkpoint.minutes=1")
        words += (*(f"--rows={row}" for row in rows), *campaign.overrides)
        commands = (
            _module(f"{_STUDY}.pieces", "unpack", str(pieces), str(file)),
            _module("samrobust.cli", *words, environment=campaign.cached),
        )
        if pieces.is_dir():
            name = f"rows-{data}-{rows[-1].partition(',')[0]}"
            yield Block(name, float("inf"), commands)


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
