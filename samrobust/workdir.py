"""The files of a run: its config, which must stay the same, and its log.

A workdir holds `config.json`, `metrics.jsonl`, `checkpoints/`, `result.json`;
`failure.json` where the last attempt failed, and `.claim/` (see `samrobust.claims`).
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from samrobust.checks import check
from samrobust.configuration import differences, with_defaults
from samrobust.files import (
    WorkdirError,
    append_json_line,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)
from samrobust.types import Config

__all__ = [
    "MetricsLog",
    "OtherConfigError",
    "WorkdirError",
    "append_json_line",
    "changed_fields",
    "config_of_run",
    "finished_runs",
    "read_json",
    "settle_config",
    "write_json",
    "write_text",
]

# What may change between two starts of the same run: none of it changes a result.
_MAY_CHANGE = (
    *("data.data_dir", "data.manual_dir"),
    *("checkpoint.", "paper.", "tracking."),
)


class OtherConfigError(WorkdirError):
    """The workdir holds a run of another config."""


def changed_fields(
    workdir: pathlib.Path, config: dict[str, Any]
) -> dict[str, tuple[object, object]]:
    """The fields that shape a result and differ from those in `config.json`.

    Returns:
      Stored and given value by dotted names; empty if there is no such file.
    """
    stored = read_json(workdir / "config.json")
    if stored is None:
        return {}
    both = (with_defaults(fields).to_dict() for fields in (stored, config))
    changed = differences(*both)
    return {n: v for n, v in changed.items() if not n.startswith(_MAY_CHANGE)}


def config_of_run(workdir: pathlib.Path) -> Config:
    """The config that a run was started with; newer fields have the base's values.

    Raises:
      ValueError: if the directory holds no run.
    """
    stored = read_json(workdir / "config.json")
    check(
        stored is not None,
        "a run's --workdir, with a config.json",
        "Train it first: `samrobust train`.",
        workdir=str(workdir),
    )
    return with_defaults(stored or {})


def finished_runs(workdir: pathlib.Path, rows: Sequence[str] = ()) -> dict[str, Config]:
    """The configs of a table's finished runs by their directories, in its order.

    Args:
      workdir: of the table.
      rows: only these, several in one string separated by `;`; all where empty.

    Raises:
      ValueError: if there are none, or they are judged on different images.
    """
    paths = [p.parent for p in sorted(workdir.glob("*/seed*/result.json"))]
    plan = [
        run["path"] for run in (read_json(workdir / "plan.json") or {}).get("runs", [])
    ]
    names = [path.relative_to(workdir).as_posix() for path in paths]
    names.sort(key=lambda name: plan.index(name) if name in plan else len(plan))
    wanted = [row for text in rows for row in text.split(";") if row]
    configs = {}
    for name in names:
        config = config_of_run(workdir / name)
        if not wanted or config.row in wanted:
            configs[name] = config
    check(
        bool(configs),
        "finished runs in --workdir",
        "It is the directory of a table: `samrobust table`.",
        workdir=str(workdir),
        rows=wanted,
    )
    data = {name: (c.data.name, c.evaluation.split) for name, c in configs.items()}
    check(len(set(data.values())) == 1, "runs on the same images", runs=data)
    return configs


def settle_config(workdir: pathlib.Path, config: dict[str, Any]) -> None:
    """Writes `config.json`, or checks that the one there is of the same run.

    Raises:
      OtherConfigError: if a field that shapes the result differs; names it.
    """
    changed = changed_fields(workdir, config)
    if changed:
        listed = "; ".join(
            f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()
        )
        message = (
            f"{workdir} holds a run of another config: {listed}. Choose another "
            "--workdir, or restore the field."
        )
        raise OtherConfigError(message)
    write_json(workdir / "config.json", config)


class MetricsLog:
    """`metrics.jsonl`: an object an epoch, in order, each epoch once."""

    def __init__(self, path: pathlib.Path, *, last_step: int):
        """Opens the log and drops what lies after the step a run goes on from."""
        self._path = path
        kept = [line for line in read_json_lines(path) if line["step"] <= last_step]
        self.lines = kept
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds an epoch; durable on return."""
        self.lines.append(line)
        append_json_line(self._path, line)
