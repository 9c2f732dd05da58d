"""What PyTorch's side of a comparison computes, and which configs it cannot follow.

`CARRIED` says which fields of a config its step is told of, and `spec_fields` tells
them from there. Of all others that a step depends on, the paper's value is written into
`twin/steps.py`: a config with another one is refused, also in a field that is newer
than this module.
"""

from collections.abc import Sequence
from typing import Any

from samrobust.checks import check
from samrobust.experiments import configuration, methods
from samrobust.experiments.rows import Row, parse_row
from samrobust.studies.bench.twin.variants import VARIANTS
from samrobust.system.fields import differences, is_among
from samrobust.types import Config

__all__ = ["CARRIED", "check_config", "fitting", "parity_row", "spec_fields"]

# By their names in the spec; radii and steps there are in pixel units.
CARRIED = {
    "network": {"width": "model.width", "blocks": "model.blocks"},
    "sgd": {
        "lr": "training.learning_rate",
        "momentum": "training.momentum",
        "weight_decay": "training.weight_decay",
    },
    "step": {
        "norm": "attack.norm",
        "epsilon": "attack.epsilon",
        "step_size": "attack.step_size",
        "num_steps": "attack.num_steps",
        "rho": "sam.rho",
    },
}
_PIXELS = ("attack.epsilon", "attack.step_size")  # in 1/255 units in a config
# Fields that PyTorch's side has by other ways: of the task; with the network's weights;
# within the length of a step.
_TOLD_OTHERWISE = (
    *("model.dtype", "training.batch_size"),
    *("model.mean", "model.std"),
    "attack.relative_step_size.",
)
# Of no step by itself: which images there are, how they are drawn, when the training
# ends, what it is called and how it is judged.
_OF_NO_STEP = (
    *configuration.CHANGES_NO_RESULT,
    *("row", "label", "seed", "evaluation.", "data.name", "data.padding", "data.flip"),
    *(f"data.{size}" for size in ("train_size", "test_size", "validation_size")),
    "data.split_seed",
    *("training.epochs", "training.drop_remainder"),
)


def fitting(precision: str, variants: Sequence[str]) -> list[str]:
    """Returns those of some variants that there are in a precision.

    Raises:
      ValueError: if there is none.
    """
    there = [name for name, one in VARIANTS.items() if precision in one.precisions]
    found = [variant for variant in variants if variant in there]
    given = {"--variants": tuple(variants), "--precisions": precision}
    wanted = f"one of {', '.join(there)} among the variants in {precision}"
    check(bool(found), wanted, "PyTorch would have no row.", **given)
    return found


def check_config(config: Config) -> None:
    """Refuses a config with a step that PyTorch's side does not take.

    Raises:
      ValueError: names the field, and the value that is written there.
    """
    carried = {field for fields in CARRIED.values() for field in fields.values()}
    base = configuration.as_dict(configuration.base_config())
    found = differences(base, configuration.as_dict(config))
    # Those last that the base lacks, which another network brings.
    for field in sorted(found, key=lambda field: found[field][0] is None):
        usual, value = found[field]
        check(
            is_among(field, (*carried, *_TOLD_OTHERWISE, *_idle(config))),
            f"{field}={usual!r}",
            "PyTorch's side knows no other.",
            **{"--compare": "pytorch", field: value, "row": config.row},
        )


def spec_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of a `TwinSpec` that come from a row's config."""

    def value(field: str) -> Any:
        section, name = field.split(".")
        found = config[section][name]
        return found / 255 if field in _PIXELS else found

    def values(group: str) -> dict[str, Any]:
        return {name: value(field) for name, field in CARRIED[group].items()}

    return {
        "method": parse_row(config.row).method,
        "network": values("network"),
        "sgd": values("sgd"),
        **values("step"),
    }


def parity_row(row: str) -> str:
    """Returns the row of standard training with a row's network and optimizer.

    >>> parity_row("sam,rho=0.2,model.width=8,sam.start=0.5")
    'st,model.width=8'
    """
    others, sections = parse_row(row).others, methods.sections(row)
    kept = {n: x for n, x in others.items() if n.partition(".")[0] not in sections}
    return Row(others=kept).name


def _idle(config: Config) -> list[str]:
    """Returns what no step of a config's row depends on."""
    own = {part.name for part in methods.parts_of(config)}
    others = methods.sections(config.row).items()
    return [*_OF_NO_STEP, *(f"{name}." for name, part in others if part not in own)]
