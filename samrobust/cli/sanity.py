"""`samrobust evaluate --sanity`: the checks on the network of a run."""

import pathlib
from collections.abc import Callable, Sequence

import jax
from rich.console import Console

from samrobust.attacks import Ball
from samrobust.checks import check
from samrobust.data import Dataset
from samrobust.evaluation.diagnostics.checks import run_sanity
from samrobust.evaluation.diagnostics.look import Surrogate, some_of
from samrobust.evaluation.diagnostics.report import to_sheet, write_report
from samrobust.experiments import building
from samrobust.experiments.networks import load_network
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.scoring import evaluated_split, evaluation_key
from samrobust.experiments.workdir import config_of_run
from samrobust.system import distributed
from samrobust.system.provenance import provenance
from samrobust.training.adversaries.at import make_ball
from samrobust.types import Config

__all__ = ["check_surrogates", "largest_balls", "sanity_of_run"]

_SANITY_STREAM = 3  # another branch of the evaluation's key


def sanity_of_run(
    config: Config,
    workdir: pathlib.Path,
    console: Console,
    *,
    dataset: Dataset,
    surrogates: Sequence[tuple[str, Config]],
    num_examples: int,
    step: int | None = None,
    should_stop: Callable[[], bool],
) -> None:
    """Checks the network of a run, shows the findings and writes them into its workdir.

    Args:
      config: of the run; the largest radius of each norm in its `evaluation` is taken.
      workdir: of the run.
      console: for the report.
      dataset: that of `config.data`.
      surrogates: of `check_surrogates`.
      num_examples: images to look at.
      step: of the checkpoint; None for the newest.
      should_stop: asked after every batch.

    Raises:
      CheckpointError: if a run has no intact checkpoint.
      InterruptedRunError: after `should_stop`.
    """
    which = config.evaluation.checkpoint
    network = load_network(config, dataset, workdir, which, step=step)
    split = evaluated_split(config, dataset)
    display = ProgressDisplay(console, 1.0)
    shown = display.run(f"{config.label}: sanity checks", 0.0, 1.0)

    def on_batch(done: int, total: int) -> None:
        shown.on_batch(done, total, f"{done / total:.0%}")

    def surrogate(folder: str, other: Config) -> Surrogate:
        same = other.data.to_dict() == config.data.to_dict()
        images = dataset if same else building.load_data(other)
        which = other.evaluation.checkpoint
        return Surrogate(
            building.make_model(other, images),
            load_network(other, images, pathlib.Path(folder), which).variables,
        )

    with display.live():
        findings = run_sanity(
            *(building.make_model(config, dataset), network.variables),
            *(split, largest_balls(config)),
            transfer={name: surrogate(name, other) for name, other in surrogates},
            num_examples=num_examples,
            batch_size=config.evaluation.batch_size,
            key=jax.random.fold_in(evaluation_key(config), _SANITY_STREAM),
            on_batch=on_batch,
            should_stop=should_stop,
        )
    count = len(some_of(split, num_examples))
    name = f"{config.evaluation.split} set of {config.data.name}"
    note = f"{count} of {len(split):,} images of the {name}, evenly spaced."
    console.print(to_sheet(findings, note).to_rich())
    about = {
        "num_examples": count,
        "seed": config.seed,
        "step": network.step,
        "identity": network.identity.hash,
        "provenance": provenance(),
    }

    def write() -> None:
        write_report(findings, workdir, note=note, about=about)

    distributed.from_primary(write)
    console.print(f"Written to {workdir}: sanity.json, sanity.md", highlight=False)


def check_surrogates(
    config: Config, folders: Sequence[str]
) -> list[tuple[str, Config]]:
    """Reads the configs of other runs, by folder; process 0 alone sees them.

    Raises:
      ValueError: if a folder holds no run, or one on other images.
    """
    found = []
    for folder in dict.fromkeys(folders):
        other = config_of_run(pathlib.Path(folder))
        check(
            other.data.name == config.data.name,
            f"a run on {config.data.name} for --transfer-from",
            **{"transfer_from": folder, "data.name": other.data.name},
        )
        found.append((folder, other))
    return found


def largest_balls(config: Config) -> dict[str, Ball]:
    """Builds the largest ball > 0 of each norm that the evaluation names."""
    return {
        f"{norm} {max(radii):g}/255": make_ball(norm, max(radii))
        for norm in ("linf", "l2")
        if (radii := [r for r in config.evaluation[norm] if r > 0])
    }
