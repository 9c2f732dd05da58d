"""`samrobust sharpness`: does flatness, confidence or margin go with robustness?

Measures all finished runs of a table, and holds what it finds against their accuracy
under attack: PGD's of the table, and AutoAttack's where `samrobust recheck` was run.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from samrobust.checks import check
from samrobust.cli import flags
from samrobust.system.runtime import RESUME

if TYPE_CHECKING:
    from samrobust.studies.sharpness.probe import ProbeSettings
    from samrobust.types import Config

__all__ = ["add", "run"]

_NAME = "sharpness"  # of the files
_STREAM = 4  # another branch of the evaluation's key


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "sharpness",
        help="flatness, confidence and margin of a table's runs, against robustness",
        description="Measures sharpness, Hessian, confidence and distance to the "
        "boundary of every finished run of a table, and their rank correlation with "
        f"accuracy under attack. {RESUME}",
        epilog="Explained in docs/flatness.md.",
    )
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the table")
    add("--rows", **flags.ROWS, help="only these; default: all")
    column = "to draw, as in 'linf 8/255 AA'; default: the last of l-inf"
    add("--column", **flags.COLUMN, help=column)
    images = "training and test images, evenly spaced; default: 256 of each"
    add("--num-examples", **flags.COUNT, help=images)
    add("--rho", **flags.POSITIVE, help="of worst-case sharpness; default: 0.1")
    add("--rho-adaptive", **flags.POSITIVE, help="relative to |w|; default: 0.5")
    add("--sigma", **flags.POSITIVE, help="of average sharpness; default: 0.01")
    add("--sigma-adaptive", **flags.POSITIVE, help="relative to |w|; default: 0.1")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Measures as a command line says; returns the exit code.

    Runs that `sharpness.json` holds under the same settings are not measured again, so
    a rerun resumes where the command was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      CheckpointError: if a run has no intact checkpoint.
      InterruptedRunError: if it was asked to stop.
    """
    import jax

    from samrobust.attacks import ATTACKS_VERSION
    from samrobust.cli import shared
    from samrobust.data import fingerprint
    from samrobust.evaluation.diagnostics import some_of
    from samrobust.experiments import building, networks, scoring
    from samrobust.experiments.reporting.pictures import write_figure
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.experiments.workdir import finished_runs
    from samrobust.studies.sharpness import findings
    from samrobust.studies.sharpness.picture import draw_scatter
    from samrobust.studies.sharpness.probe import make_probe
    from samrobust.system.distributed import broadcast_from_primary
    from samrobust.system.files import check_writable, write_sealed, write_text
    from samrobust.system.provenance import provenance

    should_stop, console = shared.join(stop)
    workdir = arguments.workdir
    configs = broadcast_from_primary(
        lambda: finished_runs(workdir, arguments.rows or ())
    )
    settings = _settings(next(iter(configs.values())), arguments)
    broadcast_from_primary(lambda: check_writable(workdir))
    accuracies = broadcast_from_primary(
        lambda: {folder: _accuracy(workdir, folder, c) for folder, c in configs.items()}
    )
    column = findings.choose_column(accuracies.values(), arguments.column)
    as_json = json.loads(json.dumps(dataclasses.asdict(settings)))
    path = workdir / f"{_NAME}.json"
    stored = broadcast_from_primary(lambda: shared.stored_runs(path, as_json))
    load_data = shared.once_per(building.load_data, "data")

    def make(config: "Config") -> Callable[..., dict[str, float]]:
        model = building.make_model(config, load_data(config))
        return make_probe(model, settings, batch_size=config.evaluation.batch_size)

    probe_of = shared.once_per(make, "data", "model", "evaluation")

    def write(**found: Any) -> None:
        content = {"settings": as_json, "runs": stored, **found}
        broadcast_from_primary(lambda: write_sealed(path, content))

    works = {folder: float(folder not in stored) for folder in configs}
    display, runs = ProgressDisplay(console, sum(works.values())), []
    with display.live():
        for folder, config in configs.items():
            name, work = f"{config.label}, seed {config.seed}", works[folder]
            shown = display.run(name, 0.0, work)
            dataset, which = load_data(config), networks.checkpoints_of(config)[0]
            network = networks.load_network(config, dataset, workdir / folder, which)
            splits = dataset.train, scoring.evaluated_split(config, dataset)
            train, test = (some_of(split, settings.num_examples) for split in splits)
            measured = {
                "identity": network.identity.hash,
                "step": network.step,
                "train_images": fingerprint(train),
                "test_images": fingerprint(test),
                "num_images": [len(train), len(test)],
                "attacks_version": ATTACKS_VERSION,
            }
            if not stored.get(folder, {}).items() >= measured.items():
                key = jax.random.fold_in(scoring.evaluation_key(config), _STREAM)
                values = probe_of(config)(
                    *(network.variables, train, test, key),
                    on_batch=scoring.until_stopped(
                        shown.on_batch, should_stop, "in a run"
                    ),
                )
                values = {n: x if math.isfinite(x) else None for n, x in values.items()}
                found = {"values": values, **measured, "provenance": provenance()}
                stored[folder] = found
                write()
            runs.append(
                findings.MeasuredRun(
                    *(config.row, config.label, config.seed),
                    *(stored[folder]["values"], accuracies[folder]),
                )
            )
    explained = findings.explain(runs, column)
    write(**findings.to_json(explained))
    images = stored[next(iter(configs))]["num_images"]
    about = (explained, settings, images)
    console.print(findings.to_sheet(*about, short=True).to_rich())
    first = next(iter(configs.values()))
    title = (
        f"{first.data.name}: accuracy at {explained.column} against what may explain it"
    )

    def conclude() -> list[str]:
        write_text(workdir / f"{_NAME}.md", findings.to_sheet(*about).to_markdown())
        write_text(workdir / f"{_NAME}.csv", findings.to_csv(explained))
        write_figure(draw_scatter(explained, title), workdir, _NAME, ("png",))
        return [f"{_NAME}.{suffix}" for suffix in ("md", "csv", "json", "png")]

    shared.show_written(console, workdir, broadcast_from_primary(conclude))
    return 0


