"""`samrobust curves`: measures all finished runs of a table, draws, writes."""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from samrobust.checks import NORMS
from samrobust.cli import flags

if TYPE_CHECKING:
    from samrobust.experiments.curves import CurveSettings
    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]

_POINTS = 8  # of a curve, beside radius 0


ABOUT = {
    "help": "accuracy against the attack's radius, all methods of a table in one plot",
    "description": "Attacks every finished run of a table at a grid of radii (PGD, "
    f"any iterate counts) and draws the means over seeds. {flags.SHARED}",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the table")
    add("--rows", **flags.ROWS, help="only these; default: all")
    for norm in NORMS:
        words = "in 1/255; default: 8 radii up to twice the table's largest"
        add(f"--{norm}", **flags.radii(norm), help=words)
    add("--num-steps", **flags.COUNT, help="of PGD; default: 20")
    add("--loss", **flags.LOSS, help="default: cross_entropy")
    add("--num-examples", **flags.COUNT, help="images, evenly spread; default: 256")


def run(arguments: argparse.Namespace, stop: Callable[[], bool]) -> int:
    """Measures and draws as a command line says; returns the exit code.

    Runs that `curves.json` holds under the same settings are not measured again, so a
    rerun resumes where the command was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      CheckpointError: if no run has a network that can be read.
      InterruptedRunError: if it was asked to stop.
    """
    from samrobust.cli.measuring import Measure, RunMeasurements
    from samrobust.data import Dataset, fingerprint
    from samrobust.evaluation.diagnostics import some_of
    from samrobust.experiments import building, curves, scoring
    from samrobust.experiments.networks import checkpoints_of
    from samrobust.experiments.reporting.pictures import write_figure

    measurements = RunMeasurements(arguments, stop, "curves", _settings)
    settings: CurveSettings = measurements.settings
    evaluator = measurements.once(curves.make_curve_evaluator)

    def prepare(config: "Config", dataset: Dataset) -> tuple[dict[str, Any], Measure]:
        building.check_l2(dataset, "--l2", settings.radii.get("l2", ()))
        split = scoring.evaluated_split(config, dataset)
        split = some_of(split, settings.num_examples)

        def measure(variables: Any, on_batch: Any) -> dict[str, Any]:
            return curves.measure_run(
                *(evaluator(config), variables, split, settings),
                key=scoring.evaluation_key(config),
                on_batch=on_batch,
            )

        return {"images": fingerprint(split), "num_images": len(split)}, measure

    measurements.measure(prepare)
    runs = [
        (c.row, c.label, measurements.runs[path])
        for path, c in measurements.configs.items()
    ]
    lines = curves.curves_of(runs, settings)
    title = (
        f"{measurements.first.data.name}: accuracy under PGD-{settings.num_steps} "
        f"({settings.loss.replace('_', ' ')}, any iterate), "
        f"{runs[0][2]['num_images']} {measurements.first.evaluation.split} images, "
        f"{checkpoints_of(measurements.first)[0]} checkpoint"
    )

    def draw() -> tuple[pathlib.Path, ...]:
        figure = curves.draw_curves(lines, title)
        return write_figure(figure, measurements.workdir, "curves")

    found = [dataclasses.asdict(line) for line in lines]
    measurements.conclude(draw, title=title, curves=found)
    return measurements.exit_code


def _settings(config: "Config", arguments: argparse.Namespace) -> "CurveSettings":
    """Returns how to measure; by default up to twice the table's largest radius."""
    import numpy as np

    from samrobust.experiments import building
    from samrobust.experiments.curves import CurveSettings

    facts = building.load_facts_or_data(config)
    grids = {}
    for norm in NORMS:
        given = getattr(arguments, norm)
        largest = max(config.evaluation[norm], default=0.0)
        if given:
            grids[norm] = given
        elif given is None and largest:
            most = min(2 * largest, building.largest_radius(facts, norm))
            grid = np.linspace(0, most, _POINTS + 1)[1:]
            grids[norm] = tuple(min(float(f"{radius:.4g}"), most) for radius in grid)
    return flags.build(CurveSettings, arguments, radii=grids)
