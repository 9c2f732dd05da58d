"""Training methods of configs: their sections, and the parts that they build.

What a constructor returns tells which part it is.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import optax

from samrobust.checks import check
from samrobust.experiments.entries import (
    REGISTRY,
    Given,
    added_passes,
    find,
    renamed,
    section_fields,
    section_of,
    strength_of,
)
from samrobust.experiments.rows import STANDARD, parse_row
from samrobust.training.parts import Adversary, Averaging, Objective
from samrobust.types import Config

__all__ = [
    "Composition",
    "build",
    "cost",
    "group_field",
    "group_size",
    "sections",
    "values_of",
]


class Composition(NamedTuple):
    """A training method, built.

    Attributes:
      adversary: None for none.
      objective: None for the cross entropy.
      sharpness: None for none.
      averaging: None for none.
      batch_stats: which pass of `sharpness` updates BatchNorm's running statistics.
      group_size: examples with an ascent direction of their own; 0: the whole batch.
    """

    adversary: Adversary | None = None
    objective: Objective | None = None
    sharpness: optax.GradientTransformationExtraArgs | None = None
    averaging: Averaging | None = None
    batch_stats: str = "both"
    group_size: int = 0


_SLOTS: Mapping[str, type] = {
    "adversary": Adversary,
    "objective": Objective,
    "sharpness": optax.GradientTransformation,
    "averaging": Averaging,
}


def sections(row: str = STANDARD) -> dict[str, str]:
    """Returns the config sections there are, and the parts that they belong to.

    Args:
      row: whose own parts have sections too.
    """
    names = [*REGISTRY, *(part.name for part in parse_row(row).parts)]
    return {section_of(name): name for name in names}


def values_of(config: Config, name: str) -> dict[str, Any]:
    """Returns what a config says of a part, by the fields of its section."""
    section = config[section_of(name)]
    return {n: section[n] for n in section_fields(name) if "." not in n}


def group_field(config: Config) -> tuple[str, int]:
    """Returns the name and the value of the field with the row's m of m-sharpness."""
    for part in parse_row(config.row or STANDARD).parts:
        if "m" in section_fields(part.name):
            section = section_of(part.name)
            return f"{section}.m", config[section].m
    return "sam.m", 0


def group_size(config: Config) -> int:
    """Returns m; 0 where it is the batch, an incomplete last one too."""
    _, size = group_field(config)
    return 0 if size == config.training.batch_size else size


def build(config: Config, given: Given) -> Composition:
    """Builds the method of a config's row.

    Raises:
      ValueError: for a value that a constructor refuses, with the field's name; for two
        parts of one kind, or something else than a part.
    """
    parts: dict[str, Any] = {}
    for part in parse_row(config.row).parts:
        for slot, built in _construct(config, part.name, given):
            check(slot not in parts, f"one {slot}", row=config.row)
            parts[slot] = built
            if slot == "sharpness":
                values = values_of(config, part.name)
                parts["batch_stats"] = values.get("batch_stats", "both")
    return Composition(**parts, group_size=group_size(config))


def _construct(config: Config, name: str, given: Given) -> list[tuple[str, Any]]:
    """Returns what a constructor built, with the kind of part that each is."""
    entry, values = find(name), values_of(config, name)
    section, strength = section_of(name), strength_of(name)
    end = values.get(f"{strength}_end")
    if strength is not None and end is not None:
        values[strength] = optax.linear_schedule(
            values[strength], end, given.total_steps
        )
    parameters = inspect.signature(entry.make).parameters
    arguments = {k: v for k, v in (given._asdict() | values).items() if k in parameters}
    with renamed({key: f"{section}.{key}" for key in section_fields(name)}, name):
        made = entry.make(**arguments)
    is_part = isinstance(made, tuple(_SLOTS.values()))
    several = isinstance(made, tuple) and not is_part
    found = []
    for one in made if several else (made,):
        slots = [slot for slot, kind in _SLOTS.items() if isinstance(one, kind)]
        kinds = ", ".join(_SLOTS)
        shown = type(one).__name__
        check(len(slots) == 1, f"{name} to build one of {kinds}", built=shown)
        found.append((slots[0], one))
    return found


def cost(config: Config) -> float:
    """Returns the predicted cost of a step; that of standard training is 1.

    In forward and backward passes with weight gradients: a forward pass is 1/3, an
    attack step 2/3.
    """
    attack, ascents = 0.0, 0.0
    for part in parse_row(config.row).parts:
        attack += find(part.name).attack_passes(values_of(config, part.name))
        ascents += added_passes(part.name)
    objective = build(config, Given()).objective
    views = len(set(objective.views)) if objective else 1
    return attack + views * (1 + ascents)
