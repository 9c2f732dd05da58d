"""What `reference.py` is asked to time: the fields, and what they may be.

Radii and steps are in pixel units (8/255, not 8). Every field is given by the caller,
so that none of a comparison's two sides has a default that the other does not share.

Out of scope: anything that needs PyTorch.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

__all__ = ["Spec", "check", "parse_spec"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A training step and how to time it.

    Attributes:
      method: `st`, `sam` or `at`.
      variant: `reference`, `resident`, `tuned` or `compiled`; see
        `reference.py`.
      batch_size: examples in a batch.
      precision: `float32`, or `bfloat16` for autocast in a tuned variant.
      float32_matmul: `highest`, or `high` for TF32 in products and convolutions.
      device: `cpu` or `cuda`.
      width: channels of the first stage.
      blocks: blocks of each stage.
      image_shape: [H, W, C].
      num_classes: number of logits.
      mean: of the pixels, one a channel.
      std: of the pixels, one a channel, > 0.
      norm: of the attack, `linf` or `l2`; of no account without one.
      epsilon: the attack's radius.
      step_size: the length of its steps.
      num_steps: their number.
      rho: SAM's radius.
      learning_rate: of SGD.
      momentum: of SGD.
      weight_decay: of SGD, on all parameters.
      repeats: number of timed repeats.
      min_seconds: the least duration of a repeat.
      seed: of the batches and the random starts.
    """

    method: str
    variant: str
    batch_size: int
    precision: str
    float32_matmul: str
    device: str
    width: int
    blocks: list[int]
    image_shape: list[int]
    num_classes: int
    mean: list[float]
    std: list[float]
    norm: str
    epsilon: float
    step_size: float
    num_steps: int
    rho: float
    learning_rate: float
    momentum: float
    weight_decay: float
    repeats: int
    min_seconds: float
    seed: int

    @property
    def is_tuned(self) -> bool:
        """Whether the step is written for speed, rather than as the reference's."""
        return self.variant in ("tuned", "compiled")


def check(holds: bool, condition: str, fix: str = "", /, **values: Any) -> None:
    """Raises `ValueError` with `Expected <condition>, got <name>=<value>. <fix>`."""
    if not holds:
        got = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"Expected {condition}, got {got}. {fix}".rstrip())


def _is_integer(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any, *, positive: bool = False) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return value > 0 if positive else value >= 0


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(holds, value))


_CHOICES = {
    "method": ("st", "sam", "at"),
    "variant": ("reference", "resident", "tuned", "compiled"),
    "precision": ("float32", "bfloat16"),
    "float32_matmul": ("highest", "high"),
    "device": ("cpu", "cuda"),
    "norm": ("linf", "l2"),
}
_COUNTS = ("batch_size", "width", "num_classes", "repeats")
_NUMBERS = ("epsilon", "step_size", "rho", "learning_rate", "momentum", "weight_decay")


def parse_spec(text: str) -> Spec:
    """Reads a spec from a JSON object with exactly the fields of `Spec`.

    Raises:
      ValueError: if it is no such object, or a field is outside its range.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Expected --spec to be JSON, got: {error}.") from error
    check(isinstance(values, dict), "--spec to be a JSON object", spec=values)
    fields = {field.name for field in dataclasses.fields(Spec)}
    check(
        values.keys() == fields,
        "every field of the spec and no other",
        missing=sorted(fields - values.keys()),
        unknown=sorted(values.keys() - fields),
    )
    spec = Spec(**values)
    _check_ranges(spec)
    _check_combinations(spec)
    return spec


def _check_ranges(spec: Spec) -> None:
    """Every field for itself."""

    def expect(name: str, condition: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(spec, name)
        check(holds(value), condition.format(name), **{name: value})

    for name, choices in _CHOICES.items():
        expect(name, f"{{}} in [{', '.join(choices)}]", choices.__contains__)
    for name in _COUNTS:
        expect(name, "an integer {} >= 1", lambda value: _is_integer(value, 1))
    for name in ("num_steps", "seed"):
        expect(name, "an integer {} >= 0", lambda value: _is_integer(value, 0))
    for name in _NUMBERS:
        expect(name, "a finite number {} >= 0", _is_number)
    expect("min_seconds", "{} > 0", lambda value: _is_number(value, positive=True))
    for name in ("blocks", "image_shape"):
        expect(
            name,
            "{} to be a list of integers >= 1",
            lambda value: _is_list(value, lambda x: _is_integer(x, 1)),
        )
    expect("mean", "{} to be a list of numbers", lambda x: _is_list(x, _is_number))
    expect(
        "std",
        "{} to be a list of numbers > 0",
        lambda value: _is_list(value, lambda x: _is_number(x, positive=True)),
    )


def _check_combinations(spec: Spec) -> None:
    """Fields that have to agree with each other."""
    check(len(spec.image_shape) == 3, "[H, W, C]", image_shape=spec.image_shape)
    channels = spec.image_shape[-1]
    for name in ("mean", "std"):
        value = getattr(spec, name)
        check(len(value) == channels, f"one {name} a channel", **{name: value})
    check(
        spec.is_tuned or spec.precision == "float32",
        "precision='float32' of a variant that is not tuned",
        "The reference code knows no other; take variant=tuned.",
        precision=spec.precision,
        variant=spec.variant,
    )
