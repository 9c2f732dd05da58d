"""The cost of a step on a device that is not there: compiled ahead of time, counted.

XLA compiles for an accelerator from its description alone. What comes out is the
program that the accelerator would run, except for what is tuned by trying it there:
tile sizes, the choice of a library's algorithms. So kernels and bytes can be held by
tests on any machine; seconds cannot.
"""

import collections
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import time
import types
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from samrobust.checks import LARGEST_COUNT, check
from samrobust.data import Split
from samrobust.evaluation.accuracy import judge_by
from samrobust.evaluation.measure import batch_program, batch_size_for
from samrobust.experiments import building
from samrobust.studies.bench.hlo import KINDS, Kernel, kernels
from samrobust.studies.bench.plan import Task
from samrobust.studies.bench.programs import num_train, training
from samrobust.system import compiler
from samrobust.system.distributed import compiling_for, data_mesh, replicate
from samrobust.system.files import write_json, write_text
from samrobust.system.jaxprs import abstract_key
from samrobust.system.tables import Sheet, TextTable
from samrobust.types import Config

__all__ = [
    "TARGETS",
    "check_target",
    "compiler_options",
    "counted",
    "counts_of",
    "devices_of",
    "evaluation_program",
    "step_program",
    "to_sheet",
    "try_out",
    "write_counts",
]


class _Target(NamedTuple):
    """A device to compile for, as a file in `targets` describes it.

    Attributes:
      plugins: modules, any one of which compiles for it.
      install: what pip is to install for the first of them.
      platform: XLA's name.
      topology: its name.
      options: of the compiler; those of GPUs turn off autotuning, which would try
        kernels on the device.
      environment: that the plugin wants.
    """

    plugins: Sequence[str]
    install: str
    platform: str
    topology: dict[str, str]
    options: dict[str, str]
    environment: dict[str, str]


