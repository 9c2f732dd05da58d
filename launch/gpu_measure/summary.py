"""What a campaign found, for people: summary.md."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launch.gpu_measure.blocks import LEFT_OUT, Block
from samrobust.system.files import glance

__all__ = ["origin", "write_summary"]

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


def write_summary(
    blocks: Sequence[Block], workdir: pathlib.Path, left_out: Sequence[str] = ()
) -> pathlib.Path:
    """Writes summary.md: what became of each block, and its numbers.

    Args:
      blocks: of the plan.
      workdir: of the campaign.
      left_out: what the plan has no blocks for, and why.
    """
    lines = _head("Blocks", "block", "status", "seconds", "message")
    for block in blocks:
        outcome = glance(workdir / "blocks" / f"{block.name}.json")
        told = (outcome.get(n, "-") for n in ("status", "seconds", "message"))
        lines.append(_line(block.name, *told))
    lines += _paragraphs(f"Left out: {text}" for text in left_out)
    missing = glance(workdir / "install" / "install.json").get("missing", {})
    lines += _paragraphs(f"Missing: {name}: {why}" for name, why in missing.items())
    machine = glance(workdir / "machine" / "machine.json")
    lines += _paragraphs(_of_machine(machine))
    folders = [
        folder
        for block in blocks
        # Earlier attempts count as well: they may have reached more.
        for folder in (workdir / block.name, *sorted(workdir.glob(f"{block.name}.*")))
    ]
    lines += _paragraphs(_of_others(folders, machine))
    lines += _head("Steps", "block", "row", "flags", *_NUMBERS)
    for folder in folders:
        report = glance(folder / "bench.json")
        lines += [_step(folder.name, row) for row in report.get("rows", [])]
        lines += [
            _line(folder.name, f"failed: {name}: {complaint}", *[""] * 8)
            for name, complaint in report.get("failures", [])
        ]
        for word, why in glance(folder / LEFT_OUT).items():
            lines.append(_line(folder.name, f"left out: {why}", word, *[""] * 7))
    lines += _head("Epochs", "run", "ms a step", "images/s", "bits at the end")
    answers: list[str] = []
    for folder in folders:
        found = {path.stem: glance(path) for path in sorted(folder.glob("*.json"))}
        runs = {name: run for name, run in found.items() if "digest" in run}
        for name, run in runs.items():
            shown = _numbers(run, "ms", "images/s")
            lines.append(_line(f"{folder.name}/{name}", *shown, run["digest"]))
        answers += _same_bits(folder.name, runs)
    lines += _paragraphs(answers)
    for path in sorted(workdir.glob("rows/*/table.md")):
        lines += ["", f"# {path.parent.name}", "", path.read_text(encoding="utf-8")]
    path = workdir / "summary.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _of_machine(machine: Mapping[str, Any]) -> Iterator[str]:
    if "commit" in machine:
        yield f"Measured {origin(machine)}; {machine.get('date')}."
    for precision in ("bfloat16", "float32"):
        if ceiling := machine.get(precision):
            matmul, copy = ceiling["matmul"] / 1e12, ceiling["copy"] / 1e9
            yield f"{precision}: matmul {matmul:.3g} TFLOP/s, copy {copy:.3g} GB/s."
    if complaint := machine.get("target_config"):
        yield f"No target config: {complaint}"


def origin(provenance: Mapping[str, Any]) -> str:
    """Names commit, device and JAX's version of a provenance."""
    commit, device, jax = map(provenance.get, ("commit", "device", "jax"))
    return f"at commit {commit} on {device} with jax {jax}"


def _of_others(
    folders: Iterable[pathlib.Path], machine: Mapping[str, Any]
) -> Iterator[str]:
    """Names what was measured at another commit, elsewhere or with another JAX."""
    for path in (path for one in folders for path in sorted(one.glob("*.json"))):
        found = glance(path).get("provenance", {})
        if "commit" in found and origin(found) != origin(machine):
            yield f"But {path.parent.name}/{path.name} {origin(found)}."


def _same_bits(folder: str, runs: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Says of each run that was killed whether it ended as the one that was not."""
    for name, run in runs.items():
        mode, _, end = name.rpartition("-")
        if end == "resumed" and (whole := runs.get(f"{mode}-whole")):
            answer = "yes" if run["digest"] == whole["digest"] else "no"
            if run.get("began_at") == 0:
                answer = "not known, it resumed nothing"
            yield f"{folder}, {mode}: same bits after a kill: {answer}"


def _step(block: str, row: Mapping[str, Any]) -> str:
    several = f"{row['seeds']} seeds" if row.get("seeds", 1) > 1 else ""
    name = " ".join(filter(None, (row["method"], row["kind"], row["variant"], several)))
    return _line(block, name, row["xla_flags"], *_numbers(row, *_NUMBERS))


def _numbers(row: Mapping[str, Any], *columns: str) -> Iterator[str]:
    """Returns the cells of some columns, empty where the row has no such number."""
    for field, factor, form in map(_NUMBERS.__getitem__, columns):
        yield f"{factor * row[field]:{form}}" if field in row else ""


def _head(title: str, *columns: str) -> list[str]:
    return ["", f"# {title}", "", _line(*columns), _line(*["---"] * len(columns))]


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in ("", " ".join(text.split()))]


def _line(*cells: object) -> str:
    texts = (str(cell).replace("|", "/").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
