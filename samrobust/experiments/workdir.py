"""The files of a run: its config, which must stay the same, and its log.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `result.json`;
`failure.json` where the last attempt failed, and `.claim/` (see
`samrobust.system.claims`).
"""

import contextlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.checks import check, shorten
from samrobust.experiments.config_files import rows_named
from samrobust.experiments.configuration import as_dict, shaping_fields, with_defaults
from samrobust.experiments.identity import Identity, changed_fields
from samrobust.experiments.reporting.results import check_comparable
from samrobust.experiments.rows import modern_row
from samrobust.experiments.survey import read_plan
from samrobust.experiments.validation import validate
from samrobust.system import files
from samrobust.system.claims.lease import claim_in_turn, lost
from samrobust.system.fields import differences
from samrobust.system.storage import ObjectPath
from samrobust.types import Config

__all__ = [
    "EVALUATIONS",
    "OtherConfigError",
    "add_evaluation",
    "concluding",
    "config_changes",
    "config_of_run",
    "finished_runs",
    "inode_of",
    "read_evaluations",
    "read_log",
    "read_result",
    "refuse_moved",
    "run_folder",
    "settle_config",
    "stored_config",
]

EVALUATIONS = "evaluations.jsonl"
_LEFT_BY_A_RUN = "result.json", "metrics.jsonl", "checkpoints"
_LEFT_BY_A_RUN += EVALUATIONS, "autoattack"


class OtherConfigError(files.WorkdirError):
    """The workdir holds a run of another config."""

    @classmethod
    def over(
        cls, workdir: pathlib.Path, what: str, changed: Mapping[str, tuple[Any, Any]]
    ) -> "OtherConfigError":
        """Returns the error over fields that were and are something else."""
        listed = "; ".join(
            f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()
        )
        return cls(
            f"{workdir} holds {what} of another config: {listed}. Choose another "
            "--workdir, or restore the field."
        )


