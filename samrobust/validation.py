"""Checks of a config's values and combinations, by the fields' full names.

Types and unknown fields are refused by `ml_collections`; here are the ranges. One
function a section of `configs/base.py`, one check a rule.
"""

from samrobust.checks import check, check_choice
from samrobust.types import Config

__all__ = ["validate"]

# Of AutoAttack, as `samrobust.attacks` has them.
_VERSIONS = ("standard", "rand", "custom")
_MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square", "apgd-dlr")


def validate(config: Config) -> None:
    """Refuses values out of range and impossible combinations.

    Raises:
      ValueError: `Expected <condition>, got <field>=<value>.`
    """
    check(config.seed >= 0, "0 <= seed", seed=config.seed)
    _validate_data(config.data)
    _validate_model(config.model)
    _validate_training(config.training)
    _validate_attack(config.attack)
    _validate_sam(config.sam)
    _validate_groups(config)
    _validate_evaluation(config)
    _validate_checkpoint(config.checkpoint)


def _within(section: str, fields: Config, low: float, *names: str) -> None:
    for name in names:
        field = f"{section}.{name}"
        holds = low <= fields[name] < float("inf")
        check(holds, f"{low:g} <= {field}", **{field: fields[name]})


def _positive(section: str, fields: Config, *names: str) -> None:
    for name in names:
        field = f"{section}.{name}"
        holds = 0 < fields[name] < float("inf")
        check(holds, f"0 < {field}", **{field: fields[name]})


def _choice(section: str, fields: Config, **choices: tuple[str, ...]) -> None:
    for name, options in choices.items():
        check_choice(options, **{f"{section}.{name}": fields[name]})


def _validate_data(data: Config) -> None:
    _choice("data", data, name=("cifar10", "cifar100", "digits"))
    _within("data", data, 0, "validation_size", "padding", "split_seed")
    for name in ("train_size", "test_size"):
        if data[name] is not None:
            _within("data", data, 1, name)


def _validate_model(model: Config) -> None:
    _within("model", model, 1, "width")
    check(
        len(model.blocks) >= 1 and all(count >= 1 for count in model.blocks),
        "at least one block in each stage",
        **{"model.blocks": tuple(model.blocks)},
    )
    _choice("model", model, dtype=("float32", "bfloat16"))
    if model.mean is not None:
        _each_within("model.mean", model.mean, float("-inf"))
    if model.std is not None:
        _each_within("model.std", model.std, 0)


def _each_within(field: str, values: Config, above: float) -> None:
    check(
        len(values) > 0 and all(above < value < float("inf") for value in values),
        f"{above:g} < each value of {field} < inf, one a channel",
        **{field: tuple(values)},
    )


def _validate_training(training: Config) -> None:
    _within("training", training, 1, "epochs", "batch_size")
    _within("training", training, 0, "weight_decay", "steps_per_call")
    _positive("training", training, "learning_rate")
    _choice("training", training, schedule=("step", "cosine"))
    momentum = training.momentum
    check(0 <= momentum < 1, "0 <= momentum < 1", **{"training.momentum": momentum})
    milestones = tuple(training.milestones)
    check(
        all(0 < m < 1 for m in milestones) and list(milestones) == sorted(milestones),
        "increasing fractions of the training between 0 and 1",
        "The paper's are (0.75, 0.9).",
        **{"training.milestones": milestones},
    )
    _positive("training", training, "decay_factor")


def _validate_attack(attack: Config) -> None:
    _choice(
        "attack",
        attack,
        norm=("linf", "l2"),
        loss=("cross_entropy", "margin"),
        judge=("final", "any"),
        batch_norm=("train", "eval"),
    )
    _within("attack", attack, 0, "epsilon", "gradient_floor")
    _within("attack", attack, 1, "num_steps", "restarts")
    if attack.epsilon > 0:
        _positive("attack", attack, "step_size")
    _check_restarts("attack", attack)
    if attack.norm == "linf":
        _check_unit("attack.epsilon", attack.epsilon)


def _check_unit(field: str, radius: float) -> None:
    check(
        radius <= 255,
        f"{field} <= 255",
        "Radii in configs are in 1/255 units: 8 means 8/255.",
        **{field: radius},
    )


def _check_restarts(section: str, attack: Config) -> None:
    check(
        attack.restarts == 1 or attack.random_start,
        f"{section}.random_start when {section}.restarts > 1",
        **{f"{section}.restarts": attack.restarts},
    )


