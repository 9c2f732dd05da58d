"""A bench for people: tables for the terminal and Markdown, a picture, JSON."""

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

from samrobust.experiments.reporting.pictures import write_figure
from samrobust.studies.bench.picture import draw
from samrobust.studies.bench.results import BenchReport, Row
from samrobust.system.files import write_json, write_text
from samrobust.system.tables import Sheet, TextTable

__all__ = ["to_sheet", "write_report"]

# Cells by the names of their columns.
Columns: TypeAlias = dict[str, Callable[[Row], str]]

_TITLES = {
    "steps_per_call": "steps a call",
    "xla_flags": "XLA flags",
    "seeds": "seeds a program",
}
_OWN = ("step", "unrolled")
_NOTHING = "-"


def write_report(report: BenchReport, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Writes bench.json, bench.md and bench.png, and makes the folder if needed.

    Without Matplotlib there is no picture, and no row is lost for the lack of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "bench.json", folder / "bench.md"
    write_json(paths[0], report._asdict())
    write_text(paths[1], to_sheet(report).to_markdown())
    with contextlib.suppress(ImportError):
        if any(row["kind"] == "step" for row in report.rows):
            return (*paths, *write_figure(draw(report), folder, "bench", ("png",)))
    (folder / "bench.png").unlink(missing_ok=True)  # of another bench
    return paths


def to_sheet(report: BenchReport) -> Sheet:
    """Returns the tables that have rows, of columns that some row fills, and notes."""
    tables = []
    for title, (kinds, columns) in _TABLES.items():
        rows = [row for row in report.rows if row["kind"] in kinds]
        if title == "Epoch":  # of what was measured before, a step may be a bare one
            rows = [row for row in rows if "epoch_seconds" in row]
        filled = {
            name: _COLUMNS[name]
            for name in columns.split(", ")
            if any(_COLUMNS[name](row) != _NOTHING for row in rows)
        }
        shown = _settings(rows) | filled
        cells = [[cell(row) for cell in shown.values()] for row in rows]
        tables += [TextTable(list(shown), cells, title)] if filled else []
    return Sheet(tables, _notes(report))


def _settings(rows: Sequence[Row]) -> Columns:
    """Returns the columns for the name of a row, and for what not all rows share."""
    columns: Columns = {
        "row": lambda r: f"{r['method']} {r['variant'] or r['kind']}".strip(),
        "batch": lambda r: str(r["batch_size"]),
    }
    for field in ("precision", "devices", "steps_per_call", "xla_flags", "seeds"):
        if len({row.get(field) for row in rows}) > 1:
            title = _TITLES.get(field, field)
            columns[title] = lambda row, field=field: str(row.get(field) or "default")
    return columns


def _number(field: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    """Returns what shows a field of a row, or a dash."""
    return lambda row: format(factor * row[field], form) if field in row else _NOTHING


def _milliseconds(row: Row) -> str:
    median, iqr = 1e3 * row["step_seconds"], 1e3 * row["step_iqr"]
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ±{iqr:.{digits}f}"


def _ratio(field: str) -> Callable[[Row], str]:
    """Returns what shows a ratio with its range over the rounds, or a dash."""

    def shown(row: Row) -> str:
        if field not in row:
            return _NOTHING
        ends = (row[f"{field}_{end}"] for end in ("low", "high"))
        return f"{row[field]:.2f} ({' to '.join(f'{end:.2f}' for end in ends)})"

    return shown


_COLUMNS: Columns = {
    "ms a step": _milliseconds,
    "images/s": _number("images_per_second", ",.0f"),
    "TFLOP/s": _number("tflops", ".3g"),
    "% matmul": _number("matmul_fraction", ".0f", 100),
    "% copy": _number("copy_fraction", ".0f", 100),
    "GB": _number("peak_memory", ".2f", 1e-9),
    "cost": _ratio("cost"),
    "by FLOPs": _number("flop_cost", ".2f"),
    "the paper": _number("paper_cost", ".0f"),
    "compile s": _number("compile_cold", ".1f"),
    "cached": _number("compile_cached", ".1f"),
    "s an epoch": _number("epoch_seconds", ",.1f"),
    "pipeline %": _number("pipeline_share", ".2f", 100),
    "checkpoint s": _number("checkpoint_seconds", ".3f"),
    "images": _number("num_test", ",.0f"),
    "seconds": _number("test_set_seconds", ",.1f"),
    "in ST epochs": _number("st_epochs", ".2f"),
    "its time / the loop's": _ratio("ratio"),
    "its time / ours": _ratio("ratio"),
}
# By title: the kinds of rows, and the columns beside those of `_settings`.
_TABLES = {
    "Speed": (_OWN, "ms a step, images/s, TFLOP/s, % matmul, % copy, GB"),
    "Cost relative to ST, and compilation": (
        _OWN,
        "cost, by FLOPs, the paper, compile s, cached",
    ),
    "Epoch": (("step",), "s an epoch, pipeline %, checkpoint s"),
    "Evaluation: clean and all attacks of the config, the whole test set": (
        ("evaluation",),
        "images, seconds, in ST epochs",
    ),
    "The attack's loop unrolled": (
        ("unrolled",),
        "ms a step, its time / the loop's, compile s",
    ),
    "PyTorch, same weights and batches": (
        ("pytorch",),
        "ms a step, images/s, GB, its time / ours",
    ),
}


def _notes(report: BenchReport) -> list[str]:
    """Says how to read the tables, a sentence or two each."""
    notes = [
        "ms a step: median ± interquartile range over all repeats of all processes; "
        "of several seeds a program, the share of one."
    ]
    counted = any("tflops" in row for row in report.rows)
    notes += ["TFLOP/s by XLA's counts of a pass."] if counted else []
    if report.ceilings:
        notes.append(
            "% matmul and % copy are fractions of what a large matrix product, and a "
            "copy through memory, reach here:"
        )
    for precision, ceiling in report.ceilings.items():
        notes.append(
            f"{precision}: matmul {ceiling['matmul'] / 1e12:.3g} TFLOP/s, "
            f"copy {ceiling['copy'] / 1e9:.3g} GB/s."
        )
    told = {
        "cost": "cost: time of a step relative to ST, round by round: median (lowest "
        "to highest)",
        "flop_cost": "'by FLOPs' counts input gradients alone in the attack",
        "paper_cost": "'the paper' is its claim (SAM +1x, AT with 10 steps +10x)",
    }
    shown = [text for n, text in told.items() if any(n in row for row in report.rows)]
    notes += [f"{'; '.join(shown)}."] if shown else []
    if any(row["kind"] == "pytorch" for row in report.rows):
        notes.append(
            "PyTorch: reference as the paper's code runs (weight gradients in the "
            "attack, batches from the host, metrics read at every step); resident "
            "with the data on the device; tuned with channels_last, input gradients "
            "alone, fused SGD, and on CUDA torch.compile; compiled with torch.compile "
            "on the CPU too, and on CUDA a step replayed as one graph; graphed that "
            "without torch.compile, autotuned that in mode max-autotune, pure that "
            "with parameters in bfloat16. None of them draws and augments batches, as "
            "ours do. Ratios round by round, in the row's precision: median (lowest to "
            "highest)."
        )
    if "device" in report.provenance:
        form = "{device}, {num_devices} device(s), jax {jax}, commit {commit}, {date}."
        notes.append(form.format(**report.provenance))
    return notes + [f"failed: {name}: {why}" for name, why in report.failures]
