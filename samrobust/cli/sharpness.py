"""`samrobust sharpness`: does flatness, confidence or margin go with robustness?

Measures all finished runs of a table, and holds what it finds against their accuracy
under attack: PGD's of the table, and AutoAttack's where `samrobust recheck` was run.
"""

import argparse
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from samrobust.checks import NORMS, check
from samrobust.cli import flags

if TYPE_CHECKING:
    from samrobust.studies.sharpness.probe import ProbeSettings
    from samrobust.types import Config

__all__ = ["ABOUT", "add_flags", "run"]

_NAME = "sharpness"  # of the files
_STREAM = 4  # another branch of the evaluation's key


ABOUT = {
    "help": "flatness, confidence and margin of a table's runs, against robustness",
    "description": "Measures sharpness, Hessian, confidence and distance to the "
    "boundary of every finished run of a table, and their rank correlation with "
    f"accuracy under attack. {flags.SHARED}",
    "epilog": "Explained in docs/flatness.md.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--workdir", **flags.WORKDIR, required=True, help="of the table")
    add("--rows", **flags.ROWS, help="only these; default: all")
    column = "to draw, as in 'linf 8/255 AA'; default: the last of l-inf"
    add("--column", **flags.COLUMN, help=column)
    images = "training and test images, evenly spread; default: 256 of each"
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
      CheckpointError: if no run has a network that can be read.
      InterruptedRunError: if it was asked to stop.
    """
    import jax

    from samrobust.cli.measuring import Measure, RunMeasurements
    from samrobust.data import Dataset, fingerprint
    from samrobust.evaluation.diagnostics import some_of
    from samrobust.experiments import scoring
    from samrobust.experiments.reporting.pictures import write_figure
    from samrobust.studies.sharpness import findings
    from samrobust.studies.sharpness.picture import draw_scatter
    from samrobust.studies.sharpness.probe import make_probe
    from samrobust.system.distributed import broadcast_from_primary
    from samrobust.system.files import read_object, unseal, write_text

    measurements = RunMeasurements(arguments, stop, _NAME, _settings)
    settings: ProbeSettings = measurements.settings
    workdir = measurements.workdir
    results = measurements.read_results()

    def accuracies() -> tuple[dict[str, dict[str, float]], list[str]]:
        """Returns those of each run in percent, and how AutoAttack's were measured."""
        file = workdir / "autoattack.json"  # of `samrobust recheck`, if it was run
        with measurements.concluding():
            rechecked = unseal(read_object(file) or {}, file, older=True)
        own = {f: _accuracy(results[f], rechecked) for f in measurements.configs}
        if not any(column.endswith(" AA") for each in own.values() for column in each):
            return own, []
        count, caption = rechecked.get("num_test"), rechecked.get("caption")
        return own, [f"AA: by `samrobust recheck` on {count} images: {caption}"]

    by_run, _ = broadcast_from_primary(accuracies)
    findings.choose_column(by_run.values(), arguments.column)
    probe_of = measurements.once(make_probe)

    def prepare(config: "Config", dataset: Dataset) -> tuple[dict[str, Any], Measure]:
        splits = dataset.train, scoring.evaluated_split(config, dataset)
        train, test = (some_of(split, settings.num_examples) for split in splits)

        def measure(variables: Any, on_batch: Any) -> dict[str, Any]:
            key = jax.random.fold_in(scoring.evaluation_key(config), _STREAM)
            values = probe_of(config)(variables, train, test, key, on_batch=on_batch)
            finite = {n: x if math.isfinite(x) else None for n, x in values.items()}
            return {"values": finite}

        images = {"train_images": fingerprint(train), "test_images": fingerprint(test)}
        return {**images, "num_images": [len(train), len(test)]}, measure

    measurements.measure(prepare)
    by_run, notes = broadcast_from_primary(accuracies)  # as they are by now
    column = findings.choose_column(by_run.values(), arguments.column)
    configs = measurements.configs
    runs = [
        findings.MeasuredRun(
            *(config.row, config.label, config.seed),
            *(measurements.runs[folder]["values"], by_run[folder]),
        )
        for folder, config in configs.items()
    ]
    explained = findings.explain(runs, column)
    about = (explained, settings, measurements.runs[next(iter(configs))]["num_images"])
    to_sheet = functools.partial(findings.to_sheet, *about, notes=notes)
    measurements.console.print(to_sheet(short=True).to_rich())
    column, data = explained.column, measurements.first.data.name
    title = f"{data}: accuracy at {column} against what may explain it"
    title += ", {} training and {} test images, Spearman's r".format(*about[-1])

    def draw() -> list[pathlib.Path]:
        paths = [workdir / f"{_NAME}.{suffix}" for suffix in ("md", "csv")]
        write_text(paths[0], to_sheet().to_markdown())
        write_text(paths[1], findings.to_csv(explained))
        figure = draw_scatter(explained, title)
        return [*paths, *write_figure(figure, workdir, _NAME, ("png",))]

    measurements.conclude(draw, **findings.to_json(explained))
    return measurements.exit_code


def _settings(config: "Config", arguments: argparse.Namespace) -> "ProbeSettings":
    """Returns how to measure; linearity within the smallest ball of the table."""
    from samrobust.studies.sharpness.probe import ProbeSettings

    balls = [(norm, r) for norm in NORMS for r in sorted(config.evaluation[norm])]
    check(
        bool(balls),
        "a table with accuracies under attack",
        linf=config.evaluation.linf,
        l2=config.evaluation.l2,
    )
    norm, radius = balls[0]
    ball = {"linearity_norm": norm, "linearity_radius": radius}
    return flags.build(ProbeSettings, arguments, **ball)


def _accuracy(
    result: Mapping[str, Any], rechecked: Mapping[str, Any]
) -> dict[str, float]:
    """Returns a run's accuracies in percent: its result's, and AutoAttack's.

    Of two checkpoints those of the last, whose network is measured.
    """
    from samrobust.attacks import ATTACKS_VERSION
    from samrobust.experiments.reporting.results import attacks_version

    names = ("row", "seed", "identity", "step", "network")
    own = {name: result[name] for name in names if name in result}
    accuracy = {n: x for n, x in result["accuracy"].items() if not n.endswith(" best")}
    if not any(
        run.items() >= own.items() and attacks_version(run) == ATTACKS_VERSION
        for run in rechecked.get("runs", ())
    ):
        return accuracy
    (row,) = [row for row in rechecked["rows"] if row["name"] == result["row"]]
    number = row["seeds"].index(result["seed"])
    return accuracy | {
        column: cell["values"][number]
        for column, cell in row["cells"].items()
        if column.endswith(" AA")
    }
