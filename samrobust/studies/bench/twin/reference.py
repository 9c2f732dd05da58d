"""Times the training step of the paper's PyTorch code, for a comparison with ours.

    python -m samrobust.studies.bench.twin.reference --spec='{"method": ...}' \
        --parity=FILE.npz

`samrobust bench --compare=pytorch` calls it; the fields of the spec are those of
`spec.Spec`. Before anything is timed, the variant's own code has to agree with
the other framework on the logits, the image gradient and one update of the parameters,
in float32, on the weights and images of FILE.npz (see `parity.parity`). The last
line on stdout is a JSON object with the results; all else goes to stderr, and a failure
ends with a message and exit code 1.

Variants:

- `reference`: as the reference code runs it. NCHW and float32, every batch comes from
  host memory, the attack computes and discards the gradients of all weights, loss and
  accuracy are read after every step.
- `resident`: the same with the batches on the device, and nothing is read.
- `tuned`: channels_last, gradients of the images alone in the attack, fused SGD,
  bfloat16 autocast if asked for, and on CUDA `torch.compile` and cuDNN's choice of
  algorithms by measurement.
- `compiled`: all that stock PyTorch has to offer: `tuned`, with `torch.compile` on the
  CPU too (20 s of compilation for 7 to 16 % of a step, measured on two cores with
  batches of 8), and on CUDA with every step replayed as one CUDA graph.

Out of scope: loading and augmenting data (`reference` is spared this part of its cost),
evaluation, SAM together with AT, more than one device.

Reference: Wei, Zhu and Zhang, 2023, arXiv 2305.05392, and its code, weizeming/SAM_AT.
"""

import argparse
import contextlib
import itertools
import json
import math
import pathlib
import platform
import resource
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from samrobust.studies.bench.twin.network import PreActResNet
from samrobust.studies.bench.twin.parity import (
    Arrays,
    Batch,
    check_deviations,
    load_weights,
    parity,
    read_batch,
)
from samrobust.studies.bench.twin.spec import Spec, check, parse_spec
from samrobust.studies.bench.twin.steps import (
    ReferenceTrainer,
    capture,
    make_model,
    make_trainer,
)

__all__ = ["main", "make_pool", "run"]

POOL_SIZE = 4  # different batches, cycled
WARMUP_STEPS = {"cpu": 3, "cuda": 10}
WARMUP_SECONDS = 1.0


def run(spec: Spec, arrays: Arrays) -> dict[str, Any]:
    """Holds the variant to the parity file, then times it.

    Args:
      spec: what is timed.
      arrays: the content of the parity file, see `parity.parity`.

    Returns:
      The results, ready for JSON: `seconds_per_step` of every repeat,
      `steps_per_repeat`, `warmup_seconds` (compilation and capture included),
      `peak_memory_bytes` (of the device on CUDA, of the process on the CPU), `parity`
      (the deviations), `versions`, `device`, `num_threads` and `float32_matmul`.

    Raises:
      ValueError: if device, arrays or deviations are not as expected.
    """
    check(
        spec.device == "cpu" or torch.cuda.is_available(),
        "a CUDA device that PyTorch can use",
        "Install a CUDA build of PyTorch, or take device=cpu.",
        device=spec.device,
    )
    _set_float32_matmul("highest")
    deviations = parity(spec, arrays)
    check_deviations(deviations)
    _set_float32_matmul(spec.float32_matmul)
    torch.manual_seed(spec.seed)
    torch.backends.cudnn.benchmark = spec.is_tuned
    if spec.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timings = _time(
        spec, load_weights(make_model(spec), arrays), make_pool(spec, arrays)
    )
    return {
        **timings,
        "peak_memory_bytes": _peak_memory(spec.device),
        "parity": deviations,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "device": _device_name(spec.device),
        "num_threads": torch.get_num_threads(),
        "float32_matmul": spec.float32_matmul,
    }


# --- timing ---------------------------------------------------------------------------


