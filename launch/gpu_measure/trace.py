"""The time of a profile by kernel: sums over a Perfetto trace, for people.

    python -m launch.gpu_measure.trace FOLDER

Reads the traces that `samrobust bench --profile` wrote below a folder, and writes
`profile.md` into it.
"""

import collections
import gzip
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from launch.gpu_measure.summary import origin
from samrobust.system.provenance import provenance

__all__ = ["main", "summarize"]

_SHOWN = 40  # kernels


def summarize(trace: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Returns name, number and microseconds of each kernel of a trace, longest first.

    Those on the streams of accelerators; where the trace has none, all that happened in
    any thread.
    """
    events = trace["traceEvents"]
    named = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and "name" in event.get("args", {})
    }

    def is_kernel(event: Mapping[str, Any]) -> bool:
        thread = named.get(("thread_name", event["pid"], event["tid"]), "")
        return thread.startswith("Stream")

    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for event in list(filter(is_kernel, timed)) or timed:
        sums[event["name"]][0] += 1
        sums[event["name"]][1] += event["dur"]
    found = [(name, int(count), total) for name, (count, total) in sums.items()]
    return sorted(found, key=lambda one: -one[2])


def main() -> None:
    """Writes the summary of all traces below the folder of the command line."""
    folder = pathlib.Path(sys.argv[1])
    paths = sorted(folder.glob("**/perfetto_trace.json.gz"))
    if not paths:
        sys.exit(f"Expected a Perfetto trace below {folder}, got none.")
    lines = [f"Measured {origin(provenance())}.", ""]
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found = summarize(json.load(file))
        total = sum(one[2] for one in found)
        lines += [f"# {path.relative_to(folder)}", "", "| kernel | runs | us | % |"]
        lines += ["| :--- | ---: | ---: | ---: |"]
        lines += [f"| all | {sum(one[1] for one in found)} | {total:.0f} | 100 |"]
        for name, count, time in found[:_SHOWN]:
            share = 100 * time / total
            lines.append(f"| {name[:80]} | {count} | {time:.0f} | {share:.1f} |")
        lines.append("")
    (folder / "profile.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