def _settings(config: "Config", arguments: argparse.Namespace) -> "ProbeSettings":
    """Returns how to measure; linearity within the smallest ball of the table."""
    from samrobust.studies.sharpness.probe import ProbeSettings

    balls = [(norm, r) for norm in flags.NORMS for r in sorted(config.evaluation[norm])]
    check(
        bool(balls),
        "a table with accuracies under attack",
        linf=config.evaluation.linf,
        l2=config.evaluation.l2,
    )
    norm, radius = balls[0]
    ball = {"linearity_norm": norm, "linearity_radius": radius}
    return flags.build(ProbeSettings, arguments, **ball)


def _accuracy(workdir: pathlib.Path, folder: str, config: "Config") -> dict[str, float]:
    """Returns a run's accuracies in percent: its result's, and AutoAttack's.

    Of two checkpoints those of the last, whose network is measured.
    """
    from samrobust.experiments.identity import identity_of
    from samrobust.experiments.workdir import read_result
    from samrobust.system.files import glance

    result = read_result(workdir / folder, identity_of(config, None))
    assert result is not None  # the run is finished
    own = {name: result[name] for name in ("row", "seed", "identity", "step")}
    accuracy = {n: x for n, x in result["accuracy"].items() if not n.endswith(" best")}
    rechecked = glance(workdir / "autoattack.json")
    if not any(run.items() >= own.items() for run in rechecked.get("runs", ())):
        return accuracy
    (row,) = [row for row in rechecked["rows"] if row["name"] == config.row]
    number = row["seeds"].index(config.seed)
    return accuracy | {
        column: cell["values"][number]
        for column, cell in row["cells"].items()
        if column.endswith(" AA")
    }
