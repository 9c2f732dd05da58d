"""Training methods of configs: their sections, and the parts that they build.

What a constructor returns tells which part it is.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import optax

from samrobust.checks import LARGEST_COUNT, check
from samrobust.experiments import entries
from samrobust.experiments.components import decay_of_gradient
from samrobust.experiments.rows import STANDARD, Part, parse_row
from samrobust.sharpness.two_pass import TwoPass
from samrobust.system.resolve import is_reference
from samrobust.training.parts import Adversary, Averaging, Objective
from samrobust.training.phases import first_epoch
from samrobust.types import Config

__all__ = [
    "StepPasses",
    "build",
    "chosen",
    "cost",
    "group_field",
    "group_size",
    "own_code",
    "parts_of",
    "passes_at",
    "phases_of",
    "replays",
    "sections",
    "start_epoch",
    "supposed",
    "training_cost",
    "training_passes",
    "values_of",
]


_SLOTS: Mapping[str, type] = {
    "adversary": Adversary,
    "objective": Objective,
    "sharpness": optax.GradientTransformation,
    "averaging": Averaging,
}


def parts_of(config: Config) -> tuple[Part, ...]:
    """Returns the parts of a config's row; none where it is of no row yet."""
    return parse_row(config.row or STANDARD).parts


def own_code(config: Config) -> list[str]:
    """Returns the references to the user's own code in a config, but to its data's."""
    names = [part.name for part in parts_of(config)]
    names += [config.model.name, config.training.optimizer, config.data.augmentation]
    return list(filter(is_reference, names))


def sections(row: str = "") -> dict[str, str]:
    """Returns the config sections there are, and the parts that they belong to.

    Args:
      row: whose own parts have sections too.
    """
    own = (part.name for part in parse_row(row or STANDARD).parts)
    return {entries.section_of(name): name for name in (*entries.REGISTRY, *own)}


def values_of(config: Config, name: str) -> dict[str, Any]:
    """Returns what a config says of a part, by the fields of its section."""
    section = config[entries.section_of(name)]
    return {n: section[n] for n in entries.section_fields(name) if "." not in n}


def group_field(config: Config) -> tuple[str, int]:
    """Returns the name and the value of the field with the row's m of m-sharpness."""
    for part in parts_of(config):
        m = entries.of_training(part.name, "m", values_of(config, part.name), None)
        if m is not None:
            return f"{entries.section_of(part.name)}.m", m
    return "sam.m", 0


def group_size(config: Config) -> int:
    """Returns m; 0 where it is the batch, an incomplete last one too."""
    _, size = group_field(config)
    return 0 if size == config.training.batch_size else size


def chosen(config: Config, batch_size: int) -> int:
    """Returns how many examples of a batch have passes of their own; 0: none."""
    counts = [
        entries.find(part.name).chosen(values_of(config, part.name), batch_size)
        for part in parts_of(config)
    ]
    return min(batch_size, max(counts, default=0))


def replays(config: Config) -> int:
    """Returns the number of steps in a row that the row takes on each batch."""
    counts = (
        entries.of_training(part.name, "replays", values_of(config, part.name), 1)
        for part in parts_of(config)
    )
    return max(counts, default=1)


def build(
    config: Config, given: entries.Given, *, only: Collection[str] | None = None
) -> dict[str, Any]:
    """Builds the parts of a config's row.

    Args:
      config: its fields hold what they may.
      given: from the training.
      only: names of the parts to build; None: all.

    Returns:
      Those that the row has, by their kinds: `adversary`, `objective`, `sharpness` and
      `averaging`; of the second pass of `sharpness` also `batch_stats`. All but
      `sharpness` are arguments of `samrobust.training.make_train_step`. Beside them
      `starts`: the first steps of kinds that begin late.

    Raises:
      ValueError: for a value that a constructor refuses, with the field's name; for two
        parts of one kind, something else than a part, or no held-out images for an
        average that asks for them.
    """
    parts: dict[str, Any] = {"starts": {}}
    for part in parts_of(config):
        if only is not None and part.name not in only:
            continue
        for slot, built in _construct(config, part.name, given):
            check(slot not in parts, f"one {slot}", row=config.row)
            parts[slot] = built
            if start := start_epoch(config, part.name):
                parts["starts"][slot] = start * given.steps_per_epoch
            if slot == "sharpness":
                parts["batch_stats"] = entries.of_training(
                    part.name, "batch_stats", values_of(config, part.name), "both"
                )
    averaging, field = parts.get("averaging"), "data.validation_size"
    held_out = config.data.validation_size
    asks = averaging is not None and averaging.admit is not None
    wanted = f"{field} > 0 with an average that epochs are admitted to"
    check(held_out > 0 or not asks, wanted, **{field: held_out, "row": config.row})
    return parts


def start_epoch(config: Config, name: str) -> int:
    """Returns the epoch that a part begins with.

    Raises:
      ValueError: if there is none.
    """
    start = entries.of_training(name, "start", values_of(config, name), 0.0)
    epochs = config.training.epochs
    first = first_epoch(start, epochs)
    field = f"{entries.section_of(name)}.start"
    wanted = f"{field} that leaves one of {epochs} epochs"
    check(first < epochs, wanted, "Parts begin with whole epochs.", **{field: start})
    return first


