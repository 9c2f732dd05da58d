"""Rehearsal: what cannot be trained is refused before any work.

Every row is built on its data. Where code of the user's takes part, the step is traced
too, so that an error in it costs seconds, and not the rows before it.
"""

import jax
import jax.numpy as jnp

from samrobust.data import Dataset
from samrobust.experiments import building, methods
from samrobust.system.jaxprs import abstract_key
from samrobust.system.resolve import is_reference, running
from samrobust.types import Config

__all__ = ["rehearse"]


def rehearse(config: Config, dataset: Dataset) -> None:
    """Builds a row on its data; traces its step if any of it is the user's own.

    Args:
      config: validated.
      dataset: that of `config.data`.

    Raises:
      ValueError: as `building.check_images`, `building.make_plan` and
        `building.make_training`; for an error in the user's own code, one line that
        says where.
    """
    building.check_images(config, dataset)
    plan = building.make_plan(config, len(dataset.train))
    built = building.make_training(config, dataset, plan.num_steps)
    method = built.method
    parts = [part.name for part in methods.parts_of(config)]
    names = [*parts, config.model.name, config.training.optimizer]
    own = list(filter(is_reference, names))
    if not own:
        return
    key = abstract_key()

    def images_of(size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *dataset.image_shape), jnp.float32)

    full = config.training.batch_size
    with running(" with ".join(own)):
        state = jax.eval_shape(method.init, key, images_of(full))
        for size in {full, plan.remainder} - {0}:
            labels = jax.ShapeDtypeStruct((size,), jnp.int32)
            jax.eval_shape(method.train_step, state, images_of(size), labels, key)
        jax.eval_shape(method.logits, state, images_of(full))
        if built.admit is not None:
            worst = jax.ShapeDtypeStruct((), jnp.float32)
            jax.eval_shape(built.admit, state.average, state.variables, worst)
