"""Rehearsal: what cannot be trained is refused before any work.

Every row is built on its data. Where code of the user's takes part, the step is traced
too, so that an error in it costs seconds, and not the rows before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.checks import check
from samrobust.data import Dataset, augmented
from samrobust.experiments import building, methods
from samrobust.system.jaxprs import abstract_key
from samrobust.system.resolve import running
from samrobust.training.manifest import named_leaves
from samrobust.types import Augmentation, Config

__all__ = ["rehearse"]

_NUM_TRIED = 64  # images


def rehearse(config: Config, dataset: Dataset) -> None:
    """Builds a row on its data; traces its step if any of it is the user's own.

    Args:
      config: validated.
      dataset: that of `config.data`.

    Raises:
      ValueError: as `building.check_images`, `building.make_plan` and
        `building.make_training`; for an error in the user's own code, one line that
        says where; for an augmentation that is not as `samrobust.types` says.
    """
    building.check_images(config, dataset)
    plan = building.make_plan(config, len(dataset.train))
    built = building.make_training(config, dataset, plan.num_steps)
    method = built.method
    own = methods.own_code(config)
    if not own:
        return
    augment = partial(augmented, **building.augmentation(config))
    if config.data.augmentation:
        _check_augmentation(config.data.augmentation, augment, dataset)
    key = abstract_key()

    def images_of(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *dataset.image_shape), jnp.float32)

    full = config.training.batch_size
    with running(" with ".join(own)):
        state = jax.eval_shape(method.init, key, images_of(full))
        named_leaves(state)  # that a checkpoint can keep
        for size in {full, plan.remainder} - {0}:
            labels = jax.ShapeDtypeStruct((size,), jnp.int32)
            jax.eval_shape(lambda x, k: augment(x, key=k), images_of(size), key)
            jax.eval_shape(method.train_step, state, images_of(size), labels, key)
        jax.eval_shape(method.logits, state, images_of(full))
        if built.admit is not None:
            worst = jax.ShapeDtypeStruct((), jnp.float32)
            jax.eval_shape(built.admit, state.average, state.variables, worst)


def _check_augmentation(name: str, augment: Augmentation, dataset: Dataset) -> None:
    """Augments some images, and refuses what is no `samrobust.types.Augmentation`."""
    images = jnp.asarray(dataset.train.images[:_NUM_TRIED], jnp.float32) / 255
    half = len(images) // 2
    others = images.at[half:].set(1 - images[half:])
    with running(name):
        key = jax.random.key(0)
        found, again, beside = (augment(x, key=key) for x in (images, images, others))
    alike = np.array_equal(found, again, equal_nan=True)
    named = {"data.augmentation": name}
    wanted = "an augmentation that is a function of images and key"
    check(alike, wanted, "Draw random numbers from the key.", **named)
    apart = np.array_equal(found[:half], beside[:half], equal_nan=True)
    wanted = "an augmentation of each image by itself"
    check(apart, wanted, "Labels stay, so images must not be mixed.", **named)
    least, largest = float(found.min()), float(found.max())
    wanted = f"{name} to return pixels in [0, 1]"
    check(least >= 0 and largest <= 1, wanted, "Clip them.", least=least, most=largest)
