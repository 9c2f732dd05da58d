"""Small experiments for the tests of training and evaluation.

The networks are so small that compiling them takes nearly all the time, so compiled
programs are shared by all tests of a session and by the processes they start.
"""

import atexit
import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from samrobust import cli
from samrobust.data import Dataset, Split
from samrobust.experiments import building, configuration
from samrobust.experiments.run import run
from samrobust.experiments.scoring import Scorer
from samrobust.experiments.validation import validate
from samrobust.models import PreActResNet
from samrobust.system.distributed import compiling_for, data_mesh
from samrobust.training.epoch import EpochRunner

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    "model.width": 2,
    "model.blocks": (1,),
    "data.train_size": 96,
    "data.test_size": 48,
    "training.batch_size": 32,
    "training.epochs": 4,
    "attack.num_steps": 2,
    "evaluation.num_steps": 2,
    "evaluation.linf": (16.0,),
    "evaluation.l2": (),
    "evaluation.batch_size": 48,
}
# What a collective operation says in every process once a connection is gone.
BROKEN_CONNECTION = "UNKNOWN: Gloo AllGather failed: Connection closed by peer"
# Environment of processes whose programs are compiled as those of a user.
USUAL_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def mesh_of(count: int) -> jax.sharding.Mesh:
    """A mesh over the first devices."""
    with compiling_for(jax.devices()[:count]):
        return data_mesh()


@functools.cache
def _scratch() -> str:
    """A folder that goes with this process."""
    folder, owner = tempfile.mkdtemp(prefix="samrobust-tests-"), os.getpid()
    atexit.register(
        lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True)
    )
    return folder


def lasting_folder() -> pathlib.Path:
    """A new folder, for what several tests have in common."""
    return pathlib.Path(tempfile.mkdtemp(dir=_scratch()))


def _share_compiled_programs() -> None:
    folder = str(lasting_folder())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


_share_compiled_programs()


@contextlib.contextmanager
def usual_compilation() -> Iterator[None]:
    """Programs optimized as those of a user, inside this process."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@contextlib.contextmanager
def programs_made_once() -> Iterator[None]:
    """Lets the runs of one config share their programs, whatever their seeds.

    Each run traces and lowers its own anew otherwise, half of the time of a tiny one.
    """
    made: dict[Any, Any] = {}

    def once(key: Any, make: Callable[[], Any]) -> Any:
        if key not in made:
            made[key] = make()
        return made[key]

    def facts(config: Any, dataset: Any) -> tuple[Any, ...]:
        fields = {**config.to_dict(), "seed": None}
        return repr(fields), dataset.image_shape, dataset.num_classes

    build = building.make_training

    def build_once(config: Any, dataset: Any, steps_per_epoch: int) -> Any:
        key = *facts(config, dataset), steps_per_epoch
        return once(key, lambda: build(config, dataset, steps_per_epoch))

    compile_chunk = EpochRunner.compile

    def compile_once(self: Any, chunk: Any, carries: Any) -> Any:
        split = tuple(array.shape for array in self._data)
        step = tuple(self._train_steps), tuple(self._augment.keywords.items())
        made_for = tuple(self._options.items()), self._plan, split, chunk, len(carries)
        key = *step, *made_for
        program = once(key, lambda: compile_chunk(self, chunk, carries))
        self._compiled[chunk, len(carries)] = program
        return program

    begin_scorer = Scorer.__init__

    def begin_scorer_once(self: Any, config: Any, dataset: Any) -> None:
        begin_scorer(self, config, dataset)
        self._evaluate = once(facts(config, dataset), lambda: self._evaluate)

    fit = sys.modules["samrobust.training.fit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fresh_carry", functools.cache(fit.fresh_carry))
        patch.setattr(EpochRunner, "compile", compile_once)
        patch.setattr(Scorer, "__init__", begin_scorer_once)
        patch.setattr(building, "make_training", build_once)
        yield


_IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start_in_a_terminal(*arguments: str) -> tuple[subprocess.Popen[Any], int]:
    """Starts Python in a terminal of its own; that closes with the number returned."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_A_TERMINAL, *arguments],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
    )
    os.close(theirs)
    return process, ours


class Silent:
    """An observer that looks away."""

    def on_progress(self, progress: Any) -> None:
        pass

    def on_batch(self, done: int, num_examples: int, doing: str = "") -> None:
        pass


def make_table(folder: pathlib.Path, rows: Sequence[str]) -> pathlib.Path:
    """Trains rows for an epoch, one seed each, as `samrobust table` leaves them."""
    for row in rows:
        config = make_config(row, {"training.epochs": 1})
        run(config, folder / row / "seed0", Silent(), dataset=load_data(config))
    return folder


