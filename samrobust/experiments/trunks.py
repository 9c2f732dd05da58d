"""Which runs of a table have their first epochs in common, and where those lie.

Up to an epoch a run is the one without the parts that begin then or later, bit for bit:
`at,norm=linf,eps=8+sam,rho=0.2,start=0.8` is `at,norm=linf,eps=8`. Runs for which that
is the same run have a trunk, `TABLE/trunks/ROW/seed0/epoch80`, see
`samrobust.training.trunks`.
"""

import collections
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from samrobust.data import Dataset
from samrobust.experiments import building, entries, methods
from samrobust.experiments.configuration import as_dict, with_defaults
from samrobust.experiments.identity import identity_of
from samrobust.experiments.rows import Row, parse_row
from samrobust.system.claims.holder import read_holder
from samrobust.system.jaxprs import abstract_key
from samrobust.system.storage import remove_tree
from samrobust.training.log import checkpoint_folder
from samrobust.training.trunks import TRAINED_BY, Trunk
from samrobust.types import Config

__all__ = [
    "PlannedTrunk",
    "epochs_given",
    "in_the_making",
    "make_trunk",
    "plan_trunks",
    "remove_finished",
    "trained_by",
    "until",
]


@dataclasses.dataclass(frozen=True)
class PlannedTrunk:
    """The first epochs of several runs of a table.

    Attributes:
      folder: where they lie once one of the runs has trained them.
      config: of the run that has these epochs' parts alone.
      epoch: the first one that is not common.
      workdirs: of the runs.
    """

    folder: pathlib.Path
    config: Config
    epoch: int
    workdirs: tuple[pathlib.Path, ...]


def plan_trunks(
    table: pathlib.Path, configs: Mapping[pathlib.Path, Config]
) -> dict[pathlib.Path, list[PlannedTrunk]]:
    """Returns the trunks that each run of a table passes through.

    Args:
      table: its workdir.
      configs: of all runs, by their workdirs.
    """
    starts = {  # of the phases behind the first one
        workdir: {epochs.start for epochs in methods.phases_of(config)} - {0}
        for workdir, config in configs.items()
    }
    together = collections.defaultdict(list)
    for epoch in sorted(set().union(*starts.values())):
        for workdir, config in configs.items():
            common = until(config, epoch)
            if _is_like(common, config):
                key = epoch, json.dumps(as_dict(common), sort_keys=True)
                together[key].append((workdir, common))
    trunks: dict[pathlib.Path, list[PlannedTrunk]] = {w: [] for w in configs}
    for (epoch, _), runs in together.items():
        workdirs = tuple(workdir for workdir, _ in runs)
        if len(runs) > 1 and any(epoch in starts[workdir] for workdir in workdirs):
            common = runs[0][1]
            where = common.row, f"seed{common.seed}", f"epoch{epoch}"
            folder = table.joinpath("trunks", *where)
            for workdir in workdirs:
                planned = PlannedTrunk(folder, common, epoch, workdirs)
                trunks[workdir].append(planned)
    return trunks


def until(config: Config, epoch: int) -> Config:
    """Returns the config of the run that another is up to an epoch.

    Sections of other methods than its own say nothing, and have the base's values.
    """
    row = parse_row(config.row)
    parts = [p for p in row.parts if methods.start_epoch(config, p.name) < epoch]
    own = {entries.section_of(part.name) for part in parts}
    silent = methods.sections(config.row).keys() - own
    others = {n: v for n, v in row.others.items() if n.partition(".")[0] not in silent}
    common = Row(tuple(parts), others)
    kept = {n: v for n, v in as_dict(config).items() if n not in {*silent, "paper"}}
    return with_defaults({**kept, "row": common.name, "label": common.label})


def _is_like(common: Config, config: Config) -> bool:
    """Tells whether late parts change nothing before they begin.

    Their attacks judge the held-out images of all epochs.
    """
    judged = [building.validation_attacks(c).keys() for c in (common, config)]
    replays = [methods.replays(c) for c in (common, config)]
    judges = config.data.validation_size > 0 and judged[0] != judged[1]
    return not judges and replays[0] == replays[1]


def epochs_given(shared: Iterable[Iterable[PlannedTrunk]]) -> list[int]:
    """Returns how many epochs each run takes from those before it, by their trunks."""
    found, left = [], set()
    for trunks in map(list, shared):
        found.append(max((t.epoch for t in trunks if t.folder in left), default=0))
        left |= {trunk.folder for trunk in trunks}
    return found


def make_trunk(
    planned: PlannedTrunk, workdir: pathlib.Path, dataset: Dataset, steps: int
) -> Trunk:
    """Builds what the training takes of a trunk.

    Args:
      planned: one that the run passes through.
      workdir: of the run.
      dataset: of the table.
      steps: in an epoch.
    """
    config = planned.config

    def make_like() -> Any:
        begin = building.make_training(config, dataset, steps).begin
        return jax.eval_shape(begin, abstract_key())

    def is_wanted() -> bool:
        if (workdir / "import.json").exists():  # others begin with weights of their own
            return False
        others = (other for other in planned.workdirs if other != workdir)
        return any(not checkpoint_folder(w, "last").exists() for w in others)

    return Trunk(
        folder=planned.folder,
        step=planned.epoch * steps,
        identity=identity_of(config, dataset),
        make_like=make_like,
        is_wanted=is_wanted,
    )


def in_the_making(planned: Iterable[PlannedTrunk]) -> bool:
    """Tells whether a trunk is yet to come and a run at work that may leave it."""
    return any(
        not checkpoint_folder(trunk.folder, "last").exists()
        and any(map(_is_at_work, trunk.workdirs))
        for trunk in planned
    )


def _is_at_work(workdir: pathlib.Path) -> bool:
    holder = read_holder(workdir)
    return holder is not None and not holder.is_over(time.time())


def remove_finished(planned: Iterable[PlannedTrunk]) -> None:
    """Removes the trunks all of whose runs have finished."""
    for trunk in planned:
        if all((workdir / "result.json").exists() for workdir in trunk.workdirs):
            remove_tree(trunk.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others lie there
                for folder in trunk.folder.parents[:3]:
                    folder.rmdir()


def trained_by(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the run, and its step, that a run went on from; {} if from none.

    Args:
      lines: of its `metrics.jsonl`.
    """
    for line in reversed(lines):
        if TRAINED_BY in line:
            return {"identity": line[TRAINED_BY], "step": line["step"]}
    return {}
