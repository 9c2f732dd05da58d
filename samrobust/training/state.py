"""The state of training: arrays alone. Configuration is closed over by the step."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from samrobust.checks import check
from samrobust.types import Array, PyTree

__all__ = ["TrainState", "init_state"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: of the network, in its own precision: float32, but for a network of
        another one.
      batch_stats: BatchNorm's running statistics, likewise; {} of a network without.
      opt_state: of the optax chain.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, PyTree]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    image_shape: tuple[int, ...],
    key: Array,
) -> TrainState:
    """A fresh state; a pure function of the key, which is consumed.

    Args:
      model: called as `model.init(key, images, train=False)`.
      tx: the optimizer.
      image_shape: (H, W, C).
      key: of the parameters' initialisation.

    Raises:
      ValueError: if the network has other collections of variables than `params` and
        `batch_stats`; they would not be trained, nor kept in checkpoints.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = model.init(key, images, train=False)
    check(
        variables.keys() <= {"params", "batch_stats"},
        "a network whose variables are params and batch_stats",
        collections=sorted(variables),
    )
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
    )