def make_pool(spec: Spec, arrays: Arrays) -> list[Batch]:
    """Batches in host memory: the parity file's if there are enough, else random ones.

    Random pixels have the mean and the standard deviation of the spec in each channel,
    clipped to [0, 1].
    """
    images, labels = read_batch(spec, arrays)
    total = POOL_SIZE * spec.batch_size
    if len(images) < total:
        rng = np.random.default_rng(spec.seed)
        noise = rng.standard_normal([total, *spec.image_shape])
        pixels = np.clip(np.array(spec.mean) + np.array(spec.std) * noise, 0, 1)
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
        labels = rng.integers(0, spec.num_classes, total)
    parts = itertools.pairwise(range(0, total + 1, spec.batch_size))
    return [(images[first:last], labels[first:last]) for first, last in parts]


def _time(spec: Spec, model: PreActResNet, pool: list[Batch]) -> dict[str, Any]:
    """Warms up, then times the repeats."""
    begin = time.perf_counter()
    compiled = spec.variant == "compiled" or spec.device == "cuda"
    trainer = make_trainer(spec, model, compiled=compiled)
    take_step = _stepper(spec, trainer, pool)
    seconds = _warm_up(spec.device, take_step)
    warmup_seconds = time.perf_counter() - begin
    num_steps = max(1, math.ceil(spec.min_seconds / seconds))
    repeats = [_measure(spec.device, take_step, num_steps) for _ in range(spec.repeats)]
    finite = all(bool(x.isfinite().all()) for x in model.parameters())
    check(
        finite,
        "finite parameters after the last step",
        "Lower the learning rate.",
        learning_rate=spec.learning_rate,
    )
    return {
        "seconds_per_step": repeats,
        "steps_per_repeat": [num_steps] * spec.repeats,
        "warmup_seconds": warmup_seconds,
    }


def _stepper(
    spec: Spec, trainer: ReferenceTrainer, pool: list[Batch]
) -> Callable[[], object]:
    """A function that takes the next step, on the next batch."""
    host: list[tuple[Tensor, Tensor]] = [
        (torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in pool
    ]
    if spec.variant == "reference":
        batches = itertools.cycle(host)

        def step_and_read() -> tuple[float, float]:
            loss, num_correct = trainer.step(*trainer.place(*next(batches)))
            return loss.item(), num_correct.item()

        return step_and_read
    resident = [trainer.place(*batch) for batch in host]
    batches = itertools.cycle(resident)
    step = trainer.step
    if spec.variant == "compiled" and spec.device == "cuda":
        step = capture(step, *resident[0])
    return lambda: step(*next(batches))


def _warm_up(device: str, take_step: Callable[[], object]) -> float:
    """Takes steps until enough are done; the seconds of the fastest."""
    begin, seconds = time.perf_counter(), []
    while (
        len(seconds) < WARMUP_STEPS[device]
        or time.perf_counter() - begin < WARMUP_SECONDS
    ):
        seconds.append(_measure(device, take_step, 1))
    return min(seconds)


def _measure(device: str, take_step: Callable[[], object], num_steps: int) -> float:
    """Seconds per step of `num_steps` in a row, the device idle before and after."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(num_steps):
        take_step()
    _synchronize(device)
    return (time.perf_counter() - begin) / num_steps


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- the machine ----------------------------------------------------------------------


def _set_float32_matmul(precision: str) -> None:
    """TF32 in products and convolutions, or not."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"


def _peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes but on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


# --- the command line -----------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises what it has to say."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"Expected --spec=JSON and --parity=FILE.npz, got: {message}.")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; see the module."""
    parser = _Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--spec", required=True, help="fields of the spec, in JSON")
    parser.add_argument("--parity", required=True, type=pathlib.Path, help="npz file")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            flags = parser.parse_args(arguments)
            spec = parse_spec(flags.spec)
            with np.load(flags.parity) as file:
                arrays = dict(file)
            results = run(spec, arrays)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"reference: {error}")
    except RuntimeError as error:  # PyTorch's own, compilation included
        traceback.print_exc()
        sys.exit(
            f"reference: {type(error).__name__}, see above. Short of memory, "
            "lower batch_size; short of a compiler, take another variant."
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
