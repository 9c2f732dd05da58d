"""Trained networks of runs: read from their checkpoints, or put there.

A checkpoint holds a `LoopState` and, as metadata, the identity of its run, the log so
far and what else a training that goes on must know.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from samrobust.checks import check_choice
from samrobust.data import Dataset, DatasetFacts
from samrobust.experiments import building, methods
from samrobust.experiments.identity import Identity, check_alike, identity_of
from samrobust.experiments.workdir import config_of_run, stored_config
from samrobust.system.distributed import broadcast_from_primary
from samrobust.system.files import glance
from samrobust.system.jaxprs import abstract_key
from samrobust.system.provenance import checksum
from samrobust.system.resolve import is_reference
from samrobust.system.storage import to_path
from samrobust.training.checkpoint import CheckpointError, Checkpoints, Restored
from samrobust.training.epoch import LoopState
from samrobust.training.log import checkpoint_folder, checkpoint_metadata
from samrobust.training.restoring import read_and_spread
from samrobust.types import Array, Config, PyTree

__all__ = ["Trained", "checkpoints_of", "load", "load_network", "save_variables"]


class Trained(NamedTuple):
    """A trained network, as it is evaluated, and whose it is.

    Attributes:
      model: a Flax network, `model.apply(variables, images, train=False)`.
      variables: its parameters and statistics; averaged ones where the run has an
        averaging.
      config: of the run.
      step: after which it was saved.
      identity: of the run.
    """

    model: nn.Module
    variables: dict[str, PyTree]
    config: Config
    step: int
    identity: Identity

    def logits_fn(self, images: Array) -> Array:
        """Returns logits float32 [B, K] of images [B, H, W, C] with pixels in [0, 1].

        Differentiable; it is what attacks take.
        """
        return cast(Array, self.model.apply(self.variables, images, train=False))

    def checksum(self) -> str:
        """Returns the SHA-256 of its numbers: of equal runs one may round otherwise."""
        return checksum(self.variables)


def checkpoints_of(config: Config) -> tuple[str, ...]:
    """Returns the checkpoints that a run is judged by.

    Returns:
      `last`, `best` on the validation images, or both. Where one network is wanted, it
      is the first.
    """
    which = config.evaluation.checkpoint
    return ("last", "best") if which == "both" else (which,)


def load(
    workdir: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    step: int | None = None,
) -> Trained:
    """Returns the trained network of a run.

    A built-in data set need not be there. Any other must be, and be the one that the
    network was trained on: its mean and standard deviation belong to the network.

    Args:
      workdir: of `samrobust train`, or of a row and seed of `samrobust table`.
      checkpoint: `last` or `best` on the validation images; None: the one that the
        run was evaluated with, of both the last.
      step: of the checkpoint; None for the newest.

    Raises:
      ValueError: if the directory holds no run.
      WorkdirError: if its config is damaged.
      CheckpointError: if there is no such checkpoint, or it is damaged, or of another
        run or other data.
    """
    folder = to_path(workdir)
    config = config_of_run(folder)
    data = building.load_facts_or_data(config)
    which = checkpoint or checkpoints_of(config)[0]
    check_choice(("last", "best"), checkpoint=which)
    return load_network(config, data, folder, which, step=step)


def load_network(
    config: Config,
    dataset: Dataset | DatasetFacts,
    workdir: pathlib.Path,
    which: str,
    *,
    step: int | None = None,
) -> Trained:
    """Returns the trained network of a run.

    Args:
      config: of the run; what an evaluation changes in it does not matter.
      dataset: that of `config.data`, or what is known of it without its images, which
        are not compared then with those that the run was trained on.
      workdir: of the run; the `config.json` there says whose checkpoints they must be.
      which: `last`, or `best` on the validation images.
      step: of the checkpoint; None for the newest.

    Of several processes all must call this.

    Raises:
      ValueError: if the processes have different configs, code or data.
      CheckpointError: if there is none, or if it is damaged or of another run. An older
        one never takes its place.
    """
    check_alike(config, dataset)
    key = abstract_key()
    like = jax.eval_shape(_begin(config, dataset), key)
    folder = checkpoint_folder(workdir, which)
    own = broadcast_from_primary(lambda: stored_config(workdir)) or config
    digest = broadcast_from_primary(
        lambda: glance(workdir / "import.json").get("sha256")
    )
    expected = identity_of(own, dataset, digest)

    def refuse(metadata: dict[str, Any]) -> str:
        return expected.refuse(metadata.get("identity"), draws=False)

    restored = read_and_spread(
        folder, like, lambda c: c.restore(step, like, refuse=refuse)
    )
    assert restored is not None  # `Checkpoints.restore` raises
    if step is None:
        broadcast_from_primary(lambda: _check_is_final(own, folder, restored))
    identity = Identity.from_dict(restored.metadata["identity"])
    assert identity is not None  # `refuse` was asked
    model, state = building.make_model(config, dataset), restored.state.state
    return Trained(model, state.eval_variables, config, restored.step, identity)


def _check_is_final(config: Config, folder: pathlib.Path, restored: Restored) -> None:
    """Refuses an older step of a run that has finished."""
    result = glance(folder.parent.parent / "result.json")
    if not result:
        return
    lines = restored.metadata["lines"]
    last = lines[-1]["epoch"] == config.training.epochs if lines else False
    is_final = last if folder.name == "last" else True
    wanted = "that of the last epoch"
    if result.get("checkpoint") in (folder.name, "both"):
        step = result.get(folder.name, result)["step"]
        wanted, is_final = f"step {step}", restored.step == step
    if not is_final:
        raise CheckpointError(
            f"Expected {wanted} in {folder}, with which the run finished, got step "
            f"{restored.step}. An older one is used only where --step names it."
        )


def save_variables(
    config: Config,
    dataset: Dataset | DatasetFacts,
    workdir: pathlib.Path,
    variables: dict[str, PyTree],
    digest: str | None = None,
) -> None:
    """Makes a network the last checkpoint of a run that has taken no step yet.

    The optimizer is that of a fresh run.

    Args:
      config: of the run; validated.
      dataset: that of `config.data`.
      workdir: of the run, without checkpoints; claimed by the caller.
      variables: `{"params": ..., "batch_stats": ...}`, arrays that fit the network.
      digest: SHA-256 of the file that they come from, if they do.

    Raises:
      CheckpointError: if it cannot be written.
    """
    begin = _begin(config, dataset)

    def cast(variables: PyTree, like: PyTree) -> PyTree:
        return jax.tree.map(lambda x, old: jnp.array(x, old.dtype), variables, like)

    @jax.jit
    def make(key: Array, variables: dict[str, PyTree]) -> LoopState:
        carry = begin(key)
        fresh = {name: carry.state.variables[name] for name in variables}
        state = dataclasses.replace(carry.state, **cast(variables, fresh))
        if state.average:
            average = {**state.average, **cast(state.variables, state.eval_variables)}
            state = dataclasses.replace(state, average=average)
        return LoopState(state, carry.totals)

    carry = make(jax.random.key(config.seed), variables)
    known = None if digest is None else dataset
    metadata = checkpoint_metadata(identity_of(config, known, digest))
    with Checkpoints(checkpoint_folder(workdir, "last")) as checkpoints:
        checkpoints.save(0, carry, metadata, wait=True)


def _begin(
    config: Config, dataset: Dataset | DatasetFacts
) -> Callable[[Array], LoopState]:
    """Returns the function of a key to what a checkpoint of the run holds."""
    # The shapes depend on no number of steps; a part may refuse a number that is small.
    own = any(is_reference(part.name) for part in methods.parts_of(config))
    steps = methods.supposed(config, own=own).steps_per_epoch
    return building.make_training(config, dataset, steps).begin
