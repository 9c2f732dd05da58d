"""The training step of the paper's PyTorch code, timed for a comparison with ours.

    python -m samrobust.studies.bench.twin.reference '{"parity": "FILE.npz", ...}'

`samrobust bench --compare=pytorch` calls it; the other fields are those of `TwinSpec`.
Before anything is timed, the variant's own code has to agree with the other framework
on the logits, the image gradient and one update of the parameters, in float32, on the
weights and images of FILE.npz (see `parity`); and what is timed, compiled and in its
precision, with that code on a step of a full batch (see `first_step`). The last line on
stdout is a JSON object with the results.

Variants:

- `reference`: as the reference code runs it. NCHW and float32, every batch comes from
  host memory, the attack computes and discards the gradients of all weights, loss and
  accuracy are read after every step.
- `resident`: the same with the batches on the device, and nothing is read.
- `tuned`: channels_last, gradients of the images alone in the attack, fused SGD,
  bfloat16 autocast if asked for, and on CUDA `torch.compile` and cuDNN's choice of
  algorithms by measurement.
- `graphed`: on CUDA alone: `tuned` without `torch.compile`, so with cuDNN's own batch
  normalization, and every step replayed as one CUDA graph.
- `compiled`: `tuned`, with `torch.compile` on the CPU too (20 s of compilation for 7 to
  16 % of a step, measured on two cores with batches of 8), and on CUDA with every step
  replayed as one CUDA graph.
- `autotuned`: `compiled` in the mode max-autotune.
- `pure`: `compiled` with parameters and momentum in bfloat16, too.

The last four are the hardest opponents that stock PyTorch has; which of them is the
fastest is for the device to say.

Out of scope: loading and augmenting data (`reference` is spared this part of its cost),
evaluation, SAM together with AT, more than one device.

Reference: Wei, Zhu and Zhang, 2023, arXiv 2305.05392, and its code, weizeming/SAM_AT.
"""

import dataclasses
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samrobust.checks import check
from samrobust.studies.bench.timing import measure, peak_resident_bytes
from samrobust.studies.bench.twin.steps import (
    ReferenceTrainer,
    TwinSpec,
    capture,
    make_model,
    make_trainer,
)

__all__ = ["STEP_TOLERANCES", "first_step", "main", "make_pool", "parity", "run"]

# Largest deviations that are allowed, relative to the largest value. Two frameworks
# are within 5e-6, unless rounding carries an activation over the kink of its ReLU: then
# an image gradient of PreActResNet-18 was seen to be off by 2e-3 and an update by
# 4e-5. So the weights of the file are to keep activations off the kinks, by scales of
# 0.3 and biases of -2 or 2 in batch normalization. On an H200 they are within 1e-6.
_TOLERANCES = {"logits": 1e-5, "image_gradient": 1e-4, "update": 1e-5}

# The same for a step as it is timed, in the l2 norm over all parameters. In bfloat16
# on a CPU, gradients of PreActResNet-18 were within 0.01, those of a small network with
# activations on the kinks within 0.18. float32 may be TF32.
STEP_TOLERANCES = {"float32": 0.02, "bfloat16": 0.2}

_POOL_SIZE = 4  # different batches, cycled

Arrays = Mapping[str, np.ndarray]


def run(spec: TwinSpec, arrays: Arrays) -> dict[str, Any]:
    """Holds the variant to the parity file, then times it.

    Args:
      spec: what is timed.
      arrays: the content of the parity file, see `parity`.

    Returns:
      The results, ready for JSON: `seconds` of a step in every repeat, `peak_memory`
      in bytes (of the device on CUDA, of the process on the CPU), `parity` (the
      deviations, of `first_step` too), `versions` and `float32_matmul`.

    Raises:
      ValueError: if device, arrays or deviations are not as expected.
    """
    on_cuda = spec.device == "cuda"
    check(
        not on_cuda or torch.cuda.is_available(),
        "a CUDA device that PyTorch can use",
        "Install a CUDA build of PyTorch, or take device=cpu.",
        device=spec.device,
    )
    _set_float32_matmul("highest")
    deviations = parity(spec, arrays)
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in _TOLERANCES.items())
    check(
        # A deviation that is NaN is none to be trusted.
        all(deviations[name] <= limit for name, limit in _TOLERANCES.items()),
        f"deviations from the parity file {limits}",
        "The two frameworks do not compute the same thing, and are not timed.",
        **deviations,
    )
    _set_float32_matmul(spec.float32_matmul)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = spec.is_tuned
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    model = _loaded_model(spec, arrays)
    trainer = make_trainer(spec, model, mode=spec.compiler_mode)
    if spec.is_tuned:
        found, limit = first_step(trainer, arrays), STEP_TOLERANCES[spec.precision]
        check(
            all(deviation <= limit for deviation in found.values()),
            f"a step within {limit:g} of the same code's in float32, uncompiled",
            "It is not the same step, and is not timed.",
            **found,
        )
        deviations |= found
    seconds = measure(
        _stepper(spec, trainer),
        repeats=spec.repeats,
        min_seconds=spec.min_seconds,
        warmup_calls=10 if on_cuda else 6,
        wait=lambda _: torch.cuda.synchronize() if on_cuda else None,
    )
    check(
        all(bool(x.isfinite().all()) for x in model.parameters()),
        "finite parameters after the last step",
        "Lower the learning rate.",
        learning_rate=spec.sgd["lr"],
    )
    peak = torch.cuda.max_memory_allocated() if on_cuda else peak_resident_bytes()
    return {
        "seconds": seconds,
        "peak_memory": peak,
        "parity": deviations,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "float32_matmul": spec.float32_matmul,
    }


