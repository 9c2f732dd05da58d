"""The tasks of a bench, run in rounds, each in a process of its own.

Every row once, then every row again, so that a machine that grows slow for a minute
slows a round of them all and not one of them. The first round compiles into an empty
cache, which the later ones find filled.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from samrobust.checks import check
from samrobust.experiments import building
from samrobust.studies.bench import comparison
from samrobust.studies.bench.plan import Options, Task, config_of, known_ceilings
from samrobust.studies.bench.worker import BAD_INPUT
from samrobust.system.files import glance
from samrobust.training import InterruptedRunError

__all__ = ["Launcher", "Outcome", "schedule"]

# What a process found, or {"error": its complaint}.
Outcome: TypeAlias = dict[str, Any]

_WORKER = "samrobust.studies.bench.worker"
_TWIN = "samrobust.studies.bench.twin.reference"


def schedule(tasks: Sequence[Task], options: Options) -> list[tuple[str, Task]]:
    """Returns what to run, in order, with names for people.

    The roofline of each precision that is not known, the counts, then every row once,
    and once again. Of programs that are counted alone, each once.
    """
    if options.aot:
        return [(task.name, task) for task in tasks]
    rounds = [
        (f"round {number + 1}: {task.name}", task)
        for number in range(options.rounds)
        for task in tasks
    ]
    if options.no_rates:
        return rounds
    known = known_ceilings(options)
    first = Task("counts", "", tasks[0].row, tasks[0].batch_size, "float32")
    beside = [
        dataclasses.replace(first, kind="roofline", precision=precision)
        for precision in dict.fromkeys(task.precision for task in tasks)
        if precision not in known
    ]
    return [(task.name, task) for task in (*beside, first)] + rounds


class Launcher:
    """A launcher of tasks, which it waits for: `launch(task) -> outcome`.

    Args:
      options: of the bench.
      folder: for the parity files, and the compilation cache that the tasks share
        unless the options name one.
      should_stop: asked while waiting; where true, the process is ended and
        `InterruptedRunError` raised.
    """

    def __init__(
        self, options: Options, folder: pathlib.Path, should_stop: Callable[[], bool]
    ):
        self._options, self._folder = options, folder
        self._should_stop = should_stop
        self._probed: Outcome = {}

    def __call__(self, task: Task, path: pathlib.Path | None = None) -> Outcome:
        """Runs a task.

        Args:
          task: to run.
          path: for its trace, instead of a measurement, or for its parity file.

        Raises:
          InterruptedRunError: when asked to stop.
          ValueError: where the machine cannot run any row.
        """
        if task.kind == "pytorch":
            return self._pytorch(task)
        spec = {
            "task": dataclasses.asdict(task),
            "options": dataclasses.asdict(self._options),
            "path": str(path or ""),
        }
        environment = self._devices(task) | {
            "JAX_COMPILATION_CACHE_DIR": self._options.cache
            or str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if task.kind == "counts" or self._options.aot:  # whatever the device
            environment["JAX_PLATFORMS"] = "cpu"
        return self._run(_WORKER, spec, environment)

    def check_flags(self, task: Task) -> None:
        """Refuses options of XLA that its compiler for the device does not know.

        Without any, no process is started.

        Args:
          task: any of the bench.

        Raises:
          ValueError: with XLA's complaint.
        """
        if any(self._options.xla_flags):
            self._machine(task)

    def takes_ceilings(self, task: Task) -> bool:
        """Returns whether the known ceilings may be those of this device.

        Unless they name a device, no process is started.

        Args:
          task: any of the bench.
        """
        device = glance(pathlib.Path(self._options.ceilings or "")).get("device")
        here = self._machine(task).get("provenance", {}) if device else {}
        return device == here.get("device")

    def _machine(self, task: Task) -> Outcome:
        """Returns what a process without any settings finds: platform and devices.

        That process also refuses options of XLA which are not known.
        """
        if not self._probed:
            probe = dataclasses.replace(task, kind="probe", devices=0, xla_flags="")
            found = self(probe)
            if "error" in found:  # a crash is that of some rows, and may pass
                return found
            self._probed = found
        return self._probed

    def _devices(self, task: Task) -> dict[str, str]:
        """Returns the environment for a task's number of devices."""
        if not task.devices or self._options.aot:
            return {}
        machine = self._machine(task)
        there, platform = machine.get("num_devices", 0), machine.get("platform")
        if platform == "cpu":
            return {"JAX_NUM_CPU_DEVICES": str(task.devices)}
        if task.devices == there:
            return {}
        check(
            task.devices < there and platform == "gpu",
            f"--devices=0 or {there}, which are there",
            "Only on GPUs can fewer than all be chosen.",
            devices=task.devices,
        )
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(task.devices)))}

    def _pytorch(self, task: Task) -> Outcome:
        """Runs `twin/reference.py` on weights and batches of ours."""
        row = comparison.parity_row(task.row)
        ours = Task("parity", "", row, task.batch_size, "float32")
        path = self._folder / f"parity-{task.batch_size}-{zlib.crc32(row.encode())}.npz"
        if not path.exists() and "error" in (made := self(ours, path)):
            return made
        config, machine = config_of(task, self._options), self._machine(task)
        facts, fields = building.load_facts(config), comparison.spec_fields(config)
        fields["network"] |= {
            "num_classes": facts.num_classes,
            "in_channels": facts.image_shape[-1],
        }
        # PyTorch's name for JAX's precision, so that both use TF32 or neither: on GPUs
        # it is JAX's default, and CPUs know no other float32.
        exact = machine.get("matmul_precision") in ("highest", "float32")
        spec = {
            "parity": str(path),
            **fields,
            "variant": task.variant,
            "batch_size": task.batch_size,
            "precision": task.precision,
            "float32_matmul": "highest" if exact else "high",
            "device": "cpu" if machine.get("platform") == "cpu" else "cuda",
            "mean": facts.mean,
            "std": facts.std,
            "image_shape": facts.image_shape,
            "repeats": self._options.repeats,
            "min_seconds": self._options.min_seconds,
        }
        return self._run(_TWIN, spec)

    def _run(
        self, module: str, spec: Outcome, environment: dict[str, str] | None = None
    ) -> Outcome:
        """Returns the JSON on the last line that a module prints, or its complaint."""
        command = [sys.executable, "-m", module, json.dumps(spec)]
        with (
            # No pipes: they stay open as long as any process of the child's does.
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as complaints,
        ):
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=complaints,
                env=os.environ | (environment or {}),
            )
            try:
                while child.poll() is None:
                    if self._should_stop():
                        raise InterruptedRunError(
                            "Stopped. What was written is kept until a rerun, which "
                            "begins again, has measured its first row."
                        )
                    time.sleep(0.1)
            finally:
                child.kill()  # does nothing to one that has ended
                child.wait()
            output.seek(0)
            complaints.seek(0)
            if child.returncode == 0:
                return json.loads(output.read().strip().splitlines()[-1])
            complaint = (complaints.read().strip().splitlines() or ["no message"])[-1]
        if child.returncode == BAD_INPUT:
            raise ValueError(complaint)
        return {"error": f"exit code {child.returncode}: {complaint}"}
