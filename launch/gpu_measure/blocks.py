"""The plan of a campaign: what is measured, in which order, for how long at most.

The order is that of what is missed most where the time ends early. A limit is about
twice what a block was seen or is expected to take on one H200, so that one that hangs
leaves time for others: a process begins in 8 s; the first program compiled in 77 s, a
later one in 15, once its kernels are tuned, and in a few from the cache.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "FLAGS",
    "LEFT_OUT",
    "MANIFEST",
    "MORE_FLAGS",
    "MORE_OPPONENTS",
    "OPPONENTS",
    "ROOT",
    "ROWS",
    "Block",
    "Campaign",
    "Command",
    "left_out",
    "plan",
]

LEFT_OUT = "left_out.json"  # of a bench: its words, and why
MANIFEST = "files.txt"  # of a data set's folder: the names of its other files
ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the checkout
_STUDY = "launch.gpu_measure"
_CONFIG = "--config=configs/cifar10.py"
_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION"
_CHECK = "from samrobust.system.distributed import check_platform; check_platform()"
# XLA's options that may pay; what this version of XLA does not know is left out. A list
# replaces XLA's default, which `_GRAPHS` is. The others wait until rows are
# trained.
FLAGS = (
    f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION,WHILE",
    "--xla_gpu_experimental_enable_conv_fusion=true",
)
MORE_FLAGS = (
    f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION",
    f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION "
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT",
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_use_runtime_fusion=true",
)
# The steps of several seeds in one program are independent of each other, but run one
# after the other unless the whole loop is a graph with branches.
_SIDE_BY_SIDE = (
    f"--xla_gpu_enable_command_buffer={_GRAPHS},CONVOLUTION,WHILE "
    "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"
)
# The variants of PyTorch, by method: the one that starts first comes first. Those that
# compile longest, or compute in other numbers, wait with XLA's other options.
OPPONENTS = {"st": "graphed,compiled", "at": "graphed,compiled"}
MORE_OPPONENTS = {"st": "pure,autotuned"}
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
      folder: in which it runs; that of the campaign where it is empty.
    """

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    killed: bool = False
    folder: str = ""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the campaign.

    Attributes:
      name: of its folder.
      seconds: that it may take.
      commands: run one after another, each whatever became of the one before.
      at_once: run all of them at the same time instead.
      required: run at every start; where it is not done, no other block begins.
    """

    name: str
    seconds: float
    commands: tuple[Command, ...]
    at_once: bool = False
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Campaign:
    """A campaign, by its folders.

    Attributes:
      workdir: receives everything.
      bundle: of `launch/gpu_bundle.sh`: `wheels/`, `data/NAME/` and, for a comparison,
        `before/`, another version of the package. What is not there is left out.
      trial: everything at the tiniest size, to see whether it runs.
      on_cpu: no GPU is measured, so what only GPUs have is replaced.
    """

    workdir: pathlib.Path
    bundle: pathlib.Path
    trial: bool = False
    on_cpu: bool = False

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
        times = ("--rounds=1", "--repeats=3", "--min-seconds=1")
        if self.trial:
            times = ("--rounds=1", "--repeats=1", "--min-seconds=0.05")
        if "--profile" in flags:
            times = ()  # it takes a few steps
        words = ("bench", _CONFIG, f"--workdir={self.workdir / name}", "--measure=step")
        words += (f"--cache={self.workdir / 'cache'}", "--precisions=bfloat16")
        words += (*times, *flags, *self.overrides)
        told = str(self.workdir / name / LEFT_OUT)
        command = _module(f"{_STUDY}.lenient", told, *words)
        return Block(name, seconds, (command,))

    def compare(self, name: str, seconds: float, several: Iterable[str]) -> Block:
        """Returns a block that times ST without and with some of XLA's options."""
        flags = [f"--xla-flags={one}" for one in ("", *several)]
        return self.bench(name, seconds, "--methods=st", "--no-rates", *flags)

    def opponents(self, name: str, method: str, variants: str) -> Block:
        """Returns a block that times a method's step in PyTorch beside ours."""
        if self.on_cpu:
            variants = variants.replace("graphed", "tuned")  # graphs are CUDA's
        words = (f"--methods={method}", "--compare=pytorch", f"--variants={variants}")
        return self.bench(name, 200, *words, "--no-rates")

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
    ceilings = f"--ceilings={workdir / 'machine' / 'machine.json'}"
    profile = bench("profile", 80, "--methods=st", "--profile")
    told = _module(f"{_STUDY}.trace", str(workdir / "profile"))
    rows = list(_rows(campaign))
    return [
        _install(campaign),
        Block("machine", 60, (_module(f"{_STUDY}.machine", *words),)),
        # Twice: compiled into an empty cache, and from there.
        _first(bench("st", 240, "--methods=st", "--rounds=2", ceilings), workdir),
        _carried(campaign),
        *_before_and_after(campaign),
        campaign.compare("flags", 150, FLAGS),
        bench("methods", 240, "--methods=st,sam,at", "--no-rates"),
        *(campaign.opponents(f"pytorch-{m}", m, v) for m, v in OPPONENTS.items()),
        dataclasses.replace(profile, commands=(*profile.commands, told)),
        bench(
            *("seeds-in-one-program", 120, "--methods=st", "--no-rates"),
            *("--seeds-per-program=2", "--xla-flags=", f"--xla-flags={_SIDE_BY_SIDE}"),
        ),
        *rows[:1],
        _bits(campaign),
        *(_seeds(campaign, *each) for each in (("alone", 1), ("two-at-once", 2))),
        *(campaign.opponents(f"more-{m}", m, v) for m, v in MORE_OPPONENTS.items()),
        campaign.compare("more-flags", 240, MORE_FLAGS),
        *rows[1:],
    ]