def parity(spec: TwinSpec, arrays: Arrays) -> dict[str, float]:
    """Computes deviations `max |a - b| / max |b|` of the variant's uncompiled step.

    Args:
      spec: method and precision do not count: standard training in float32.
      arrays: `network/model....`, weights and statistics by PyTorch's names, with the
        normalization `network/mean` and `network/std`; `images` [B, H, W, C] in [0, 1]
        and `labels` [B]; in train mode `logits` [B, K] and `image_gradient`
        [B, H, W, C] of the summed cross entropy; `updated/model....`, the parameters
        after one step of the spec's SGD.

    Returns:
      The deviations of `logits`, `image_gradient` and `update`.

    Raises:
      ValueError: if an array is missing or not of the spec's shape.
    """
    wanted = {"images", "labels", "logits", "image_gradient"}
    missing = sorted(wanted - arrays.keys())
    check(not missing, "all arrays of the parity file", missing=missing)
    plain = dataclasses.replace(spec, method="st", precision="float32")
    trainer = make_trainer(plain, _loaded_model(plain, arrays))
    planes = np.ascontiguousarray(arrays["images"].transpose(0, 3, 1, 2), np.float32)
    labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    batch = trainer.place(torch.from_numpy(planes), labels)
    with torch.no_grad():
        logits = trainer.loss(*batch)[1].cpu().numpy()
    gradient = trainer.image_gradient(*batch) * len(labels)
    trainer.step(*batch)
    state = trainer.model.state_dict()
    pairs = {
        "logits": [(logits, arrays["logits"])],
        "image_gradient": [
            (gradient.permute(0, 2, 3, 1).cpu().numpy(), arrays["image_gradient"])
        ],
        "update": [
            (state[name.removeprefix("updated/")].cpu().numpy(), array)
            for name, array in arrays.items()
            if name.startswith("updated/")
        ],
    }
    return {name: _deviation(found) for name, found in pairs.items()}


def first_step(trainer: ReferenceTrainer, arrays: Arrays) -> dict[str, float]:
    """Takes a step, and the same one by its own code in float32 and uncompiled.

    Both from the weights of the parity file, on the first batch of the pool, with the
    attack begun at its center.

    Returns:
      The deviations `||a - b|| / ||b||` of the `step_loss` and of the `step_gradient`
      in all parameters, which SGD took.
    """
    plain = dataclasses.replace(trainer.spec, precision="float32")
    losses, gradients = [], []
    for one in (trainer, make_trainer(plain, _loaded_model(plain, arrays))):
        images, labels = one.place(*make_pool(plain)[0])
        losses.append(one.step(images, labels, torch.zeros_like(images))[0].float())
        found = [x.grad for x in one.model.parameters() if x.grad is not None]
        gradients.append(torch.cat([gradient.float().ravel() for gradient in found]))
    return {
        name: float((own - plain).norm() / plain.norm())
        for name, (own, plain) in (("step_loss", losses), ("step_gradient", gradients))
    }


def _deviation(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Returns the largest gap between ours and theirs, relative to their largest."""
    for own, their in pairs:
        condition = f"shape {own.shape} in the parity file"
        check(own.shape == their.shape, condition, shape=their.shape)
    gap = max(np.max(np.abs(own - their)) for own, their in pairs)
    return float(gap / max(np.max(np.abs(their)) for _, their in pairs))


def _loaded_model(spec: TwinSpec, arrays: Arrays) -> nn.Module:
    """Returns the network with the weights of the parity file."""
    named = {n: torch.from_numpy(x) for n, x in arrays.items() if "network/" in n}
    model = make_model(spec)
    try:
        model.load_state_dict({n.removeprefix("network/"): x for n, x in named.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"Expected the weights of this network in the parity file, got {reason}"
        ) from error
    return model


def make_pool(spec: TwinSpec) -> list[tuple[Tensor, Tensor]]:
    """Returns random batches in host memory, the same at every call.

    Pixels have the mean and the standard deviation of the spec in each channel, clipped
    to [0, 1].
    """
    rng = np.random.default_rng(0)
    mean, std = np.array(spec.mean), np.array(spec.std)

    def batch() -> tuple[Tensor, Tensor]:
        noise = rng.standard_normal([spec.batch_size, *spec.image_shape])
        pixels = np.clip(mean + std * noise, 0, 1)
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
        labels = rng.integers(0, spec.network["num_classes"], spec.batch_size)
        return torch.from_numpy(planes), torch.from_numpy(labels)

    return [batch() for _ in range(_POOL_SIZE)]


def _stepper(spec: TwinSpec, trainer: ReferenceTrainer) -> Callable[[], object]:
    """Returns a function that takes the next step, on the next batch."""
    pool = make_pool(spec)
    if spec.variant == "reference":
        batches = itertools.cycle(pool)

        def step_and_read() -> tuple[float, float]:
            loss, num_correct = trainer.step(*trainer.place(*next(batches)))
            return loss.item(), num_correct.item()

        return step_and_read
    resident = [trainer.place(*batch) for batch in pool]
    batches, step = itertools.cycle(resident), trainer.step
    if spec.is_graphed:
        step = capture(step, *resident[0])
    return lambda: step(*next(batches))


def _set_float32_matmul(precision: str) -> None:
    """Switches TF32 in products and convolutions: `high` is on, `highest` off."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"


def main() -> None:
    """Times what the command line asks for; see the module."""
    fields = json.loads(sys.argv[1])
    with np.load(fields.pop("parity")) as file:
        arrays = dict(file)
    try:
        results = run(TwinSpec(**fields), arrays)
    except RuntimeError as error:  # PyTorch's own, compilation included
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        sys.exit(
            f"{type(error).__name__}: {first} Short of memory, lower batch_size; short "
            "of a compiler, take another variant."
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