def make_config(row: str = "st", overrides: dict[str, Any] | None = None) -> Any:
    """A row of configs/digits.py, made tiny; overrides are by dotted names."""
    # A row may be refused without held-out images.
    held_out = "data.validation_size"
    early = [f"--config.{n}={x}" for n, x in (overrides or {}).items() if n == held_out]
    config = configuration.load_config(f"{ROOT}/configs/digits.py:{row}", early)
    config.update_from_flattened_dict({**TINY, **(overrides or {})})
    validate(config)
    return config


# A row of the config file that `write_diverging_config` writes.
DIVERGING = "sam,rho=0.4"


def write_diverging_config(folder: pathlib.Path) -> pathlib.Path:
    """A file like configs/digits.py of which one row's loss does not stay finite."""
    path = folder / "diverging.py"
    path.write_text(
        "from samrobust.experiments.configuration import load_config\n"
        "def get_config(row='st'):\n"
        f"    config = load_config('{ROOT}/configs/digits.py:' + row)\n"
        f"    if row == {DIVERGING!r}:\n"
        "        config.training.learning_rate = 1e20\n"
        "    return config\n"
    )
    return path


def make_folder(path: pathlib.Path) -> pathlib.Path:
    path.mkdir(parents=True)
    return path


def make_flags(overrides: dict[str, Any] | None = None) -> list[str]:
    """The same overrides for the command line."""
    values = {**TINY, **(overrides or {})}
    return [f"--config.{name}={value}" for name, value in values.items()]


def make_model(config: Any, dataset: Dataset) -> Any:
    return building.make_model(config, dataset)


def load_data(config: Any) -> Dataset:
    return building.load_data(config)


