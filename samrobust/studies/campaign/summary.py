"""What a campaign found, for people; and all that is small in one file."""

import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.studies.campaign.blocks import Block
from samrobust.system.files import glance

__all__ = ["write_archive", "write_summary"]

# Columns: field of a row, factor and form.
_NUMBERS = {
    "ms": ("step_seconds", 1e3, ".3f"),
    "images/s": ("images_per_second", 1, ",.0f"),
    "cost": ("cost", 1, ".2f"),
    "its time / ours": ("ratio", 1, ".2f"),
    "% matmul": ("matmul_fraction", 100, ".1f"),
    "compile s": ("compile_cold", 1, ".1f"),
    "cached": ("compile_cached", 1, ".1f"),
}
_LARGEST = 4 * 2**20  # bytes of a file that is carried


def write_summary(blocks: Sequence[Block], workdir: pathlib.Path) -> pathlib.Path:
    """Writes summary.md: what became of each block, and its numbers."""
    lines = _head("Blocks", "block", "status", "seconds", "message")
    for block in blocks:
        outcome = glance(workdir / "blocks" / f"{block.name}.json")
        told = (outcome.get(n, "-") for n in ("status", "seconds", "message"))
        lines.append(_line(block.name, *told))
    machine = glance(workdir / "machine" / "machine.json")
    for precision in ("bfloat16", "float32"):
        if ceiling := machine.get(precision):
            matmul, copy = ceiling["matmul"] / 1e12, ceiling["copy"] / 1e9
            text = f"{precision}: matmul {matmul:.3g} TFLOP/s, copy {copy:.3g} GB/s."
            lines += ["", text]
    lines += _head("Steps", "block", "row", "flags", *_NUMBERS)
    for block in blocks:
        report = glance(workdir / block.name / "bench.json")
        lines += [_step(block.name, row) for row in report.get("rows", [])]
        lines += [
            _line(block.name, f"failed: {name}: {complaint}", *[""] * 8)
            for name, complaint in report.get("failures", [])
        ]
    lines += _head("Epochs", "run", "ms a step", "images/s", "bits at the end")
    for block in blocks:
        for path in sorted((workdir / block.name).glob("*.json")):
            if "digest" in (found := glance(path)):
                numbers = 1e3 * found["step_seconds"], found["images_per_second"]
                shown = f"{numbers[0]:.3f}", f"{numbers[1]:,.0f}"
                name = f"{block.name}/{path.stem}"
                lines.append(_line(name, *shown, found["digest"]))
    for path in sorted(workdir.glob("rows/*/table.md")):
        lines += ["", f"# {path.parent.name}", "", path.read_text(encoding="utf-8")]
    path = workdir / "summary.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_archive(workdir: pathlib.Path, file: pathlib.Path) -> None:
    """Packs all that is small into one file: results, logs, XLA's autotuning."""
    temporary = file.with_name(f".{file.name}.tmp")
    with tarfile.open(temporary, "w:gz") as archive:
        for path in sorted(workdir.rglob("*")):
            name = path.relative_to(workdir).as_posix()
            small = path.is_file() and path.stat().st_size <= _LARGEST
            if small and path not in (file, temporary) and _is_carried(name):
                archive.add(path, name)
    temporary.replace(file)


def _is_carried(name: str) -> bool:
    parts = name.split("/")
    if parts[0] == "cache":
        return "autotune" in name
    return not set(parts) & {"site", "data", "checkpoints", "traces"}


def _step(block: str, row: Mapping[str, Any]) -> str:
    several = f"{row['seeds']} seeds" if row.get("seeds", 1) > 1 else ""
    name = " ".join(filter(None, (row["method"], row["kind"], row["variant"], several)))
    shown = (
        f"{factor * row[field]:{form}}" if field in row else ""
        for field, factor, form in _NUMBERS.values()
    )
    return _line(block, name, row["xla_flags"], *shown)


def _head(title: str, *columns: str) -> list[str]:
    return ["", f"# {title}", "", _line(*columns), _line(*["---"] * len(columns))]


def _line(*cells: object) -> str:
    texts = (str(cell).replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
