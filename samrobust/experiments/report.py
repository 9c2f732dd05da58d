"""The report of a folder: all that was measured there, on one page.

Every number comes from the file that its command wrote, and stands beside the identity
of what made it. What is not there is left out, and named with the command that makes
it. A folder is a table's or a run's.
"""

import dataclasses
import html
import json
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from samrobust import __version__
from samrobust.checks import check
from samrobust.evaluation.diagnostics.finding import Finding, to_sheet
from samrobust.experiments.curves import Curve, draw_curves
from samrobust.experiments.reporting import pictures
from samrobust.experiments.reporting.names import attack_in_words, checkpoint_in_words
from samrobust.experiments.reporting.page import picture, render_page
from samrobust.experiments.reporting.render import from_json, to_html, write_pictures
from samrobust.experiments.reporting.results import makers
from samrobust.experiments.survey import read_plan
from samrobust.experiments.workdir import read_evaluations, read_log, run_folder
from samrobust.system import files
from samrobust.system.tables import Sheet, TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_training", "write_report"]

_T = TypeVar("_T")
# What reading a file may raise that is no table.
_UNFIT = (ValueError, KeyError, TypeError, AttributeError, files.WorkdirError)
_UNKNOWN = "not recorded"
_PANELS = {  # of a line in `metrics.jsonl`
    "loss": "loss of training",
    "accuracy": "accuracy on what it trains on, %",
    "validation_natural": "held-out natural, %",
    "validation_robust": "held-out robust, %",
}
_WIDTH = 2.6  # inches, of a panel
_Lines: TypeAlias = Sequence[Mapping[str, Any]]
_VERSIONS = ("samrobust", "jax", "jaxlib", "flax", "optax", "python")


