"""The state of training: arrays alone. Configuration is closed over by the step."""

import dataclasses

import jax
import optax

from samrobust.sharpness.trees import norm
from samrobust.types import Array, PyTree

__all__ = ["TrainState", "measured"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step changes.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: of the network, in its own precision, by default float32.
      batch_stats: BatchNorm's running statistics, likewise; {} of a network without.
      opt_state: of the optax chain.
      adversary: the adversary's state; () without a memory.
      average: of `variables`, by their names, and what else the averaging remembers; ()
        without one.
    """

    step: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    adversary: PyTree = ()
    average: PyTree = ()

    @property
    def variables(self) -> dict[str, PyTree]:
        """The trained variables, for `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """The evaluated variables: the average where there is one."""
        return {name: (self.average or self.variables)[name] for name in self.variables}


def measured(state: TrainState) -> dict[str, Array]:
    """Returns what the log says of the state after an epoch; may still be computed.

    Returns:
      `average_distance`, where there is an average: the l2 distance of the evaluated
      parameters from the trained ones.
    """
    if not state.average:
        return {}
    average = state.eval_variables["params"]
    return {"average_distance": _distance(average, state.params)}


@jax.jit
def _distance(average: PyTree, params: PyTree) -> Array:
    return norm(jax.tree.map(lambda a, w: a - w.astype(a.dtype), average, params))