def make_split(num_examples: int, *, seed: int = 0, side: int = 8) -> Split:
    """Random images uint8 [N, side, side, 1] and random labels of ten classes."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_examples, side, side, 1)).astype(np.uint8)
    return Split(images, rng.integers(0, 10, num_examples).astype(np.int32))


def make_network(*, width: int = 2, seed: int = 0) -> tuple[PreActResNet, Any]:
    """A small network and its variables."""
    model = PreActResNet(width=width, blocks=(1,))
    return model, init_variables(model, seed=seed)


def init_variables(model: Any, *, seed: int = 0, side: int = 8) -> Any:
    """Parameters, and running statistics that are not those of a fresh network."""
    init_key, key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def init():
        variables = model.init(init_key, jnp.zeros((1, side, side, 1)), train=False)
        images = jax.random.uniform(key, (16, side, side, 1))
        _, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return {"params": variables["params"], **updated}

    return init()


def draw_variables(model: Any, image_shape: tuple[int, int, int], seed: int = 0) -> Any:
    """Random variables, statistics and scales too, with nothing compiled."""
    images = np.zeros((1, *image_shape), np.float32)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.uniform(0.2, 1.2, leaf.shape)
        if leaf.ndim > 1:  # a kernel: as large as keeps the activations' size
            values = (values - 0.7) / np.sqrt(np.prod(leaf.shape[:-1]) / 6)
        return values.astype(np.float32)

    return jax.tree.map(draw, like)


@functools.cache
def _make_predict(model: Any) -> Any:
    def predict(variables, image):
        return jnp.argmax(model.apply(variables, image[None], train=False)[0])

    return jax.jit(predict)


def plain_accuracy(config: Any, dataset: Dataset, variables: Any) -> float:
    """Natural accuracy on the test images in percent, one image at a time."""
    predict = _make_predict(make_model(config, dataset))
    pixels = dataset.test.images.astype(np.float32) / np.float32(255)
    predictions = [int(predict(variables, image)) for image in pixels]
    return 100 * float(np.mean(predictions == dataset.test.labels))


def as_bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The leaves by path, as dtype, shape and bytes."""
    return {
        jax.tree_util.keystr(path): _bits(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


def run_on_devices(file: str, *arguments: str, count: int, **environment: str) -> str:
    """Runs a module of tests as a program on so many devices; returns what it printed.

    Warnings are errors in it.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", file, *arguments],
        env={
            **os.environ,
            **{"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
            **environment,
        },
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_bits(tree: Any, expected: Any) -> None:
    """Every leaf equals its partner bit for bit; names those that do not."""
    bits, expected_bits = as_bits(tree), as_bits(expected)
    assert bits.keys() == expected_bits.keys()
    assert [name for name in bits if bits[name] != expected_bits[name]] == []


def assert_close(tree: Any, expected: Any, *, atol: float, rtol: float = 0.0) -> None:
    """Every leaf is close to its partner."""
    expected_leaves = dict(jax.tree_util.tree_leaves_with_path(expected))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        np.testing.assert_allclose(
            leaf,
            expected_leaves[path],
            atol=atol,
            rtol=rtol,
            err_msg=jax.tree_util.keystr(path),
        )


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_timings(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what differs between equal runs."""
    return {k: v for k, v in line.items() if "second" not in k}


def checkpoint_steps(workdir: pathlib.Path, which: str = "last") -> list[int]:
    """The steps of the finished checkpoints of a run, in order."""
    folder = workdir / "checkpoints" / which
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_checkpoint(
    workdir: pathlib.Path, which: str = "last", step: int | None = None
) -> dict[str, np.ndarray]:
    """All leaves of a checkpoint by their names, read by Orbax; by default the newest.

    This does not go through `samrobust.training.checkpoint`.
    """
    if step is None:
        step = checkpoint_steps(workdir, which)[-1]
    folder = workdir.absolute() / "checkpoints" / which / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = reader.metadata(folder).item_metadata.tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return reader.restore(
            folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )


def log_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without timings."""
    lines = read_lines(workdir / "metrics.jsonl")
    return [without_timings(line) for line in lines]


def assert_equal_runs(
    workdir: pathlib.Path, expected: pathlib.Path, *, tolerance: float
) -> None:
    """The newest checkpoint and the log of four epochs agree with another run's."""
    assert_close(
        read_checkpoint(workdir),
        read_checkpoint(expected),
        atol=tolerance,
        rtol=tolerance,
    )
    lines, expected_lines = log_of(workdir), log_of(expected)
    assert len(lines) == len(expected_lines) == 4
    for line, other in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(other, abs=tolerance, rel=tolerance)


def main(*arguments: str) -> int:
    """The command inside this process: for what is refused before any work."""
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


def start_command(
    *arguments: str, folder: pathlib.Path | str = ROOT, **environment: str
) -> subprocess.Popen[str]:
    """Starts the `samrobust` command of this tree, in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "samrobust.cli", *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            # A command compiles two dozen programs of a few milliseconds each. Those
            # of a group would read what another of them is writing.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def start_group(
    commands: list[list[str]], *, devices: int = 1, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts commands as the processes of one run, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(len(commands)),
        "SAMROBUST_HEARTBEAT_SECONDS": "10",
        **environment,
    }
    return [
        subprocess.Popen(
            command,
            env={**common, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index, command in enumerate(commands)
    ]


def start_different_commands(
    commands: list[list[str]], *, devices: int = 1, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts the `samrobust` command as one run, with arguments for each process."""
    program = [sys.executable, "-m", "samrobust.cli"]
    programs = [[*program, *arguments] for arguments in commands]
    return start_group(programs, devices=devices, **environment)


def start_command_group(
    count: int, *arguments: str, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts the `samrobust` command as several processes of one run."""
    commands = [list(arguments)] * count
    return start_different_commands(commands, devices=1, **environment)


def finish_group(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Waits for all processes; as `finish_command`, but without gloo's greeting."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        outcomes = list(pool.map(finish_command, processes))
    greeting = r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. [^:]* : \d+"
    return [
        (code, re.sub(greeting, "", output).strip(), errors)
        for code, output, errors in outcomes
    ]


def finish_command(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a command: its exit code, and its output as one line of words."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, " ".join(output.split()), " ".join(errors.split())


def is_alive(pid: int | str) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def run_command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Runs the `samrobust` command; as `finish_command`."""
    return finish_command(start_command(*arguments, **environment))


def in_one_program(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What a function returns, compiled as a whole, its arguments constants in it.

    Outside of `jit` each operation is a program of its own, 15 ms to compile.
    """
    return jax.jit(lambda: function(*arguments, **named))()


def jitted(attack: Any, logits_fn: Any) -> tuple[Any, list]:
    """The attack as a function of images, labels and key; and what it traced."""
    traces: list = []

    @jax.jit
    def counted(images: Any, labels: Any, key: Any) -> Any:
        traces.append(images.shape)
        return attack(logits_fn, images, labels, key=key)

    return counted, traces


def norms(ball: str, delta: Any) -> np.ndarray:
    """The norms [B] of perturbations [B, ...] in float64; of `linf` or `l2`."""
    order = {"linf": np.inf, "l2": 2}[ball]
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, order, axis=1)


def oscillating(num: int) -> tuple[Callable[..., Any], Any, Any]:
    """A network with many small regions, images [num, 6] and its labels of them."""
    first, second, pixels = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate(([6, 32], [32, 5], [num, 6]))
    )

    def logits_fn(images: Any) -> Any:
        return jnp.sin(images @ (2 * first)) @ second

    images = jax.scipy.stats.norm.cdf(pixels)
    return logits_fn, images, jnp.argmax(logits_fn(images), -1)
