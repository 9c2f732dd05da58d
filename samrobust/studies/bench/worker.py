"""One measurement in a process of its own: `python -m samrobust.studies.bench.worker`.

Reads what to measure from its one argument, the arguments of `measured` in JSON, and
prints the outcome in JSON, alone on the last line of standard output. A process for
each measurement: peak memory counts from its start, and neither the compiler's caches
nor the allocator know another row.
"""

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax

from samrobust.experiments import building
from samrobust.studies.bench import aot, programs
from samrobust.studies.bench.counts import count_passes
from samrobust.studies.bench.parity import parity
from samrobust.studies.bench.plan import Options, Task, config_of
from samrobust.studies.bench.timing import measure, peak_resident_bytes
from samrobust.system import compiler, runtime
from samrobust.system.distributed import check_platform
from samrobust.system.provenance import provenance
from samrobust.types import Config

__all__ = ["BAD_INPUT", "main", "measured", "outcome"]

_ROOFLINE_SECONDS = 0.5  # of a repeat, at most
BAD_INPUT = 2  # the exit code where no row can be measured; the last line says why


def main() -> None:
    """Measures what the command line asks for; of a probe, asks XLA of all flags."""
    runtime.collect_garbage_seldom()
    runtime.enable_compilation_cache()
    runtime.keep_freed_memory()
    spec = json.loads(sys.argv[1])
    try:
        check_platform()
        if spec["task"]["kind"] == "probe":
            _check_flags(Options(**spec["options"]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    print(json.dumps(outcome(spec)))


def outcome(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns what a measurement found, with what it was taken on.

    Args:
      spec: the arguments of `measured`, in JSON's types.
    """
    task, options = Task(**spec["task"]), Options(**spec["options"])
    return measured(task, options, spec["path"]) | {
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "peak_memory": _peak_memory(),
        "provenance": provenance(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
    }


def measured(task: Task, options: Options, path: str) -> dict[str, Any]:
    """Returns the outcome of one measurement.

    Args:
      task: what is measured; the kind `probe` measures nothing, see `main`.
      options: of the bench; with `aot` it compiles and counts, and measures nothing.
      path: where `parity` writes its file; the others, if it is not empty, write a
        trace there and measure nothing.
    """
    config, kind = config_of(task, options), task.kind
    if kind == "probe":
        return {}
    if options.aot is not None:
        flags = compiler.parse_compiler_options(task.xla_flags)
        setting = {"seeds": task.seeds, "devices": max(1, task.devices)}
        return aot.counted(kind, config, options.aot, flags, **setting)
    compiler.add_compiler_options(task.xla_flags)
    if kind == "parity":
        return parity(config, path)
    if kind == "counts":
        return _counts(config)
    longest = _ROOFLINE_SECONDS if kind == "roofline" else math.inf
    timed = functools.partial(
        measure,
        repeats=options.repeats,
        min_seconds=min(options.min_seconds, longest),
        warmup_calls=6 if jax.default_backend() == "cpu" else 10,
        wait=jax.block_until_ready,
    )
    traced = functools.partial(_trace, folder=path)
    several = {"seeds": task.seeds} if kind == "step" else {}
    return getattr(programs, kind)(config, traced if path else timed, **several)


def _check_flags(options: Options) -> None:
    """Refuses options of XLA that the compiler of the bench does not know."""
    described = options.aot and functools.partial(aot.try_out, options.aot)
    for flags in filter(None, options.xla_flags):
        compiler.check_compiler_options(flags, described or compiler.try_here)


def _trace(call: Callable[[], Any], folder: str) -> list[float]:
    """Writes a Perfetto trace of two calls in place of measuring; returns no value."""
    jax.block_until_ready(call())
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        for _ in range(2):
            jax.block_until_ready(call())
    return []


def _counts(config: Config) -> dict[str, Any]:
    facts = building.load_facts(config)
    model = building.make_model(config, facts)
    passes = count_passes(model, facts.image_shape, config.training.batch_size)
    return {"passes": passes}


def _peak_memory() -> int:
    """Returns bytes: of the first device, or of the host where it keeps no count."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return peak_resident_bytes()


if __name__ == "__main__":
    main()
