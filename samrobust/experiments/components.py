"""Networks, optimizers and augmentations by their names in configs.

A name is one of the registries', or `package.module:name`, somebody's own, as every
augmentation is. A network's constructor gets what the data set and the config's common
fields say, as far as it has parameters of these names; its other parameters are fields
of `config.model`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn

from samrobust.checks import check
from samrobust.data import Dataset, DatasetFacts
from samrobust.experiments.entries import fields_of_parameters, look_up, renamed
from samrobust.models import MODELS
from samrobust.system.resolve import is_reference, resolve
from samrobust.types import Augmentation, Config, Field

__all__ = [
    "augmentation",
    "check_model",
    "decay_of_gradient",
    "find_model",
    "make_model",
    "make_optimizer",
    "model_fields",
    "optimizer_takes",
    "takes",
]

# Given to a network's constructor where it has such a parameter.
_OF_THE_DATA = ("num_classes", "mean", "std")
_COMMON = ("dtype", "batch_norm_group")
_NO_FIELDS = (*_OF_THE_DATA, *_COMMON, "parent", "name")  # the last two are Flax's


@functools.cache
def find_model(name: str) -> Callable[..., Any]:
    """Returns the constructor of a network.

    Raises:
      ValueError: if there is none of this name.
    """
    return look_up(name, MODELS, "the model", "model.name")


@functools.cache
def _find_optimizer(name: str) -> Callable[..., Any]:
    return look_up(name, OPTIMIZERS, "the optimizer", "training.optimizer")


@functools.cache
def model_fields(name: str) -> Mapping[str, Field]:
    """Returns the fields of `config.model` that a network of this name has.

    Raises:
      ValueError: if there is no such network.
    """
    return fields_of_parameters(find_model(name), _NO_FIELDS)


def takes(name: str, parameter: str) -> bool:
    """Returns whether a network's constructor has a parameter, such as `mean`."""
    return parameter in inspect.signature(find_model(name)).parameters


def optimizer_takes(name: str, parameter: str) -> bool:
    """Returns whether an optimizer's constructor has a parameter, as `momentum`."""
    return parameter in inspect.signature(_find_optimizer(name)).parameters


def make_model(config: Config, dataset: Dataset | DatasetFacts) -> nn.Module:
    """Builds the network of `config.model`.

    It normalizes pixels by the config's mean and std, or by the data's.

    Raises:
      ValueError: for a value that the constructor refuses, with the field's name, or a
        field that the network has no parameter for.
    """
    _check_taken(config)
    section, name = config.model, config.model.name
    group = section.batch_norm_group
    given = {
        "num_classes": dataset.num_classes,
        "mean": tuple(section.mean or dataset.mean),
        "std": tuple(section.std or dataset.std),
        "dtype": jnp.dtype(section.dtype),
        # A group that is the batch: 0, for an incomplete last one too.
        "batch_norm_group": 0 if group == config.training.batch_size else group,
    }
    channels = dataset.image_shape[-1]
    for field in ("mean", "std"):
        count = len(section[field] or ())
        wanted = f"one model.{field} or one a channel ({channels})"
        check(count in (0, 1, channels), wanted, **{f"model.{field}": section[field]})
    fields = {key: section[key] for key in model_fields(name)}
    fields |= {key: tuple(x) for key, x in fields.items() if isinstance(x, list)}
    names = {key: f"model.{key}" for key in (*fields, *_OF_THE_DATA, *_COMMON)}
    taken = {key: given[key] for key in given if takes(name, key)}
    with renamed(names, name):
        made = find_model(name)(**fields, **taken)
    shown = type(made).__name__
    check(isinstance(made, nn.Module), f"{name} to build a Linen module", built=shown)
    return made


def _check_taken(config: Config) -> None:
    """Refuses a common field that the network has no parameter for."""
    section, name = config.model, config.model.name
    offs = {"mean": None, "std": None, "dtype": "float32", "batch_norm_group": 0}
    for field, off in offs.items():
        holds = takes(name, field) or section[field] == off
        wanted = f"no model.{field} with the network {name}"
        check(holds, wanted, **{f"model.{field}": section[field]})


def check_model(config: Config) -> None:
    """Builds a config's network, optimizer and augmentation, for whatever data.

    A network of the user's may be made for some data alone, and is only looked up.

    Raises:
      ValueError: as `make_model`, `make_optimizer` and `augmentation`.
    """
    channels = max(len(config.model.mean or ()), len(config.model.std or ()), 1)
    facts = DatasetFacts(10, (32, 32, channels), (0.0,), (1.0,), 1, 1)
    _check_taken(config)
    if not is_reference(config.model.name):
        make_model(config, facts)
    make_optimizer(config, optax.constant_schedule(0.1))
    augmentation(config)


OPTIMIZERS: dict[str, Callable[..., Sequence[optax.GradientTransformation]]] = {
    # SGD with momentum after coupled weight decay.
    "sgd": lambda learning_rate, momentum, weight_decay: (
        optax.add_decayed_weights(weight_decay),
        optax.sgd(learning_rate, momentum=momentum or None),
    ),
    # Adam after coupled weight decay, as PyTorch's; `momentum` is b1.
    "adam": lambda learning_rate, momentum, weight_decay: (
        optax.add_decayed_weights(weight_decay),
        optax.adam(learning_rate, b1=momentum),
    ),
    # AdamW, of which `momentum` is b1 and weight decay is decoupled.
    "adamw": lambda learning_rate, momentum, weight_decay: (
        optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay),
    ),
}


def augmentation(config: Config) -> dict[str, Any]:
    """Returns how `config.data` augments, as `samrobust.data.augmented` takes it.

    Raises:
      ValueError: if there is no such function.
    """
    data, augment = config.data, None
    if data.augmentation:
        named = {"data.augmentation": data.augmentation}
        wanted = "data.augmentation as package.module:name"
        check(is_reference(data.augmentation), wanted, **named)
        augment: Augmentation | None = resolve(data.augmentation, "an augmentation")
        check(callable(augment), "a function of images and a key", **named)
    return {"padding": data.padding, "flip": data.flip, "augment": augment}


# Whose weight decay is a part of the gradient: AdamW's is none of it.
_COUPLED = ("sgd", "adam")


def decay_of_gradient(config: Config) -> float:
    """Returns the weight decay that is a part of the gradient; 0 where none is."""
    training = config.training
    return training.weight_decay if training.optimizer in _COUPLED else 0.0


def make_optimizer(
    config: Config, learning_rate: optax.Schedule
) -> Sequence[optax.GradientTransformation]:
    """Builds the optimizer of `config.training`, without sharpness: a chain's links.

    Somebody's own is called with `learning_rate`, a schedule, and with `momentum` and
    `weight_decay` where it has such parameters; it returns an optax transformation.

    Raises:
      ValueError: if there is none of the name, or it builds something else.
    """
    training = config.training
    name = training.optimizer
    given = {"momentum": training.momentum, "weight_decay": training.weight_decay}
    names = {key: f"training.{key}" for key in given}
    taken = {key: given[key] for key in given if optimizer_takes(name, key)}
    with renamed(names, name):
        made = _find_optimizer(name)(learning_rate, **taken)
    links = tuple(made) if type(made) in (tuple, list) else (made,)
    for link in links:
        holds = isinstance(link, optax.GradientTransformation)
        wanted = f"training.optimizer={name} to build an optax transformation"
        check(holds, wanted, built=type(link).__name__)
    return links
