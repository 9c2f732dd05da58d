"""`samrobust evaluate --sanity`: checks a network for signs of gradient masking."""

import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
from rich.console import Console

from samrobust.attacks import Ball
from samrobust.checks import NORMS, check
from samrobust.cli.shared import show_written
from samrobust.data import Dataset
from samrobust.evaluation.diagnostics.checks import Surrogate, run_sanity, some_of
from samrobust.evaluation.diagnostics.finding import to_sheet, write_report
from samrobust.experiments import building
from samrobust.experiments.networks import Trained, checkpoints_of, load_network
from samrobust.experiments.reporting.names import column_of
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.scoring import evaluated_split, evaluation_key, until_stopped
from samrobust.experiments.workdir import config_of_run
from samrobust.system.distributed import broadcast_from_primary
from samrobust.system.provenance import provenance
from samrobust.training.adversaries.radii import make_ball
from samrobust.types import Config

__all__ = ["check_network", "check_surrogates", "largest_balls", "load_surrogates"]

_SANITY_STREAM = 3  # another branch of the evaluation's key


def check_network(
    network: Trained,
    dataset: Dataset,
    workdir: pathlib.Path,
    console: Console,
    *,
    surrogates: Mapping[str, Surrogate],
    num_examples: int,
    should_stop: Callable[[], bool],
) -> None:
    """Checks a run's network, shows the findings and writes them into its workdir.

    Args:
      network: of the run; of its `config.evaluation` the largest radius of each norm
        is taken.
      dataset: of the run.
      workdir: of the run.
      console: for the report.
      surrogates: of `load_surrogates`.
      num_examples: images to look at.
      should_stop: asked after every batch.

    Raises:
      InterruptedRunError: after `should_stop`.
    """
    config = network.config
    split = evaluated_split(config, dataset)
    display = ProgressDisplay(console, 1.0)
    shown = display.run(f"{config.label}: sanity checks", 0.0, 1.0)

    def show(done: int, total: int, _: str) -> None:
        shown.on_batch(done, total, f"{done / total:.0%}")

    with display.live():
        findings = run_sanity(
            *(network.model, network.variables, split, largest_balls(config)),
            transfer=surrogates,
            num_examples=num_examples,
            batch_size=config.evaluation.batch_size,
            key=jax.random.fold_in(evaluation_key(config), _SANITY_STREAM),
            on_batch=until_stopped(show, should_stop, "during the sanity checks"),
        )
    count = len(some_of(split, num_examples))
    name = f"{config.evaluation.split} set of {config.data.name}"
    note = f"{count} of {len(split):,} images of the {name}, evenly spread."
    about = {
        "num_examples": count,
        "seed": config.seed,
        "step": network.step,
        "identity": network.identity.hash,
        "provenance": provenance(),
    }
    console.print(to_sheet(findings, note).to_rich())
    paths = broadcast_from_primary(
        lambda: write_report(findings, workdir, note=note, about=about)
    )
    show_written(console, workdir, paths)


def check_surrogates(
    config: Config, folders: Iterable[pathlib.Path]
) -> dict[pathlib.Path, Config]:
    """Reads the configs of other runs, by folder; process 0 alone sees them.

    Raises:
      ValueError: if a folder holds no run, or one on other images.
    """
    found = {folder: config_of_run(folder) for folder in folders}
    for folder, other in found.items():
        check(
            other.data.name == config.data.name,
            f"a run on {config.data.name} for --transfer-from",
            **{"transfer_from": str(folder), "data.name": other.data.name},
        )
    return found


def load_surrogates(
    config: Config, dataset: Dataset, configs: Mapping[pathlib.Path, Config]
) -> dict[str, Surrogate]:
    """Loads the networks of other runs, by folder.

    Args:
      config: of the run whose images they are attacked on.
      dataset: of that run.
      configs: of `check_surrogates`.

    Raises:
      CheckpointError: if one has no intact checkpoint.
    """

    def load(folder: pathlib.Path, other: Config) -> Surrogate:
        same = other.data.to_dict() == config.data.to_dict()
        images = dataset if same else building.load_data(other)
        which = checkpoints_of(other)[0]
        return Surrogate(*load_network(other, images, folder, which)[:2])

    return {str(folder): load(folder, other) for folder, other in configs.items()}


def largest_balls(config: Config) -> dict[str, Ball]:
    """Builds the largest ball > 0 of each norm that the evaluation names."""
    return {
        column_of(norm, max(radii)): make_ball(norm, max(radii))
        for norm in NORMS
        if (radii := [r for r in config.evaluation[norm] if r > 0])
    }