def _validate_sam(sam: Config) -> None:
    _within("sam", sam, 0, "rho")
    if sam.rho_end is not None:
        _within("sam", sam, 0, "rho_end")
        check(
            sam.rho > 0 or sam.rho_end == 0,
            "sam.rho > 0 when sam.rho_end is set",
            "Use a SAM row: a schedule needs a start above 0.",
            **{"sam.rho": sam.rho, "sam.rho_end": sam.rho_end},
        )
    _choice("sam", sam, batch_stats=("first", "second", "both"))


def _validate_groups(config: Config) -> None:
    """m-sharpness and BatchNorm's groups; the last batch is checked with the data."""
    _within("sam", config.sam, 0, "m")
    _within("model", config.model, 0, "batch_norm_group")
    batch_size, m = config.training.batch_size, config.sam.m
    group = config.model.batch_norm_group
    for field, size in (("sam.m", m), ("model.batch_norm_group", group)):
        check(
            size == 0 or batch_size % size == 0,
            f"{field} to divide training.batch_size",
            "0 means the global batch.",
            **{field: size, "training.batch_size": batch_size},
        )
    if m == 0:
        return
    check(
        config.sam.rho > 0,
        "sam.rho > 0 when sam.m is set",
        "Use a SAM row, as in --config=FILE.py:sam,rho=0.2; without SAM there is no "
        "ascent direction.",
        **{"sam.rho": config.sam.rho, "sam.m": m},
    )
    check(
        m == batch_size or (group > 0 and m % group == 0),
        "model.batch_norm_group > 0 that divides sam.m",
        f"BatchNorm cannot reach across groups of {m} that have parameters of their "
        f"own: set --config.model.batch_norm_group={m}, or a divisor of it.",
        **{"model.batch_norm_group": group, "sam.m": m},
    )


def _validate_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    _within("evaluation", evaluation, 1, "batch_size", "num_steps", "restarts")
    _within("evaluation", evaluation, 0, "gradient_floor")
    _positive("evaluation", evaluation, "linf_step", "l2_step")
    _choice(
        "evaluation",
        evaluation,
        attack=("pgd", "autoattack"),
        loss=("cross_entropy", "margin"),
        judge=("final", "any"),
        split=("test", "validation"),
        checkpoint=("last", "best"),
    )
    _check_restarts("evaluation", evaluation)
    _validate_autoattack(evaluation)
    check(
        evaluation.judge == "any" or not evaluation.early_stop,
        "evaluation.judge=any with evaluation.early_stop",
        "A final iterate can be right again after a broken one.",
        **{"evaluation.judge": evaluation.judge},
    )
    for name in ("linf", "l2"):
        radii, field = tuple(evaluation[name]), f"evaluation.{name}"
        holds = all(0 < r < float("inf") for r in radii) and len(set(radii)) == len(
            radii
        )
        check(holds, f"different radii > 0 in {field}", **{field: radii})
    for radius in evaluation.linf:
        _check_unit("evaluation.linf", radius)
    needs_validation = {
        "evaluation.split": evaluation.split == "validation",
        "evaluation.checkpoint": evaluation.checkpoint == "best",
    }
    for field, needs in needs_validation.items():
        check(
            not needs or config.data.validation_size > 0,
            f"data.validation_size > 0 for {field}",
            "Set --config.data.validation_size, the number of training examples to "
            "hold out; the test set is never used to choose.",
            **{"data.validation_size": config.data.validation_size},
        )


def _validate_autoattack(evaluation: Config) -> None:
    _choice("evaluation", evaluation, version=_VERSIONS)
    members = tuple(evaluation.members)
    uses = evaluation.attack == "autoattack" and evaluation.version == "custom"
    check(
        bool(members) == uses,
        "evaluation.members with evaluation.attack=autoattack and "
        "evaluation.version=custom, and only there",
        **{"evaluation.members": members, "evaluation.version": evaluation.version},
    )
    known = all(name in _MEMBERS for name in members)
    check(
        known and len(set(members)) == len(members),
        f"different evaluation.members out of {', '.join(_MEMBERS)}",
        **{"evaluation.members": members},
    )


def _validate_checkpoint(checkpoint: Config) -> None:
    _within("checkpoint", checkpoint, 0, "minutes")
    _within("checkpoint", checkpoint, 1, "keep")
