"""What a campaign found, for people; and all that is small in one file."""

import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.studies.campaign.blocks import Block

__all__ = ["write_archive", "write_summary"]

_LARGEST = 4 * 2**20  # bytes of a file that is carried


def write_summary(blocks: Sequence[Block], workdir: pathlib.Path) -> pathlib.Path:
    """Writes summary.md: what became of each block, and its numbers."""
    lines = _head("Blocks", "block", "status", "seconds", "message")
    for block in blocks:
        outcome = _read(workdir / "blocks" / f"{block.name}.json")
        told = (outcome.get(n, "-") for n in ("status", "seconds", "message"))
        lines.append(_line(block.name, *told))
    lines += _head("Steps", "block", "row", "flags", "ms", "images/s", "cost", "ratio")
    for block in blocks:
        report = _read(workdir / block.name / "bench.json")
        lines += [_step(block.name, row) for row in report.get("rows", [])]
        lines += [
            _line(block.name, f"failed: {name}: {complaint}", *[""] * 5)
            for name, complaint in report.get("failures", [])
        ]
    lines += _head("Epochs", "run", "ms a step", "images/s", "bits")
    for block in blocks:
        for path in sorted((workdir / block.name).glob("*.json")):
            if "digest" in (found := _read(path)):
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
    name = " ".join(filter(None, (row["method"], row["kind"], row["variant"])))
    time, rate = 1e3 * row["step_seconds"], row["images_per_second"]
    relative = (f"{row[n]:.2f}" if n in row else "" for n in ("cost", "ratio"))
    return _line(
        block, name, row["xla_flags"], f"{time:.3f}", f"{rate:,.0f}", *relative
    )


def _head(title: str, *columns: str) -> list[str]:
    return ["", f"# {title}", "", _line(*columns), _line(*["---"] * len(columns))]


def _line(*cells: object) -> str:
    texts = (str(cell).replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
