"""Measurements of a table's finished runs, in one file that a rerun goes on from.

With JAX: commands import it inside `run`.
"""

import argparse
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from flax import linen as nn

from samrobust.attacks import ATTACKS_VERSION
from samrobust.cli import shared
from samrobust.data import Dataset
from samrobust.evaluation import OnBatch
from samrobust.experiments import building, networks, scoring
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.workdir import finished_runs
from samrobust.system import files
from samrobust.system.distributed import broadcast_from_primary
from samrobust.system.provenance import provenance
from samrobust.types import Config, PyTree

__all__ = ["FinishedRuns", "RunMeasurements"]

_T = TypeVar("_T")
Measure: TypeAlias = Callable[[PyTree, OnBatch], dict[str, Any]]


class FinishedRuns:
    """Table of finished runs, opened by a command in all processes.

    Args:
      arguments: of the command, with the workdir and the rows.
      stop: asked before each batch.

    Attributes:
      should_stop: the same answer in all processes.
      console: of process 0.
      workdir: of the table, in which process 0 can write.
      configs: of the runs, by their folders in the workdir.
      first: the first of them.
      load_data: of a config; once for equal data.

    Raises:
      ValueError: for a directory without finished runs.
    """

    def __init__(self, arguments: argparse.Namespace, stop: Callable[[], bool]):
        self.should_stop, self.console = shared.join(stop)
        self.workdir: pathlib.Path = arguments.workdir
        self.configs: Mapping[str, Config] = broadcast_from_primary(
            lambda: finished_runs(self.workdir, arguments.rows or ())
        )
        self.first = next(iter(self.configs.values()))
        self.load_data = shared.once_per(building.load_data, "data")
        broadcast_from_primary(lambda: files.check_writable(self.workdir))


class RunMeasurements(FinishedRuns):
    """Measurements of a command of each finished run of a table.

    Args:
      arguments: of the command, with the workdir and the rows.
      stop: asked before each batch.
      name: of the file, without a suffix.
      make_settings: of the first run's config and the arguments; a dataclass.

    Attributes:
      settings: of all measurements.
      runs: what is known of each run, by its folder.

    Raises:
      ValueError: for settings out of range, or a directory without finished runs.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        stop: Callable[[], bool],
        name: str,
        make_settings: Callable[[Config, argparse.Namespace], Any],
    ):
        super().__init__(arguments, stop)
        self.settings = make_settings(self.first, arguments)
        self._path = self.workdir / f"{name}.json"
        self._as_json = json.loads(json.dumps(dataclasses.asdict(self.settings)))
        self.runs: dict[str, dict[str, Any]] = broadcast_from_primary(
            lambda: _stored_runs(self._path, self._as_json)
        )

    def once(self, make: Callable[[nn.Module, int], _T]) -> Callable[[Config], _T]:
        """Returns what is made of a network and its batch size, once for equal ones."""

        def of_run(config: Config) -> _T:
            model = building.make_model(config, self.load_data(config))
            return make(model, config.evaluation.batch_size)

        return shared.once_per(of_run, "data", "model", "evaluation")

    def measure(
        self, prepare: Callable[[Config, Dataset], tuple[dict[str, Any], Measure]]
    ) -> None:
        """Measures the runs that are not known under these settings; writes each.

        Args:
          prepare: of a run's config and data to what tells the measurement from others,
            the images, and what measures, of the run's variables.

        Raises:
          CheckpointError: if a run has no intact checkpoint.
          InterruptedRunError: if it was asked to stop.
        """
        works = {folder: float(folder not in self.runs) for folder in self.configs}
        display = ProgressDisplay(self.console, sum(works.values()))
        with display.live():
            for folder, config in self.configs.items():
                name = f"{config.label}, seed {config.seed}"
                shown = display.run(name, 0.0, works[folder])
                dataset, where = self.load_data(config), self.workdir / folder
                which = networks.checkpoints_of(config)[0]
                network = networks.load_network(config, dataset, where, which)
                images, measure = prepare(config, dataset)
                measured = {
                    "identity": network.identity.hash,
                    "step": network.step,
                    **images,
                    "attacks_version": ATTACKS_VERSION,
                }
                if self.runs.get(folder, {}).items() >= measured.items():
                    continue
                on_batch = scoring.until_stopped(
                    shown.on_batch, self.should_stop, "in a run"
                )
                found = measure(network.variables, on_batch)
                self.runs[folder] = {**found, **measured, "provenance": provenance()}
                self.write()

    def write(self, **found: Any) -> None:
        """Writes what is known, and what was found in all of it."""
        content = {"settings": self._as_json, "runs": self.runs, **found}
        broadcast_from_primary(lambda: files.write_sealed(self._path, content))


def _stored_runs(path: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what a sealed file holds of each run, measured with the same settings.

    A file of other settings, or a damaged one, is set aside, with a warning.
    """
    try:
        known, problem = files.read_sealed(path), f"{path} is of other settings"
    except files.WorkdirError as error:
        known, problem = {}, str(error)
    if known is None:
        return {}
    if known.get("settings") == settings:
        return known["runs"]
    kept = files.set_aside(path).name
    warnings.warn(f"{problem}. It is kept as {kept}; all is measured.", stacklevel=2)
    return {}
