"""A bench for people: tables for the terminal and Markdown, a picture, JSON."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from samrobust.experiments.reporting.pictures import write_figure
from samrobust.studies.bench.picture import draw
from samrobust.studies.bench.results import Report, Row
from samrobust.system.files import write_json, write_text

__all__ = ["to_markdown", "to_rich", "write_report"]

Column = tuple[str, Callable[[Row], str]]


def write_report(report: Report, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Writes bench.json, bench.md and bench.png, and makes the folder if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "bench.json", folder / "bench.md"
    write_json(paths[0], report.to_json())
    write_text(paths[1], to_markdown(report))
    if not any(row["kind"] == "step" for row in report.rows):
        return paths
    return (*paths, *write_figure(draw(report), folder, "bench", ("png",)))


def to_rich(report: Report) -> Group:
    """The tables and notes of a bench for a Rich console."""
    parts: list[Any] = []
    for title, header, rows in _tables(report):
        grid = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title=title)
        grid.padding = (0, 1, 0, 0)
        grid.title_justify, grid.title_style = "left", "bold"
        for i, name in enumerate(header):
            side = "left" if i == 0 else "right"
            grid.add_column(name, justify=side, no_wrap=True)
        for row in rows:
            grid.add_row(*row)
        parts += [grid, Text()]
    return Group(*parts, Text("\n".join(_notes(report)), style="dim"))


def to_markdown(report: Report) -> str:
    """The same in Markdown."""
    lines = []
    for title, header, rows in _tables(report):
        lines += [f"**{title}**", ""]
        lines.append("| " + " | ".join(header) + " |")
        lines.append("| :--- |" + " ---: |" * (len(header) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += [line for note in _notes(report) for line in (note, "")]
    return "\n".join(lines).rstrip() + "\n"


def _tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, cells) of every table that has rows."""
    rows = report.rows
    own = [row for row in rows if row["kind"] in ("step", "epoch", "unrolled")]
    unrolled = [row for row in rows if row["kind"] == "unrolled"]
    torch = [row for row in rows if row["kind"] == "pytorch"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    tables = [
        ("Speed", [*_settings(own), *_SPEED], own),
        ("Cost relative to ST, and compilation", [*_settings(own), *_COST], own),
        ("Epoch", [*_settings(own), *_EPOCH], [r for r in own if r["kind"] == "epoch"]),
        (
            "Evaluation: clean and all attacks of the config, the whole test set",
            [*_settings(evaluations), *_EVALUATION],
            evaluations,
        ),
        (
            "The attack's loop written out, step by step",
            [*_settings(unrolled), *_UNROLLED],
            unrolled,
        ),
        ("PyTorch, same weights and batches", [*_settings(torch), *_TORCH], torch),
    ]
    return [
        (
            title,
            [name for name, _ in columns],
            [[f(r) for _, f in columns] for r in rows],
        )
        for title, columns, rows in tables
        if rows
    ]


def _settings(rows: Sequence[Row]) -> list[Column]:
    """The name of a row, then what is not the same in all rows."""

    def name(row: Row) -> str:
        if row["kind"] == "pytorch":
            return f"{row['method']} {row['variant']}"
        return f"{row['method']} {row['kind']}".strip()

    columns: list[Column] = [("row", name), ("batch", lambda r: str(r["batch_size"]))]
    for field, title in (
        ("precision", "precision"),
        ("devices", "devices"),
        ("steps_per_call", "steps a call"),
        ("xla_flags", "XLA flags"),
    ):
        if len({row[field] for row in rows}) > 1:
            columns.append(
                (title, lambda row, field=field: str(row[field] or "default"))
            )
    return columns


def _number(field: str, form: str, factor: float = 1.0) -> Callable[[Row], str]:
    """A field of a row as text, or a dash."""

    def text(row: Row) -> str:
        value = row.get(field)
        return "-" if value is None else format(factor * value, form)

    return text


def _milliseconds(row: Row) -> str:
    median, iqr = 1e3 * row["step_seconds"], 1e3 * row["step_iqr"]
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ±{iqr:.{digits}f}"


def _ratio(row: Row) -> str:
    if "ratio" not in row:
        return "-"
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


_SPEED: list[Column] = [
    ("ms a step", _milliseconds),
    ("images/s", _number("images_per_second", ",.0f")),
    ("TFLOP/s", _number("tflops", ".3g")),
    ("% matmul", _number("matmul_fraction", ".0f", 100)),
    ("% copy", _number("copy_fraction", ".0f", 100)),
    ("GB", _number("peak_memory", ".2f", 1e-9)),
]
_COST: list[Column] = [
    ("cost", _number("cost", ".2f")),
    ("by FLOPs", _number("flop_cost", ".2f")),
    ("the paper", _number("paper_cost", ".0f")),
    ("compile s", _number("compile_cold", ".1f")),
    ("cached", _number("compile_cached", ".1f")),
]
_EPOCH: list[Column] = [
    ("s an epoch", _number("epoch_seconds", ",.1f")),
    ("pipeline %", _number("pipeline_share", ".2f", 100)),
    ("checkpoint s", _number("checkpoint_seconds", ".3f")),
]
_UNROLLED: list[Column] = [
    ("ms a step", _milliseconds),
    ("its time / the loop's", _ratio),
    ("compile s", _number("compile_cold", ".1f")),
]
_EVALUATION: list[Column] = [
    ("images", _number("num_test", ",.0f")),
    ("seconds", _number("test_set_seconds", ",.1f")),
    ("in ST epochs", _number("st_epochs", ".2f")),
]
_TORCH: list[Column] = [
    ("ms a step", _milliseconds),
    ("images/s", _number("images_per_second", ",.0f")),
    ("GB", _number("peak_memory", ".2f", 1e-9)),
    ("its time / ours", _ratio),
]


def _notes(report: Report) -> list[str]:
    """How to read the tables, one sentence or two a line."""
    notes = [
        "ms a step: median ± interquartile range over all repeats of all processes. "
        "TFLOP/s by XLA's counts of a pass; % matmul and % copy are fractions of "
        "what a large matrix product, and a copy through memory, reach here:"
    ]
    for precision, ceiling in report.ceilings.items():
        notes.append(
            f"{precision}: matmul {ceiling['matmul'] / 1e12:.3g} TFLOP/s, "
            f"copy {ceiling['copy'] / 1e9:.3g} GB/s."
        )
    notes.append(
        "cost: time of a step relative to ST; 'by FLOPs' counts input gradients alone "
        "in the attack; 'the paper' is its claim (SAM +1x, AT with 10 steps +10x)."
    )
    projection = report.projection
    if projection:
        what = "Tables 1 and 2" if projection["tables"] == 2 else "the table"
        notes.append(
            f"Projected for {what}, {projection['models']} models: "
            f"{projection['hours']:,.1f} hours."
        )
    if any(row["kind"] == "pytorch" for row in report.rows):
        notes.append(
            "PyTorch: reference as the paper's code runs (weight gradients in the "
            "attack, batches from the host, metrics read at every step); resident "
            "with the data on the device; tuned with channels_last, input gradients "
            "alone, fused SGD, and on CUDA torch.compile; compiled with torch.compile "
            "on the CPU too, and on CUDA a step replayed as one graph. Ratios round by "
            "round, in the row's precision: median (lowest to highest)."
        )
    provenance = report.provenance
    if provenance:
        notes.append(
            f"{provenance.get('device')}, {provenance.get('num_devices')} device(s), "
            f"jax {provenance.get('jax')}, commit {provenance.get('commit')}, "
            f"{provenance.get('date')}."
        )
    notes += [f"failed: {name}: {complaint}" for name, complaint in report.failures]
    return notes