def left_out(campaign: Campaign) -> Iterator[str]:
    """Tells what the plan has no blocks for, since the bundle lacks something."""
    if not (campaign.bundle / "before").is_dir():
        yield f"before-after: no folder {campaign.bundle / 'before'}."
    for data, rows in ROWS:
        folder = campaign.bundle / "data" / data
        if lacking := _lacking(folder):
            yield f"{_name(data, rows)}: no {', '.join(lacking)} in {folder}."


def _module(name: str, *words: str, **options: Any) -> Command:
    # Found by PYTHONPATH, and not in the folder where it runs.
    return Command((sys.executable, "-P", "-m", name, *words), **options)


def _code(code: str, *words: str) -> Command:
    return Command((sys.executable, "-P", "-c", code, *words))


def _install(campaign: Campaign) -> Block:
    """Installs what is missing, into a folder of its own; refuses JAX without a GPU."""
    places = campaign.bundle / "wheels", campaign.workdir / "site"
    words = map(str, (*places, campaign.workdir / "install" / "install.json"))
    commands = _module(f"{_STUDY}.wheels", *words), _code(_CHECK)
    return Block("install", 90, commands, required=True)


def _first(block: Block, workdir: pathlib.Path) -> Block:
    """Empties the cache before a block: an archive may have brought a full one."""
    remove = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    empty = _code(remove, str(workdir / "cache"))
    return dataclasses.replace(block, commands=(empty, *block.commands))


def _carried(campaign: Campaign) -> Block:
    """Times ST, compiled with what the archive carries of the cache alone."""
    cache = campaign.workdir / "st-carried" / "cache"
    words = [str(campaign.workdir / "cache"), str(cache)]
    words += [] if campaign.on_cpu else ["--needed"]  # CPUs have nothing to tune
    copy = _module(f"{_STUDY}.archive", *words)
    timed = campaign.bench(
        *("st-carried", 90, "--methods=st", "--no-rates", f"--cache={cache}")
    )
    return dataclasses.replace(timed, commands=(copy, *timed.commands))


def _before_and_after(campaign: Campaign) -> list[Block]:
    """Times epochs of this version, of the other one, and of this one again."""
    before = campaign.bundle / "before"
    runs = (("now", ROOT), ("before", before), ("again", ROOT))
    commands = [campaign.epochs(f"before-after/{n}", package=p) for n, p in runs]
    # Two versions share no program, and maybe no cache: three first compilations.
    return [Block("before-after", 330, tuple(commands))] if before.is_dir() else []


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
    """Trains rows of the tables whose data the bundle has, as long as there is time.

    In the workdir, and by paths from there: the name of the data is part of what a run
    is, and the next machine may have the workdir in another place.
    """
    for data, rows in ROWS:
        pieces = campaign.bundle / "data" / data
        file = f"data/{data}.npz"
        words = ("table", f"--config=configs/{data}.py", f"--config.data.name={file}")
        words += (f"--workdir=rows/{data}", "--seeds=1")
        words += ("--config.model.dtype=bfloat16", "--config.checkpoint.minutes=1")
        words += (*(f"--rows={row}" for row in rows), *campaign.overrides)
        here: dict[str, Any] = {"folder": str(campaign.workdir)}
        commands = (
            _module(f"{_STUDY}.pieces", "unpack", str(pieces), file, **here),
            _module("samrobust.cli", *words, environment=campaign.cached, **here),
        )
        if not _lacking(pieces):
            yield Block(_name(data, rows), float("inf"), commands)


def _name(data: str, rows: tuple[str, ...]) -> str:
    return f"rows-{data}-{rows[-1].partition(',')[0]}"


def _lacking(folder: pathlib.Path) -> list[str]:
    """Returns the files of a data set's folder that have not been brought yet."""
    try:
        names = (folder / MANIFEST).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return [MANIFEST]
    return [name for name in names if not (folder / name).is_file()]
