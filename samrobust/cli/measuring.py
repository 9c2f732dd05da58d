"""Measurements of a table's finished runs, shared by all that work on its directory.

With JAX: commands import it inside `run`.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from samrobust.attacks import ATTACKS_VERSION
from samrobust.cli import shared
from samrobust.data import Dataset
from samrobust.evaluation import OnBatch
from samrobust.experiments import building, networks, scoring
from samrobust.experiments.identity import identity_of
from samrobust.experiments.reporting.progress import ProgressDisplay, RunDisplay
from samrobust.experiments.turns import take_turns
from samrobust.experiments.workdir import concluding, finished_runs, read_result
from samrobust.system import files
from samrobust.system.claims.lease import Claim, ClaimedError, claim, claim_in_turn
from samrobust.system.distributed import broadcast_from_primary, met_by_all
from samrobust.system.failures import describe, is_transient
from samrobust.system.provenance import provenance
from samrobust.system.runtime import FAILED
from samrobust.training.checkpoint import CheckpointError
from samrobust.types import Config, PyTree

__all__ = ["FinishedRuns", "RunMeasurements"]

_T = TypeVar("_T")
Measure: TypeAlias = Callable[[PyTree, OnBatch], dict[str, Any]]


class _UnreadableError(RuntimeError):
    """The network of a run cannot be read; its argument is the error that says why."""


class FinishedRuns:
    """Table of finished runs, opened by a command in all processes.

    Args:
      arguments: of the command, with the workdir and the rows.
      stop: asked before each batch.

    Attributes:
      console: of process 0.
      workdir: of the table, in which process 0 can write.
      configs: of the runs, by their folders in the workdir; after `judge_each` without
        those that have no network to be read.
      first: the first of them.
      exit_code: of the command; not 0 where there were such runs.
      load_data: of a config; once for equal data.

    Raises:
      ValueError: for a directory without finished runs.
    """

    def __init__(self, arguments: argparse.Namespace, stop: Callable[[], bool]):
        self._stop, self.console = shared.join(stop)
        self.workdir: pathlib.Path = arguments.workdir
        self.configs: Mapping[str, Config] = broadcast_from_primary(
            lambda: finished_runs(self.workdir, arguments.rows or ())
        )
        self.first = next(iter(self.configs.values()))
        self.exit_code = 0
        self.load_data = shared.once_per(building.load_data, "data")
        self._confirm = shared.open_workdir(self.workdir)
        self._mine: Claim | None = None  # of process 0, on the run that is judged

    def should_stop(self) -> bool:
        """Tells whether to stop; the same answer in all processes.

        Raises:
          ClaimedError: if the workdir was removed or moved meanwhile, or this worker
            was stalled and another took over.
        """
        if self._mine is not None:
            self._mine.check()
        return self._stop()

    @contextlib.contextmanager
    def concluding(self) -> Iterator[None]:
        """Lets one worker at a time write what all have found, in process 0.

        Raises:
          ClaimedError: if the workdir was removed or moved meanwhile.
        """
        self._confirm()
        with concluding(self.workdir):
            yield

    def read_results(self) -> dict[str, dict[str, Any]]:
        """Returns the results of the runs, by their folders.

        Raises:
          WorkdirError: if one is damaged.
        """

        def read() -> dict[str, Any]:
            return {
                folder: read_result(self.workdir / folder, identity_of(config, None))
                for folder, config in self.configs.items()
            }

        return broadcast_from_primary(read)

    def load_network(self, folder: str, config: Config, which: str) -> networks.Trained:
        """Returns a network of a run, inside a `judge` of `judge_each`.

        Args:
          folder: of the run.
          config: of the run, perhaps with flags in it.
          which: of its checkpoints.
        """
        dataset, place = self.load_data(config), self.workdir / folder
        try:
            return networks.load_network(config, dataset, place, which)
        except (CheckpointError, files.WorkdirError, ValueError) as error:
            if not met_by_all(error) or is_transient(error):
                raise
            raise _UnreadableError(error) from error

    def judge_each(
        self, judge: Callable[[str, RunDisplay], _T], works: Mapping[str, float]
    ) -> dict[str, _T]:
        """Judges every run, each while no other worker does.

        A run whose network cannot be read stops no other; it is named at the end.

        Args:
          judge: of the run's folder and its display, while the run is this worker's.
          works: predicted costs of the runs, by their folders, in any unit.

        Returns:
          What was found of each run, by its folder, in the order of `configs`.

        Raises:
          CheckpointError: if no run has a network that can be read.
          InterruptedRunError: if it was asked to stop while others held the last runs.
        """
        found: dict[str, _T] = {}
        unreadable: dict[str, Exception] = {}
        display = ProgressDisplay(self.console, sum(works.values()))

        def name(folder: str) -> str:
            config = self.configs[folder]
            return f"{config.label}, seed {config.seed}"

        def attempt(left: Sequence[str]) -> list[str]:
            return [folder for folder in left if not judged(folder)]

        def judged(folder: str) -> bool:
            shown = display.run(name(folder), 0.0, works[folder])
            broadcast_from_primary(self._confirm)
            with contextlib.ExitStack() as held:
                try:
                    broadcast_from_primary(lambda: self._claim(held, folder))
                except ClaimedError:
                    return False
                try:
                    found[folder] = judge(folder, shown)
                except _UnreadableError as error:
                    (unreadable[folder],) = error.args
                self._mine = None
            return True

        def on_wait(held: Sequence[str]) -> None:
            display.wait_for(map(name, held))

        everything, should_stop = list(self.configs), self.should_stop
        with display.live():
            take_turns(everything, attempt, on_wait=on_wait, should_stop=should_stop)
        if not found:
            raise next(iter(unreadable.values()))
        why = {name(folder): describe(error) for folder, error in unreadable.items()}
        shared.show_failures(self.console, why)
        self.exit_code = FAILED if unreadable else 0
        self.configs = {f: c for f, c in self.configs.items() if f in found}
        return {folder: found[folder] for folder in self.configs}

    def _claim(self, held: contextlib.ExitStack, folder: str) -> None:
        # Beside the run and not in it: that may be somebody else's, or in use.
        self._mine = held.enter_context(claim(self.workdir / ".judging" / folder))


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
        self.runs: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, dict[str, Any]] = {}  # by this worker
        broadcast_from_primary(self._set_aside_what_is_of_no_use)
        self._read()

    def once(self, make: Callable[..., _T]) -> Callable[[Config], _T]:
        """Returns what is made for a run's network, once for equal ones.

        Args:
          make: `make(model, settings, batch_size=...)`.
        """

        def of_run(config: Config) -> _T:
            model = building.make_model(config, self.load_data(config))
            size = config.evaluation.batch_size
            return make(model, self.settings, batch_size=size)

        return shared.once_per(of_run, "data", "model", "evaluation")

    def measure(
        self, prepare: Callable[[Config, Dataset], tuple[dict[str, Any], Measure]]
    ) -> None:
        """Measures the runs that are not known under these settings; writes each.

        Args:
          prepare: of a run's config and data to what tells the measurement from others,
            the images, and what measures, of the run's variables.

        Raises:
          CheckpointError: if no run has a network that can be read.
          InterruptedRunError: if it was asked to stop.
        """
        works = {folder: float(folder not in self.runs) for folder in self.configs}

        def judge(folder: str, shown: RunDisplay) -> None:
            config = self.configs[folder]
            which = networks.checkpoints_of(config)[0]
            network = self.load_network(folder, config, which)
            images, measure = prepare(config, self.load_data(config))
            measured = {
                "identity": network.identity.hash,
                "step": network.step,
                "network": network.checksum(),
                **images,
                "attacks_version": ATTACKS_VERSION,
            }
            self._read()  # another worker may have measured it
            if self.runs.get(folder, {}).items() >= measured.items():
                return
            on_batch = scoring.until_stopped(
                shown.on_batch, self.should_stop, "in a run"
            )
            found = measure(network.variables, on_batch)
            measured["provenance"] = provenance()
            self._measured[folder] = self.runs[folder] = {**found, **measured}
            self.runs = broadcast_from_primary(lambda: self._write({}))

        self.judge_each(judge, works)

    def conclude(
        self, draw: Callable[[], Iterable[pathlib.Path]], **found: Any
    ) -> None:
        """Writes what was found in all runs: files, and last what tells of them.

        Says which.

        Args:
          draw: writes the files; called in process 0.
          **found: for the JSON file, which names the runs and the files' checksums.
        """

        def together() -> tuple[dict[str, dict[str, Any]], list[str]]:
            with self.concluding():
                written = {path.name: files.digest(path) for path in draw()}
                about = {"concluded": list(self.configs), "files": written}
                return self._write({**about, **found}), list(written)

        self.runs, names = broadcast_from_primary(together)
        shared.show_written(self.console, self.workdir, [*names, self._path.name])

    def _read(self) -> None:
        self.runs = broadcast_from_primary(self._together)

    def _write(self, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
        self._confirm()
        with self._alone():  # others add theirs to the same file
            runs = self._together()
            content = {"settings": self._as_json, "runs": runs, **found}
            files.write_sealed(self._path, content)
        return runs

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        return claim_in_turn(self.workdir / ".judging" / self._path.name)

    def _together(self) -> dict[str, dict[str, Any]]:
        """Returns what this worker and others have measured so far.

        Raises:
          WorkdirError: if the file is damaged, or another worker began to measure
            meanwhile with other settings.
        """
        known = files.read_sealed(self._path)
        if known is not None and known.get("settings") != self._as_json:
            raise files.WorkdirError(
                f"Expected workers with the same settings in {self.workdir}, got "
                f"{self._path.name} of other ones, which another worker has just "
                "written. Measure with one after the other."
            )
        return self.runs | (known or {"runs": {}})["runs"] | self._measured

    def _set_aside_what_is_of_no_use(self) -> None:
        """Renames a file of other settings, or a damaged one, with a warning."""
        with self._alone():
            try:
                known, problem = files.read_sealed(self._path), "is of other settings"
            except files.WorkdirError as error:
                known, problem = {}, str(error)
            if known is None or known.get("settings") == self._as_json:
                return
            kept = files.set_aside(self._path).name
        about = f"{problem.rstrip('.')}. It is kept as {kept}; all is measured."
        warnings.warn(f"{self._path} {about}" if known else about, stacklevel=2)
