"""Measurements in processes of their own: environment, output, interruption."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from samrobust.checks import check
from samrobust.experiments import configuration
from samrobust.studies.bench.plan import Options, Task, spec_of, task_overrides
from samrobust.studies.bench.worker import BAD_INPUT

__all__ = ["Launcher", "StoppedError", "check_pytorch"]

_TWIN = "samrobust.studies.bench.twin.reference"


def check_pytorch(options: Options) -> None:
    """Refuses a comparison that cannot be made, before anything is measured.

    Raises:
      ValueError: without the package, or without a step to compare.
    """
    if options.compare is None:
        return
    for holds, condition, fix in (
        ("step" in options.measure, "step in --measure", "Steps are compared."),
        (
            importlib.util.find_spec("torch") is not None,
            "the package torch",
            "Install it: pip install torch.",
        ),
    ):
        check(holds, condition, fix, **{"--compare": options.compare})


class StoppedError(RuntimeError):
    """The bench was asked to stop; what was measured is kept."""


class Launcher:
    """Starts workers and waits for them.

    Args:
      folder: for the compilation cache that they share, and parity's files.
      should_stop: asked while waiting.
    """

    def __init__(self, folder: pathlib.Path, should_stop: Callable[[], bool]):
        self._folder, self._should_stop = folder, should_stop
        self._platform, self._num_devices = "", 0  # as the first worker finds them
        self._matmul_precision: str | None = None
        self._parity: dict[str, dict[str, Any]] = {}

    def worker(
        self, spec: Mapping[str, Any], task: Task | None = None
    ) -> dict[str, Any]:
        """The outcome of `samrobust.studies.bench.worker`, or `{"error": ...}`."""
        environment = dict(os.environ)
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self._folder / "cache")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        if task is not None:
            if task.devices and not self._platform:
                self.worker({**spec, "kind": "probe"})
            environment |= self._devices(task, environment)
        counts = spec["kind"] == "counts"  # on the CPU, whatever the device
        environment |= {"JAX_PLATFORMS": "cpu"} if counts else {}
        command = [sys.executable, "-m", "samrobust.studies.bench.worker"]
        outcome = self._run(command, environment, json.dumps(spec))
        if not self._platform and not counts and "error" not in outcome:
            self._platform = outcome["platform"]
            self._num_devices = outcome["num_devices"]
            self._matmul_precision = outcome["matmul_precision"]
        return outcome

    def _devices(self, task: Task, environment: Mapping[str, str]) -> dict[str, str]:
        """XLA's flags, and as many devices as the row wants."""
        flags = [environment.get("XLA_FLAGS", ""), task.xla_flags]
        own = {}
        if task.devices and self._platform == "cpu":
            flags.append(f"--xla_force_host_platform_device_count={task.devices}")
        elif task.devices and task.devices != self._num_devices:
            check(
                task.devices < self._num_devices and self._platform == "gpu",
                f"--devices=0 or {self._num_devices}, which are there",
                "Fewer than all can be chosen on GPUs alone.",
                devices=task.devices,
            )
            own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(task.devices)))
        return own | {"XLA_FLAGS": " ".join(filter(None, flags))}

    def pytorch(self, task: Task, options: Options) -> dict[str, Any]:
        """The outcome of `twin/reference.py`, or `{"error": ...}`."""
        overrides = task_overrides(task, options)
        config = configuration.load_config(f"{options.config}:{task.row}", overrides)
        key = str(task.batch_size)
        path = self._folder / f"parity-{key}.npz"
        if key not in self._parity:
            spec = spec_of(task, options) | {"kind": "parity", "path": str(path)}
            spec["config"] = f"{options.config}:st"
            spec["overrides"] = (*overrides, "--config.model.dtype=float32")
            self._parity[key] = self.worker(spec)
        parity = self._parity[key]
        if "error" in parity:
            return parity
        spec = {
            "method": task.method,
            "variant": task.variant,
            "batch_size": task.batch_size,
            "precision": task.precision,
            "device": "cpu" if self._platform == "cpu" else "cuda",
            "width": config.model.width,
            "blocks": list(config.model.blocks),
            **{name: parity[name] for name in ("image_shape", "num_classes")},
            **{name: parity[name] for name in ("mean", "std")},
            "num_steps": config.attack.num_steps,
            "norm": config.attack.norm,
            "epsilon": config.attack.epsilon / 255,
            "step_size": config.attack.step_size / 255,
            "rho": config.sam.rho,
            "learning_rate": config.training.learning_rate,
            "momentum": config.training.momentum,
            "weight_decay": config.training.weight_decay,
            "repeats": options.repeats,
            "min_seconds": options.min_seconds,
            "seed": 0,
            "float32_matmul": _torch_float32(self._matmul_precision),
        }
        command = [sys.executable, "-m", _TWIN, f"--spec={json.dumps(spec)}"]
        return self._run([*command, f"--parity={path}"], dict(os.environ), "")

    def _run(
        self, command: Sequence[str], environment: dict[str, str], text: str
    ) -> dict[str, Any]:
        """The JSON on the last line a command prints, or its complaint.

        Raises:
          ValueError: where the machine cannot run any row.
        """
        with (
            tempfile.TemporaryFile("w+") as output,
            tempfile.TemporaryFile("w+") as complaints,
        ):
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=complaints,
                env=environment,
                text=True,
            )
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # ended: its complaint says why
                child.stdin.write(text)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            self._wait(child)
            output.seek(0)
            complaints.seek(0)
            if child.returncode != 0:
                lines = complaints.read().strip().splitlines() or ["no message"]
                if child.returncode == BAD_INPUT:
                    raise ValueError(lines[-1])
                return {"error": f"exit code {child.returncode}: {lines[-1]}"}
            return json.loads(output.read().strip().splitlines()[-1])

    def _wait(self, child: subprocess.Popen) -> None:
        """Waits for a process; ends it when asked to stop."""
        try:
            while child.poll() is None:
                if self._should_stop():
                    message = "Stopped; what was measured so far is kept."
                    raise StoppedError(message)
                time.sleep(0.1)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def _torch_float32(precision: str | None) -> str:
    """PyTorch's name for JAX's `jax_default_matmul_precision`, so that both use TF32.

    On GPUs, JAX's default is TF32; on CPUs neither framework knows another float32.
    """
    return "highest" if precision in ("highest", "float32") else "high"