_FOLDER = pathlib.Path(__file__).with_name("targets")
TARGETS = {
    path.stem: _Target(**json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(_FOLDER.glob("*.json"))
}
_TOTALS = (
    *("row", "batch", "precision", "kernels", "GB", "temporary GB"),
    *("collectives", "MB", "compile s"),
)
_HOW_TO_READ = (
    "A kernel's bytes are those of its operands and results; of a collective operation "
    "what each device brings (MB). Reductions: nearly all of BatchNorm and of norms. "
    "'loop x 10': one run of a loop's body, of 10 a step, without the loops in it. Of "
    "several seeds a program, the share of one; of several devices, one of them. "
    "Compiled for described devices and not tuned on one: there are no seconds."
)


def check_target(name: str) -> None:
    """Refuses a device that nothing installed compiles for.

    Raises:
      ValueError: with the line that installs it.
    """
    target = TARGETS[name]
    install = target.install.format(jaxlib=metadata.version("jaxlib"))
    check(
        any(map(_is_installed, target.plugins)),
        f"JAX's compiler for {target.platform}",
        f"Install it, no device is needed: pip install {install}",
        **{"--aot": name},
    )


def devices_of(name: str, count: int = 1) -> Sequence[Any]:
    """Returns devices of `TARGETS`, described and not there; GPUs of one machine.

    Raises:
      ValueError: where the topology has fewer.
    """
    target = TARGETS[name]
    os.environ.update(target.environment)
    options = dict(target.topology)
    if target.platform == "cuda":
        text = (_FOLDER / f"{name}.txtpb").read_text(encoding="utf-8")
        options["target_config"] = text
        options["topology"] = f"1x1x{count}"
    topology = topologies.get_topology_desc(platform=target.platform, **options)
    there = len(topology.devices)
    check(count <= there, f"--devices <= {there} with {name}", **{"--devices": count})
    return topology.devices[:count]


def step_program(config: Config, *, seeds: int = 1) -> tuple[Any, int]:
    """Traces the program that `programs.step` measures, of arrays that are not there.

    Inside `compiling_for`, for those devices. Nothing is computed or downloaded.

    Returns:
      What was traced, and the number of steps it takes, of all seeds together.
    """
    facts = building.load_facts(config)
    size = num_train(config, facts)
    images = np.broadcast_to(np.uint8(0), (size, *facts.image_shape))  # no memory
    split = Split(images, np.broadcast_to(np.int32(0), size))
    runner, chunk, begin = training(config, facts, split)
    carry = replicate(jax.eval_shape(begin, abstract_key()), data_mesh())
    return runner.trace(chunk, [carry] * seeds), chunk.num_steps * seeds


def evaluation_program(config: Config) -> tuple[Any, int]:
    """Traces the evaluation of one batch, clean and all attacks, as `step_program`."""
    facts = building.load_facts(config)
    model, key = building.make_model(config, facts), abstract_key()
    image = jax.ShapeDtypeStruct((1, *facts.image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, key, image)
    size = batch_size_for(LARGEST_COUNT, config.evaluation.batch_size)
    split = (
        jax.ShapeDtypeStruct((size, *facts.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    indices = jax.ShapeDtypeStruct((size,), jnp.int32)
    of_batch: Any = batch_program(judge_by(model, building.evaluation_attacks(config)))
    arguments = replicate((variables, *split, indices, key), data_mesh())
    return of_batch.trace(*arguments), 1


def counted(
    kind: str,
    config: Config,
    name: str,
    options: Mapping[str, str | bool] = types.MappingProxyType({}),
    *,
    seeds: int = 1,
    devices: int = 1,
) -> dict[str, Any]:
    """Compiles a program for a device that is not there, and counts it.

    Args:
      kind: step or evaluation.
      config: of the program.
      name: of `TARGETS`.
      options: of the compiler, beside `compiler_options`.
      seeds: whose steps the program takes.
      devices: over which the batch is split; kernels and bytes are those of one.

    Returns:
      `counts_of` the program; `temporary_bytes`, that it needs beside its arguments and
      results, and `compile_seconds`, with tracing.
    """
    steps = functools.partial(step_program, seeds=seeds)
    program = {"step": steps, "evaluation": evaluation_program}[kind]
    with compiling_for(devices_of(name, devices)):
        started = time.perf_counter()
        traced, num_steps = program(config)
        chosen = compiler_options(kind, config, name, options)
        compiled = traced.lower().compile(chosen)
        seconds = time.perf_counter() - started
    return {
        **counts_of(kernels(compiled.as_text()), num_steps),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def compiler_options(
    kind: str, config: Config, name: str, options: Mapping[str, str | bool]
) -> dict[str, str | bool]:
    """Returns XLA's options for a program: the target's, the config's and further ones.

    Those of GPUs turn off autotuning, which would try kernels on the device. As in a
    run, `training.deterministic` is not of evaluations; those of held-out images, of
    which it is, are not counted here.
    """
    target, found = TARGETS[name], {}
    if kind == "step" and config.training.deterministic:
        found = compiler.deterministic_options(target.platform)
    return target.options | found | dict(options)


def try_out(name: str, options: Mapping[str, str | bool]) -> None:
    """Compiles a trivial program for a device that is not there."""
    with compiling_for(devices_of(name)):
        number = replicate(jax.ShapeDtypeStruct((), jnp.float32), data_mesh())
        lowered = jax.jit(lambda x: x).lower(number)
        lowered.compile(TARGETS[name].options | dict(options))


def counts_of(found: Sequence[Kernel], num_steps: int) -> dict[str, Any]:
    """Sums the kernels of a program.

    Returns:
      `kernels` and `bytes` by kind, a step; and `bodies`: the same for one run of every
      loop's body, without the loops in it, with its `runs` a step; the outermost first.
    """

    def by_kind(some: Sequence[Kernel], times: int) -> dict[str, dict[str, float]]:
        zeros: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        numbers = {"kernels": {**zeros}, "bytes": {**zeros}}
        for kernel in some:
            numbers["kernels"][kernel.kind] += kernel.runs / times
            numbers["bytes"][kernel.kind] += kernel.runs / times * kernel.num_bytes
        return numbers

    bodies = collections.defaultdict(list)
    for kernel in found:
        bodies[kernel.runs, kernel.loop].append(kernel)
    return {
        **by_kind(found, num_steps),
        "bodies": [
            {"runs": runs / num_steps, **by_kind(some, runs)}
            for (runs, loop), some in sorted(bodies.items())
            if loop
        ],
    }


def write_counts(
    found: Mapping[Task, Sequence[dict[str, Any]]], name: str, folder: pathlib.Path
) -> tuple[pathlib.Path, ...]:
    """Writes aot-NAME.json and aot-NAME.md, and makes the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f"aot-{name}.json", folder / f"aot-{name}.md"
    rows = [dataclasses.asdict(task) | outcome for task, (outcome,) in found.items()]
    write_json(paths[0], {"target": name, "rows": rows})
    write_text(paths[1], to_sheet(found, name).to_markdown())
    return paths


def to_sheet(found: Mapping[Task, Sequence[dict[str, Any]]], name: str) -> Sheet:
    """Returns the tables of what was counted, and the notes."""
    totals, kinds, notes = [], [], [_HOW_TO_READ]
    for task, (outcome,) in found.items():
        what = task.row if task.kind == "step" else task.kind
        several = f"{task.seeds} seeds a program" if task.seeds > 1 else ""
        devices = f"{task.devices} devices" if task.devices > 1 else ""
        label = " ".join(filter(None, (what, task.xla_flags, several, devices)))
        if "error" in outcome:
            notes.append(f"failed: {label}: {outcome['error']}")
            continue
        size = sum(outcome["bytes"].values()), outcome["temporary_bytes"]
        numbers = f"{sum(outcome['kernels'].values()):,.0f}", *map(_gigabytes, size)
        count = f"{outcome['kernels']['collectives']:,.0f}"
        sent = f"{outcome['bytes']['collectives'] / 1e6:,.1f}"
        seconds = count, sent, f"{outcome['compile_seconds']:.0f}"
        of_task = label, str(task.batch_size), task.precision
        totals.append([*of_task, *numbers, *seconds])
        kinds.append([label, "", *_cells(outcome)])
        for body in outcome["bodies"]:
            kinds.append(["", f"loop x {body['runs']:g}", *_cells(body)])
    abouts = [one["provenance"] for (one,) in found.values() if "provenance" in one]
    form = "Counted with jax {jax}, jaxlib {jaxlib}, commit {commit}, {date}."
    notes += [form.format(**about) for about in abouts[:1]]
    title = f"Compiled for {name}: a step, or the evaluation of a batch"
    tables = [
        TextTable(_TOTALS, totals, title, words=3),
        TextTable(("row", "part", *KINDS), kinds, "By kind: kernels (GB)", words=2),
    ]
    return Sheet(tables if totals else [], notes)


def _cells(numbers: dict[str, Any]) -> list[str]:
    """Returns kernels and GB of each kind."""
    counts, sizes = numbers["kernels"], numbers["bytes"]
    return [f"{counts[kind]:,.0f} ({_gigabytes(sizes[kind])})" for kind in KINDS]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its package
        return False