def _construct(
    config: Config, name: str, given: entries.Given
) -> list[tuple[str, Any]]:
    """Returns what a constructor built, with the kind of part that each is."""
    entry, values = entries.find(name), values_of(config, name)
    late = start_epoch(config, name) * given.steps_per_epoch
    given = given._replace(total_steps=max(1, given.total_steps - late))  # of the part
    section, strength = entries.section_of(name), entries.strength_of(name)
    end = entries.of_training(name, f"{strength}_end", values, None)
    if strength is not None and end is not None:
        steps = given.total_steps
        values[strength] = optax.linear_schedule(values[strength], end, steps)
    parameters = inspect.signature(entry.make).parameters
    arguments = {k: v for k, v in (given._asdict() | values).items() if k in parameters}
    field, m = group_field(config)
    fields = {f"grouped={given.grouped}": f"{field}={m}", "grouped": field}
    fields |= {key: f"{section}.{key}" for key in entries.section_fields(name)}
    with entries.renamed(fields, name):
        made = entry.make(**arguments)
    is_part = isinstance(made, tuple(_SLOTS.values()))
    several = isinstance(made, tuple | list) and not is_part
    found = []
    for one in made if several else (made,):
        slots = [slot for slot, kind in _SLOTS.items() if isinstance(one, kind)]
        wanted = f"{name} to build one of {', '.join(_SLOTS)}"
        fix = "samrobust.training.as_adversary makes one of an attack."
        fix = fix if callable(one) else ""
        check(len(slots) == 1, wanted, fix, built=type(one).__name__)
        if isinstance(one, TwoPass):
            _check_second_pass(name, entry.make, given)
        found.append((slots[0], one))
    check(bool(found), f"{name} to build one of {', '.join(_SLOTS)}", built=made)
    return found


def _check_second_pass(
    name: str, make: Callable[..., Any], given: entries.Given
) -> None:
    """Refuses a second pass that would lose the statistics or the groups of its own."""
    parameters = inspect.signature(make).parameters
    made_by = getattr(make, "__name__", type(make).__name__)
    for field, what, is_there in (
        ("aux", "the network's running statistics leave the second pass", given.aux),
        ("grouped", "groups have perturbations of their own", given.grouped),
    ):
        wanted = f"{name} with a parameter {field} that it hands to two_pass: {what}"
        fix = f"Write def {made_by}(..., *, aux=None, grouped=False)."
        got = ", ".join(parameters)
        check(field in parameters or not is_there, wanted, fix, parameters=got)


class StepPasses(NamedTuple):
    """A step, counted in forward and backward passes with weight gradients.

    A forward pass is 1/3, an attack step 2/3.

    Attributes:
      attack: of making the images.
      ascents: that sharpness adds to each pass over the images.
      views: of the images, which the objective sees.
      is_known: whether that is all, or a part of the user's does not say what it takes.
    """

    attack: float
    ascents: float
    views: int
    is_known: bool = True

    @property
    def total(self) -> float:
        """The passes of a step; 1 of standard training."""
        return self.attack + self.views * (1 + self.ascents)


def phases_of(config: Config) -> list[range]:
    """Returns the epochs before the first late part begins, until the next, and so on.

    All epochs, in one range where no part begins late.
    """
    late = (start_epoch(config, part.name) for part in parts_of(config))
    bounds = sorted({0, *late, config.training.epochs})
    return [range(*ends) for ends in pairwise(bounds)]


def passes_at(config: Config, epoch: int) -> StepPasses:
    """Counts a step of an epoch: parts that begin later cost nothing yet."""
    attack, ascents, views, unknown = 0.0, 0.0, 1, False
    for part in parts_of(config):
        entry, values = entries.find(part.name), values_of(config, part.name)
        is_own = is_reference(part.name)
        try:
            built = dict(_construct(config, part.name, supposed(config, own=is_own)))
        except ValueError:  # it wants the numbers of the data: what its entry says
            if not is_own:
                raise
            built = {}
            unknown |= entry.attack_passes is None and entry.passes is None
        if objective := built.get("objective"):
            views = len(set(objective.views))
        if start_epoch(config, part.name) > epoch:
            continue
        for_images: Any = entry.attack_passes
        added: Any = entry.passes
        if for_images is None and "adversary" not in built:
            for_images = 0.0
        if added is None:
            none = 0.0 if "sharpness" not in built else None
            added = getattr(built.get("sharpness"), "passes", none)
        unknown |= for_images is None or added is None
        attack += _counted(for_images, values)
        ascents += _counted(added, values)
    return StepPasses(attack, ascents, views, not unknown)


def _counted(passes: Any, values: Mapping[str, Any]) -> float:
    """Returns what an entry says of its cost; 0 where it says nothing."""
    counted: Any = passes(values) if callable(passes) else passes
    return counted or 0.0


def supposed(config: Config, *, own: bool = False) -> entries.Given:
    """Returns stand-ins for what a training gives, where the data are not known yet.

    Args:
      config: of the training.
      own: as many steps as are likely; else as many as there can be.
    """
    training = config.training
    steps = max(1, LARGEST_COUNT // training.epochs)
    steps = min(steps, 1000) if own else steps
    return entries.Given(
        grouped=group_size(config) > 0,
        momentum=training.momentum,
        weight_decay=decay_of_gradient(config),
        total_steps=steps * training.epochs,
        steps_per_epoch=steps,
    )


def cost(config: Config) -> float:
    """Returns the predicted cost of a step, the mean over all epochs; 1 is ST's."""
    return training_cost(config) / config.training.epochs


def training_cost(config: Config) -> float:
    """Returns the predicted cost of a training, in epochs of standard training."""
    phases = phases_of(config)
    return sum(len(epochs) * passes_at(config, epochs[0]).total for epochs in phases)


def training_passes(config: Config, num_steps: int) -> float | None:
    """Returns the passes of a training over single images; None where unknown.

    Args:
      config: of the training.
      num_steps: that it took. An incomplete batch counts as a whole one.
    """
    if not all(passes_at(config, e.start).is_known for e in phases_of(config)):
        return None
    return num_steps * config.training.batch_size * cost(config)
