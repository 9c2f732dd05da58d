"""`samrobust curves`: measures all finished runs of a table, draws, writes."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from samrobust.cli import flags
from samrobust.system.runtime import RESUME

if TYPE_CHECKING:
    from samrobust.evaluation import Evaluator
    from samrobust.experiments.curves import CurveSettings
    from samrobust.types import Config

__all__ = ["add", "run"]

_POINTS = 8  # of a curve, beside radius 0


def add(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "curves",
        help="accuracy against the attack's radius, all methods of a table in one plot",
        description="Attacks every finished run of a table at a grid of radii (PGD, "
        f"any iterate counts) and draws the means over seeds. {RESUME}",
    )
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the table")
    add("--rows", **flags.ROWS, help="only these; default: all")
    for norm in flags.NORMS:
        words = "in 1/255; default: 8 radii up to twice the table's largest"
        add(f"--{norm}", **flags.radii(norm), help=words)
    add("--num-steps", **flags.COUNT, help="of PGD; default: 20")
    add("--loss", **flags.LOSS, help="default: cross_entropy")
    add("--num-examples", **flags.COUNT, help="images, evenly spaced; default: 256")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Measures and draws as a command line says; returns the exit code.

    Runs that `curves.json` holds under the same settings are not measured again, so a
    rerun resumes where the command was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      InterruptedRunError: if it was asked to stop.
    """
    from samrobust.attacks import ATTACKS_VERSION
    from samrobust.cli import shared
    from samrobust.data import fingerprint
    from samrobust.evaluation.diagnostics import some_of
    from samrobust.experiments import building, curves, networks, scoring
    from samrobust.experiments.reporting.pictures import write_figure
    from samrobust.experiments.reporting.progress import ProgressDisplay
    from samrobust.experiments.workdir import finished_runs
    from samrobust.system.distributed import broadcast_from_primary
    from samrobust.system.files import check_writable, write_sealed
    from samrobust.system.provenance import provenance

    should_stop, console = shared.join(stop)
    workdir = arguments.workdir
    configs = broadcast_from_primary(
        lambda: finished_runs(workdir, arguments.rows or ())
    )
    first = next(iter(configs.values()))
    settings = _settings(first, arguments)
    as_json = json.loads(json.dumps(dataclasses.asdict(settings)))
    broadcast_from_primary(lambda: check_writable(workdir))
    stored = broadcast_from_primary(
        lambda: shared.stored_runs(workdir / "curves.json", as_json)
    )
    load_data = shared.once_per(building.load_data, "data")

    def make_evaluator(config: "Config") -> "Evaluator":
        model = building.make_model(config, load_data(config))
        size = config.evaluation.batch_size
        return curves.make_curve_evaluator(model, settings, batch_size=size)

    evaluator = shared.once_per(make_evaluator, "data", "model", "evaluation")

    def write(**found: Any) -> None:
        content = {"settings": as_json, "runs": stored, **found}
        broadcast_from_primary(lambda: write_sealed(workdir / "curves.json", content))

    works = {path: float(path not in stored) for path in configs}
    display = ProgressDisplay(console, sum(works.values()))
    with display.live():
        for path, config in configs.items():
            shown = display.run(f"{config.label}, seed {config.seed}", 0.0, works[path])
            dataset, which = load_data(config), networks.checkpoints_of(config)[0]
            network = networks.load_network(config, dataset, workdir / path, which)
            split = scoring.evaluated_split(config, dataset)
            split = some_of(split, settings.num_examples)
            measured = {
                "identity": network.identity.hash,
                "step": network.step,
                "images": fingerprint(split),
                "num_images": len(split),
                "attacks_version": ATTACKS_VERSION,
            }
            if stored.get(path, {}).items() >= measured.items():
                continue
            found = curves.measure_run(
                *(evaluator(config), network.variables, split, settings),
                key=scoring.evaluation_key(config),
                on_batch=scoring.until_stopped(shown.on_batch, should_stop, "in a run"),
            )
            stored[path] = {**found, **measured, "provenance": provenance()}
            write()
    runs = [(c.row, c.label, stored[path]) for path, c in configs.items()]
    lines = curves.curves_of(runs, settings)
    title = (
        f"{first.data.name}: accuracy under PGD-{settings.num_steps} "
        f"({settings.loss.replace('_', ' ')}, any iterate), "
        f"{next(iter(stored.values()))['num_images']} {first.evaluation.split} images"
    )
    write(title=title, curves=[dataclasses.asdict(line) for line in lines])
    pictures = broadcast_from_primary(
        lambda: write_figure(curves.draw_curves(lines, title), workdir, "curves")
    )
    shared.show_written(console, workdir, ["curves.json", *pictures])
    return 0


def _settings(config: "Config", arguments: argparse.Namespace) -> "CurveSettings":
    """Returns how to measure; by default up to twice the table's largest radius."""
    import numpy as np

    from samrobust.experiments.curves import CurveSettings

    grids = {}
    for norm in flags.NORMS:
        given = getattr(arguments, norm)
        largest = max(config.evaluation[norm], default=0.0)
        if given is not None:
            grids[norm] = given
        elif largest:
            grid = np.linspace(0, min(2 * largest, 255.0), _POINTS + 1)[1:]
            grids[norm] = tuple(float(f"{radius:.4g}") for radius in grid)
    return flags.build(CurveSettings, arguments, radii=grids)