def write_report(workdir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Writes `report.html`, and draws the pictures of the folder again.

    Args:
      workdir: of a table or of a run.

    Returns:
      The page and the pictures.

    Raises:
      ValueError: if nothing was measured there.
      WorkdirError: if it cannot be written.
    """
    if workdir.exists():
        files.check_writable(workdir)
    report = _Report(workdir)
    sections, missing = {}, []
    for title, command, name, find in report.parts():
        path = workdir / name
        try:
            if content := find(title, path):
                sections[title] = content
            else:
                missing.append(f"{title} (samrobust {command})")
        except _UNFIT as error:
            reason = f"Expected what `samrobust {command}` writes in {path}, got"
            report.refused.append(f"{reason} {type(error).__name__}: {error}.")
    fix = "Run `samrobust table` or `samrobust train` with it first."
    fix = " ".join(report.refused) or fix
    wanted = "a workdir of a table or a run with results"
    check(bool(sections), wanted, fix, workdir=str(workdir))
    path = workdir / "report.html"
    files.write_text(path, report.render(sections, missing))
    return (path, *report.pictures)


@dataclasses.dataclass
class _Report:
    """Report in the making.

    Attributes:
      workdir: see `write_report`.
      pictures: files that were drawn.
      refused: what is there and cannot be trusted, a sentence each.
      measured: what a measurement was of, which run, its fields.
    """

    workdir: pathlib.Path
    pictures: list[pathlib.Path] = dataclasses.field(default_factory=list)
    refused: list[str] = dataclasses.field(default_factory=list)
    measured: list[tuple[str, str, Mapping[str, Any]]] = dataclasses.field(
        default_factory=list
    )

    def parts(self) -> list[tuple[str, str, str, Callable[..., str]]]:
        """Returns what a report can have, in order.

        Returns:
          Of each part the title, the command that measures it, its file, and what makes
          HTML of title and path, empty where it is not there.
        """
        own = [("Accuracy", "train", "config.json", self.result)]
        if not (self.workdir / "config.json").exists():
            title = "Natural and robust accuracy"
            own = [
                (title, "table", "table.json", self.table),
                ("AutoAttack", "recheck", "autoattack.json", self.table),
                ("Robustness curves", "curves", "curves.json", self.curves),
                ("Flatness", "sharpness", "sharpness.json", self.flatness),
            ]
        sanity = "Signs of gradient masking", "evaluate --sanity", "", self.sanity
        return [*own, ("Training", "train", "", self.training), sanity]

    def render(self, sections: Mapping[str, str], missing: Sequence[str]) -> str:
        """Returns the page."""
        config = files.glance(self.workdir / "config.json")
        label = f"{config.get('label')}, seed {config.get('seed')}"
        name = label if config else self.workdir.resolve().name
        notes = [
            f"Written by samrobust {__version__} from the files of this folder. "
            "Accuracies are percentages; the last section names the runs, by which "
            "command and on which hardware they were measured.",
            *([f"Not measured here: {'; '.join(missing)}."] if missing else []),
            *(f"Left out: {reason}" for reason in self.refused),
        ]
        sections = {**sections, "Provenance": _provenance(self.measured)}
        return render_page(f"Report: {name}", notes, sections)

    def table(self, title: str, path: pathlib.Path) -> str:
        """Returns what `table` or `recheck` found."""
        if not path.exists():
            return ""
        table = from_json(path.read_text(encoding="utf-8"))
        drawn = write_pictures(table, self.workdir, path.stem)
        labels = {row.name: row.label for row in table.rows}
        for run in table.runs:
            self._measured(title, f"{labels[run['row']]}, seed {run['seed']}", run)
        self.pictures += drawn
        alts = (table.title, f"{table.title}, against the cost of training")
        shown = [picture(*pair) for pair in zip(drawn, alts, strict=False)]
        return "\n".join([to_html(table), *shown])

    def curves(self, title: str, path: pathlib.Path) -> str:
        """Returns what `curves` found."""
        content = self._trusted(files.read_sealed, path)
        if content is None or "curves" not in content:  # not all runs are measured yet
            return ""
        curves = [Curve(**curve) for curve in content["curves"]]
        self._all_measured(title, content)
        said = content.get("title", "Accuracy against the radius")
        tables = [
            TextTable(
                ("radius in 1/255", *(f"{radius:g}" for radius in own[0].radii)),
                [(c.label, *(f"{mean:.1f}" for mean in c.mean)) for c in own],
                title=norm,
            )
            for norm in dict.fromkeys(curve.norm for curve in curves)
            if (own := [curve for curve in curves if curve.norm == norm])
        ]
        numbers = _folded("The means", Sheet(tables, []).to_html())
        return f"{self._drawn(draw_curves(curves, said), 'curves', said)}\n{numbers}"

    def flatness(self, title: str, path: pathlib.Path) -> str:
        """Returns what `sharpness` found, as it was drawn and written then."""
        content = self._trusted(files.read_sealed, path)
        drawn, text = (path.with_suffix(suffix) for suffix in (".png", ".md"))
        is_whole = drawn.exists() and text.exists()
        if content is None or "correlations" not in content or not is_whole:
            return ""
        for name, written in content.get("files", {}).items():
            if files.digest(self.workdir / name) != written:
                told = f"{name} is of another conclusion than {path.name}. Run "
                self.refused.append(f"{told}`samrobust sharpness` again.")
                return ""
        self._all_measured(title, content)
        numbers = html.escape(text.read_text(encoding="utf-8"))
        alt = f"accuracy at {content['column']} against what may explain it"
        folded = _folded("The numbers", f"<pre>{numbers}</pre>")
        return f"{picture(drawn, alt)}\n{folded}"

    def result(self, title: str, path: pathlib.Path) -> str:
        """Returns the accuracies of a run, by all of its evaluations."""
        result = self._trusted(files.read_sealed, path.with_name("result.json"))
        config = self._trusted(files.read_object, path)
        lines = self._trusted(read_evaluations, self.workdir) or []
        found = [line for line in (result, *lines) if line]
        if not found or config is None:
            return ""
        columns = list(dict.fromkeys(c for line in found for c in line["accuracy"]))
        told = [_circumstances(config, line) for line in found]
        rows = []
        for line, (name, judged, precision, split) in zip(found, told, strict=True):
            self._measured(title, f"{config.get('label')}, {name}", line)
            accuracy, images = line["accuracy"], f"{line['num_test']:,} {split}"
            cells = (f"{accuracy[c]:.2f}" if c in accuracy else "-" for c in columns)
            rows.append((name, judged, precision, images, *cells))
        header = ("attack", "network", "precision", "images", *columns)
        shown = TextTable(header, rows, words=4).to_html()
        text = html.escape(json.dumps(config, indent=2))
        return f"{shown}\n{_folded('The config', f'<pre>{text}</pre>')}"

    def training(self, title: str, table: pathlib.Path) -> str:
        """Returns loss and accuracy by epoch, of runs that have a result."""
        runs: dict[str, tuple[str, list]] = {}
        for folder, name in self._runs():
            result = self._trusted(files.read_sealed, folder / "result.json")
            lines = self._trusted(read_log, folder) or []
            if not result:
                continue
            row, seed = result["row"], result["seed"]
            # A copy would count as another seed.
            if folder not in (table, run_folder(table, row, seed)):
                told = f"{name}, which is not of the row and seed of its folder."
                self.refused.append(told)
            elif lines:
                label, own = runs.setdefault(row, (result["label"], []))
                own.append(lines)
                self._measured(title, f"{label}, seed {seed}", result)
        if not runs:
            return ""
        said = "loss and accuracy by epoch"
        return self._drawn(draw_training(runs), "training", said)

    def sanity(self, title: str, _: pathlib.Path) -> str:
        """Returns the signs of gradient masking that were looked for."""
        parts = []
        for folder, name in self._runs():
            content = self._trusted(files.read_sealed, folder / "sanity.json")
            if content:
                said = name or "this run"
                self._measured(title, said, content)
                findings = [Finding.from_dict(found) for found in content["findings"]]
                sheet = to_sheet(findings, f"{content['num_examples']} images.")
                parts.append(f"<h3>{html.escape(said)}</h3>\n{sheet.to_html()}")
        return "\n".join(parts)

    def _runs(self) -> Iterator[tuple[pathlib.Path, str]]:
        """Yields the folders of the runs in order, and names; a lone run has none."""
        paths = [self.workdir / "config.json"]
        paths += (
            self.workdir / name / "config.json" for name in read_plan(self.workdir)
        )
        paths += sorted(self.workdir.glob("*/seed*/config.json"))
        for path in dict.fromkeys(path for path in paths if path.exists()):
            name = path.parent.relative_to(self.workdir).as_posix()
            yield path.parent, name.removeprefix(".")

    def _drawn(self, figure: "Figure", name: str, alt: str) -> str:
        """Draws a picture in the folder, and returns it as a part of the page."""
        self.pictures += pictures.write_figure(figure, self.workdir, name, ("png",))
        return picture(self.pictures[-1], alt)

    def _all_measured(self, what: str, content: Mapping[str, Any]) -> None:
        """Notes the runs that a conclusion is of; others may be measured too."""
        runs = content["runs"]
        for path in content.get("concluded", runs):
            self._measured(what, path, runs[path])

    def _measured(self, what: str, run: str, fields: Mapping[str, Any]) -> None:
        for column, made in makers(fields).items():
            named = f"{what}, {column}" if column else what
            self.measured.append((named, run, {**fields, "provenance": made}))

    def _trusted(
        self, read: Callable[[pathlib.Path], _T], path: pathlib.Path
    ) -> _T | None:
        """Returns what is read there; None where it cannot be trusted."""
        try:
            return read(path)
        except files.WorkdirError as error:
            if str(error) not in self.refused:
                self.refused.append(str(error))
            return None


def _circumstances(
    config: Mapping[str, Any], line: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    """Returns the attack, network, precision and split of an evaluation of a run."""
    evaluation = config["evaluation"] | line.get("evaluation", {})
    name = attack_in_words(evaluation)
    if line.get("seed", config["seed"]) != config["seed"]:
        name = f"{name}, seed {line['seed']}"
    judged = f"{checkpoint_in_words(evaluation)}, step {line.get('step')}"
    precision = line.get("dtype", config["model"]["dtype"])
    return name, judged, precision, evaluation["split"]


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _provenance(measured: Sequence[tuple[str, str, Mapping[str, Any]]]) -> str:
    """Returns which run each number is of, and how and on what it was measured."""

    def told(of: Mapping[str, Any], name: str) -> str:
        return str(of.get(name) or _UNKNOWN)

    ways: dict[tuple[str, ...], int] = {}
    runs = []
    for what, run, fields in measured:
        made = fields.get("provenance") or {}
        versions = ", ".join(f"{n} {made[n]}" for n in _VERSIONS if n in made)
        flags = [f"{n}={value}" for n, value in (made.get("flags") or {}).items()]
        versions = ", ".join([*filter(None, [versions]), *flags])
        device = f"{made.get('num_devices', 1)} x {made.get('device', _UNKNOWN)}"
        commit, command = told(made, "commit"), told(made, "command")
        way = (command, commit, device, versions or _UNKNOWN)
        number = ways.setdefault(way, len(ways) + 1)
        identity, step = told(fields, "identity"), told(fields, "step")
        runs.append((what, run, identity, step, f"[{number}]", told(made, "date")))
    header = ("", "command", "commit", "hardware", "versions")
    how = [(f"[{number}]", *way) for way, number in ways.items()]
    listed = ("what", "run", "identity", "step", "how", "when")
    tables = [TextTable(header, how, words=5), TextTable(listed, runs, words=6)]
    note = (
        "An identity names a run by its config, its data and the libraries that it was "
        "begun with; the step is that of the network."
    )
    return Sheet(tables, [note]).to_html()


def draw_training(runs: Mapping[str, tuple[str, Sequence[_Lines]]]) -> "Figure":
    """Draws the epochs of finished runs, means over seeds.

    Args:
      runs: by row, its label and the lines of `metrics.jsonl` of each of its runs.
    """
    known = {
        key for _, own in runs.values() for lines in own for x in lines for key in x
    }
    shown = [key for key in _PANELS if key in known]
    size = (max(6.0, 0.6 + _WIDTH * len(shown)), 2.9 + 0.07 * len(runs))
    figure, panels = pictures.make_panels(
        len(shown), size, "Training, by epoch", 75, sharey=False
    )
    looks = pictures.row_looks(runs)
    for panel, key in zip(panels, shown, strict=True):
        for row, (label, own) in runs.items():
            look: dict[str, Any] = looks[row] | {"marker": ""}
            means = _means(own, key)
            panel.plot(*means, **look, label=pictures.in_symbols(label))
        panel.set_title(_PANELS[key], fontsize=pictures.TEXT)
        panel.tick_params(labelsize=pictures.SMALL, length=2)
        panel.grid(axis="y", color=pictures.PALE, linewidth=0.6)
        panel.locator_params(axis="x", integer=True)
    said = pictures.over_seeds("mean", (len(own) for _, own in runs.values()))
    said += "; adversarial training trains on attacked images"
    columns = 4 if len(shown) > 2 else 3
    pictures.add_legend(figure, panels[0].get_lines(), said, columns=columns)
    return figure


def _means(runs: Sequence[_Lines], key: str) -> tuple[list[int], list[float]]:
    """Returns the epochs that all runs of a row have, and the means of a number."""
    values = [{x["epoch"]: x[key] for x in lines if key in x} for lines in runs]
    epochs = sorted(set.intersection(*(set(own) for own in values)))
    return epochs, [statistics.fmean(own[epoch] for own in values) for epoch in epochs]