def stored_config(workdir: pathlib.Path) -> Config | None:
    """Returns the config that a run was started with; None if there is none.

    Newer fields have the base's values.

    Raises:
      WorkdirError: if `config.json` is damaged, or no config that this version takes.
    """
    path = workdir / "config.json"
    stored = files.read_object(path)
    if stored is None:
        return None
    try:
        config = with_defaults(stored)
        validate(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        message = f"Expected the config of a run in {path}, got one where: {error}"
        raise files.WorkdirError(message) from error
    return config


def config_of_run(workdir: pathlib.Path) -> Config:
    """Returns the config that a run was started with.

    Raises:
      ValueError: if the directory holds no run.
      WorkdirError: as `stored_config`.
    """
    stored = stored_config(workdir)
    of_a_row = sorted(path.parent.name for path in workdir.glob("seed*/config.json"))
    runs = ", ".join(read_plan(workdir) or of_a_row)
    fix = "Train it first: `samrobust train`."
    fix = f"It is a table's. Its runs: {shorten(runs)}." if runs else fix
    wanted = "a run's --workdir, with a config.json"
    check(stored is not None, wanted, fix, workdir=str(workdir))
    return stored


def finished_runs(workdir: pathlib.Path, rows: Sequence[str] = ()) -> dict[str, Config]:
    """Returns a table's finished runs: their configs by directories, in its order.

    Args:
      workdir: of the table.
      rows: only these, see `rows_named`; all where empty.

    Directories that are not named by the row and seed of their run, such as copies, are
    left out, with a warning; another is of rows that differ in more than they say.

    Raises:
      ValueError: if there are none, none of a wanted row, they are not judged alike, or
        the seeds of a row are not trained alike.
    """
    paths = [p.parent for p in sorted(workdir.glob("*/seed*/result.json"))]
    plan = list(read_plan(workdir))
    names = [path.relative_to(workdir).as_posix() for path in paths]
    names.sort(key=lambda name: plan.index(name) if name in plan else len(plan))
    wanted = rows_named(rows)
    configs, misplaced = {}, []
    for name in names:
        if not wanted or modern_row(name.rpartition("/")[0]) in wanted:
            config = config_of_run(workdir / name)
            if workdir / name == run_folder(workdir, config.row, config.seed):
                configs[name] = config
            else:
                misplaced.append(name)
    if misplaced:
        told = "Left out, as they are not of the row and seed of their folders: "
        warnings.warn(f"{told}{shorten(', '.join(misplaced))}.", stacklevel=2)
    lacking = set(wanted).difference(config.row for config in configs.values())
    condition = "finished runs in --workdir" + (" of all --rows" if wanted else "")
    fix = "It is the directory of a table: `samrobust table`."
    if (workdir / "config.json").exists():
        fix = "It is a run's: give the directory of its table."
    which = {"rows_without": sorted(lacking)} if wanted else {}
    found = bool(configs) and not lacking
    check(found, condition, fix, workdir=str(workdir), **which)
    shaping = {name: shaping_fields(as_dict(c)) for name, c in configs.items()}
    check_comparable(shaping, "Choose some with --rows.")
    _check_seeds(shaping)
    if differs := _untold(shaping):
        told = "; ".join(f"{n}: {shorten(str(each))}" for n, each in differs.items())
        warnings.warn(f"The rows differ in more than they say. {told}.", stacklevel=2)
    return configs


def _check_seeds(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses runs of one row whose configs differ in more than the seed."""
    firsts: dict[str, str] = {}  # of each row
    for name, fields in runs.items():
        first = firsts.setdefault(fields["row"], name)
        changed = differences(runs[first], fields)
        changed.pop("seed", None)
        condition = f"seeds of one row that were trained alike, as {first}"
        fix = "Train it again in another folder, or move one away."
        check(not changed, condition, fix, run=name, **changed)


def _untold(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns fields in which rows differ that do not name them.

    Returns:
      The values by dotted names; of data, network and training, as all rows share.
    """
    found = {}
    for name in sorted({name for fields in runs.values() for name in fields}):
        if name.startswith(("data.", "model.", "training.")):
            kinds: list[Any] = []  # lists among them
            for fields in runs.values():
                value = fields.get(name)
                if f"{name}=" not in fields["row"] and value not in kinds:
                    kinds.append(value)
            if len(kinds) > 1:
                found[name] = kinds
    return found


def concluding(workdir: pathlib.Path) -> contextlib.AbstractContextManager[Any]:
    """Lets one process at a time write a table's files, which belong together."""
    return claim_in_turn(workdir / ".judging" / "conclusion")


def run_folder(workdir: pathlib.Path, row: str, seed: int) -> pathlib.Path:
    """Returns where a table has a run: `ROW/seed0`, the row as its version wrote it."""
    folder = workdir / row / f"seed{seed}"
    if folder.is_dir():
        return folder
    older = (path / folder.name for path in sorted(workdir.glob("at+sam,*")))
    named = (path for path in older if modern_row(path.parent.name) == row)
    return next((path for path in named if path.is_dir()), folder)


def config_changes(
    workdir: pathlib.Path, config: Config
) -> dict[str, tuple[object, object]] | None:
    """Returns the fields that shape a result and are not as when the run was started.

    Returns:
      The values then and now, by dotted names; None where no run has left anything
      but a config: it was refused, or stopped before it came to train.

    Raises:
      WorkdirError: as `stored_config`.
    """
    stored = stored_config(workdir)
    if stored is None or not _left_by_a_run(workdir):
        return None
    return changed_fields(stored.to_dict(), as_dict(config))


def _left_by_a_run(workdir: pathlib.Path) -> list[str]:
    return [name for name in _LEFT_BY_A_RUN if (workdir / name).exists()]


def inode_of(workdir: pathlib.Path) -> tuple[int, int] | None:
    """Returns device and inode of a directory, zeros without one; None in a bucket."""
    if isinstance(workdir, ObjectPath):
        return None
    with contextlib.suppress(FileNotFoundError):
        status = workdir.stat()
        return status.st_dev, status.st_ino
    return 0, 0


def refuse_moved(workdir: pathlib.Path, opened: tuple[int, int] | None) -> None:
    """Refuses a directory that is not the one of this name that was opened.

    Args:
      workdir: a write there would make it again.
      opened: its `inode_of` then.

    Raises:
      ClaimedError: if it was removed or moved meanwhile.
    """
    if inode_of(workdir) != opened:
        raise lost(workdir)


def add_evaluation(workdir: pathlib.Path, line: Mapping[str, Any]) -> pathlib.Path:
    """Adds a line to `evaluations.jsonl`, as others may at the same time.

    Returns:
      The path of that file.

    Raises:
      ClaimedError: if the directory was removed or moved meanwhile.
    """
    if not (workdir / "config.json").exists():
        raise lost(workdir)
    path, line = workdir / EVALUATIONS, files.seal(line)
    with contextlib.ExitStack() as held:
        if isinstance(path, ObjectPath):  # which has no appending
            held.enter_context(claim_in_turn(workdir / ".appending"))
        files.append_json_line(path, line)
    return path


def read_evaluations(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of `evaluations.jsonl`.

    Raises:
      WorkdirError: if one was changed since it was written, or is damaged.
    """
    path = workdir / EVALUATIONS
    return [
        files.unseal(line, path, older=True)
        for line in files.read_json_lines(path, whole=True)
    ]


def read_log(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`, an epoch each.

    Raises:
      WorkdirError: if one is damaged, or those of a finished run are not all there.
    """
    path = workdir / "metrics.jsonl"
    lines = files.read_json_lines(path, whole=True)
    training = files.glance(workdir / "config.json").get("training")
    epochs = training.get("epochs") if isinstance(training, dict) else len(lines)
    if (workdir / "result.json").exists() and len(lines) != epochs:
        raise files.WorkdirError(
            f"Expected a line for each of {epochs} epochs in {path}, got {len(lines)}. "
            "Restore it from a copy."
        )
    return lines


def settle_config(workdir: pathlib.Path, config: Config) -> None:
    """Writes `config.json`, or checks that the one there is of the same run.

    Raises:
      OtherConfigError: if a field that shapes the result differs; names it.
      WorkdirError: if there is none beside what a run left.
    """
    changed = config_changes(workdir, config)
    if changed:
        raise OtherConfigError.over(workdir, "a run", changed)
    left = _left_by_a_run(workdir)
    if changed is None and (workdir / "plan.json").exists():
        raise files.WorkdirError(
            f"Expected the directory of one run, got that of a table: {workdir}. "
            "Choose another --workdir, or one of its runs'."
        )
    if changed is None and left:
        raise files.WorkdirError(
            f"Expected a config.json beside {', '.join(left)} in {workdir}, got "
            "none: nothing says of which run they are. Restore it from a copy, or "
            "choose another --workdir."
        )
    files.write_json(workdir / "config.json", as_dict(config))


def read_result(workdir: pathlib.Path, identity: Identity) -> dict[str, Any] | None:
    """Returns the content of a run's `result.json`; None if it has not finished.

    Args:
      workdir: of the run.
      identity: of the run; its data are compared where they are known.

    Raises:
      WorkdirError: if the file is damaged, or the result of another run.
    """
    path = workdir / "result.json"
    result = files.read_sealed(path)
    if result is None:
        return None
    stored = Identity.from_dict(result.get("run"))
    unlike = "it does not say of which" if stored is None else stored.unlike(identity)
    if unlike:
        raise files.WorkdirError(
            f"Expected the result of this run in {path}, got another's: {unlike}. "
            "Choose another --workdir. Where that file alone is another's, move it "
            "away: the last checkpoint is then evaluated again."
        )
    return {**result, "row": modern_row(str(result.get("row")))}
