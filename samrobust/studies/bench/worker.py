"""One measurement in a process of its own: `python -m samrobust.studies.bench.worker`.

Reads a `Spec` as JSON from standard input and prints the outcome as JSON, alone on the
last line of standard output. A process a measurement: peak memory counts from its
start, and neither the compiler's caches nor the allocator know another row.
"""

import dataclasses
import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax

from samrobust.experiments import building, configuration
from samrobust.studies.bench import ceilings, programs
from samrobust.studies.bench.counts import count
from samrobust.studies.bench.images import make_dataset
from samrobust.studies.bench.parity import parity
from samrobust.studies.bench.timing import Protocol
from samrobust.system.distributed import check_platform
from samrobust.system.provenance import provenance
from samrobust.system.runtime import enable_compilation_cache, keep_freed_memory

__all__ = ["BAD_INPUT", "Spec", "main"]

BAD_INPUT = 2  # the exit code where no row can be measured; the last line says why


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a worker measures.

    Attributes:
      kind: `ceilings`, `counts`, `step`, `unrolled`, `epoch`, `evaluation`, `parity`,
        or `probe` for nothing but what every outcome says.
      config: a config file and its row.
      overrides: of the config, as on the command line.
      repeats: see `Protocol`.
      min_seconds: see `Protocol`.
      path: where `parity` writes its file, and a traced run its trace.
      trace: measure nothing, write a trace of a few calls instead.
    """

    kind: str
    config: str
    overrides: tuple[str, ...] = ()
    repeats: int = 5
    min_seconds: float = 2.0
    path: str = ""
    trace: bool = False

    @property
    def protocol(self) -> Protocol:
        """How long to measure; accelerators get a longer warm-up."""
        warmup = 3 if jax.default_backend() == "cpu" else 10
        return Protocol(self.repeats, self.min_seconds, warmup)


def main() -> None:
    """Measures what standard input asks for."""
    enable_compilation_cache()
    keep_freed_memory()
    try:
        check_platform()
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_INPUT)
    spec = Spec(**json.load(sys.stdin))
    config = configuration.load_config(spec.config, spec.overrides)
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "probe": lambda *_: {},
        "ceilings": _ceilings,
        "counts": _counts,
        "step": programs.step,
        "unrolled": programs.unrolled,
        "epoch": programs.epoch,
        "evaluation": programs.evaluation,
        "parity": parity,
    }
    outcome = kinds[spec.kind](config, spec)
    outcome |= {
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "peak_memory": _peak_memory(),
        "provenance": provenance(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
    }
    print(json.dumps(outcome))


def _ceilings(config: Any, spec: Spec) -> dict[str, Any]:
    protocol = dataclasses.replace(
        spec.protocol, min_seconds=min(spec.min_seconds, 0.5)
    )
    return {
        "matmul": ceilings.matmul_rate(config.model.dtype, protocol),
        "copy": ceilings.copy_bandwidth(protocol),
    }


def _counts(config: Any, _: Spec) -> dict[str, Any]:
    config = config.copy_and_resolve_references()
    config.model.dtype = "float32"  # a CPU computes bfloat16 in float32
    dataset = make_dataset(config.data.name, 1, 1)
    model = building.make_model(config, dataset)
    counts = count(model, dataset.image_shape, config.training.batch_size)
    return {"counts": dataclasses.asdict(counts)}


def _peak_memory() -> int:
    """Bytes: of the first device, or resident in the host where it keeps no count."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
