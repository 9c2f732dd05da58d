#!/usr/bin/env python3
"""Prints a Kubernetes JobSet that runs a samrobust command on GPU nodes or a TPU slice.

    python launch/k8s/render.py --image=IMAGE --accelerator=gpu --nodes=2 \
        --gpus-per-node=8 -- train --config=... --workdir=runs/sam | kubectl apply -f -

    python launch/k8s/render.py --image=IMAGE --accelerator=tpu-v5-lite-podslice \
        --topology=4x4 -- train --config=... --workdir=runs/sam | kubectl apply -f -

With --sweep=N it is a table in N shares, each a pod on a node, which is started again
alone; N as `samrobust table ... --list | wc -l` counts gives each run its pod. Of
recheck, curves or sharpness it is N workers on the runs of a table. Else one process a
node, which drives all its devices. The workdir is relative to /work, the volume that
outlives the pods, or gs://..., where the --service-account may write. All else that one
may want to change is in jobset.yaml, beside this file; --env may be given again and
again. Needs nothing but Python.
"""

import argparse
import json
import math
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

__all__ = ["main", "render"]

_HOLE = r"\{\{(\w+)\}\}"
_MARKS = r"  # ((?:gpu|tpu|run|sweep| )+)$"
_TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
_CPUS, _MEMORY = 2, 8  # requested for each device, the latter in GiB
_GKE = "cloud.google.com/gke"
# Commands of which each worker takes the run that no other holds.
_SHARED = ("recheck", "curves", "sharpness")
# Kubernetes names a pod NAME-worker-0-INDEX-xxxxx, within 63 characters.
_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the JobSet; returns the exit code."""
    print(render(_values(_parse(argv))), end="")
    return 0


def render(values: Mapping[str, Any]) -> str:
    """Fills in the template.

    Args:
      values: of all names in {{...}}, as JSON has them, which YAML reads too. A line of
        an empty one is left out, that of `env` is there for each of its items. And
        `marks`, whose lines stay: gpu or tpu, run or sweep.
    """
    lines: list[str] = []
    for line in _TEMPLATE.read_text(encoding="utf-8").splitlines():
        marks = re.search(_MARKS, line)
        line, names = re.sub(_MARKS, "", line), re.findall(_HOLE, line)
        if line.startswith("#") or (
            marks and not {*marks[1].split()} <= values["marks"]
        ):
            continue
        if names == ["env"]:
            lines += [_fill(line, {"env": one}) for one in values["env"]]
        elif all(values[name] for name in names):
            lines.append(_fill(line, values))
    return "\n".join(lines) + "\n"


def _fill(line: str, values: Mapping[str, Any]) -> str:
    return re.sub(_HOLE, lambda m: json.dumps(values[m[1]]), line)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"render.py: error: {message}\nSee `render.py --help`.\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="render.py",
        allow_abbrev=False,
        usage="%(prog)s --image=IMAGE --accelerator=TYPE [options] -- COMMAND ...",
        description=(__doc__ or "").partition("\n")[0],
    )
    add = parser.add_argument
    add("--image", required=True, help="built from launch/Dockerfile")
    add(
        "--accelerator",
        required=True,
        metavar="TYPE",
        help="gpu for any; nvidia-h100-80gb and the like on GKE; tpu-v5-lite-podslice "
        "and the like",
    )
    add("--nodes", type=int, metavar="N", help="of GPUs; default: 1")
    add("--gpus-per-node", type=int, metavar="K", help="default: 1")
    add("--sweep", type=int, metavar="N", help="in N shares, a pod each")
    add(
        "--at-once", type=int, metavar="K", help="shares that run at a time; default: N"
    )
    add("--topology", metavar="AxB[xC]", help="of the TPU slice, as in 4x4")
    add("--chips-per-node", type=int, metavar="K", help="of the TPU slice; default: 4")
    add("--name", default="samrobust", help="of the JobSet; default: %(default)s")
    add("--volume", default="samrobust", metavar="CLAIM", help="default: %(default)s")
    add(
        "--node-selector",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a label that the nodes must have, as cloud.google.com/gke-spot=true",
    )
    add("--cpus", type=int, metavar="N", help=f"of a pod; default: {_CPUS} a device")
    add("--memory", metavar="SIZE", help=f"as 64Gi; default: {_MEMORY}Gi a device")
    add("--queue", metavar="NAME", help="of Kueue, which starts the JobSet in its turn")
    add("--service-account", metavar="NAME", help="of the pods")
    add("--pull-secret", metavar="NAME", help="with which the image is pulled")
    add("--env", action="append", default=[], metavar="NAME=VALUE", help="of the pods")
    add("--max-restarts", type=int, default=50, metavar="N", help="%(default)s")
    add("command", nargs="+", metavar="COMMAND", help="of samrobust, after --")
    options = parser.parse_args(argv)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    of_gpus = ("nodes", "gpus_per_node")
    of_tpus = ("topology", "chips_per_node")
    for name in of_gpus if _is_tpu(options) else of_tpus:
        if getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            message = f"Expected no {flag} with --accelerator={options.accelerator}."
            raise ValueError(message)
    counts = ("nodes", "gpus_per_node", "chips_per_node", "cpus", "max_restarts")
    for name in (*counts, "sweep", "at_once"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} >= 1, got {value}.")
    if not re.fullmatch(_NAME, options.name):
        message = (
            "Expected at most 40 small letters, digits and hyphens, a letter first, "
            f"got --name={options.name}."
        )
        raise ValueError(message)
    nodes = _tpu_size(options)[0] if _is_tpu(options) else options.nodes or 1
    shared = options.command[0] in (*_SHARED, "table")
    if options.sweep and (nodes > 1 or not shared):
        message = (
            f"Expected table, {', '.join(_SHARED)} with --sweep, and a node for each "
            f"share, got {nodes} nodes and {options.command[0]}."
        )
        raise ValueError(message)
    if options.at_once and not options.sweep:
        raise ValueError("Expected --sweep with --at-once.")
    for flag, items in {
        "node-selector": options.node_selector,
        "env": options.env,
    }.items():
        for item in items:
            if not re.match(".+=", item):
                raise ValueError(f"Expected NAME=VALUE, got --{flag}={item}.")


def _is_tpu(options: argparse.Namespace) -> bool:
    return options.accelerator.startswith("tpu")


def _tpu_size(options: argparse.Namespace) -> tuple[int, int]:
    """Nodes of the slice, and chips of each."""
    topology = options.topology or ""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise ValueError(f"Expected --topology=AxB or AxBxC, got {topology!r}.")
    chips = math.prod(map(int, topology.split("x")))
    each = options.chips_per_node or min(4, chips)
    if chips % each:
        message = (
            f"Expected a divisor of the slice's {chips} chips, got "
            f"--chips-per-node={each}."
        )
        raise ValueError(message)
    return chips // each, each


def _values(options: argparse.Namespace) -> dict[str, Any]:
    selector = dict(item.split("=", 1) for item in options.node_selector)
    if _is_tpu(options):
        nodes, chips = _tpu_size(options)
        labels = {
            f"{_GKE}-tpu-accelerator": options.accelerator,
            f"{_GKE}-tpu-topology": options.topology,
        }
    else:
        nodes, chips = options.nodes or 1, options.gpus_per_node or 1
        of_gke = options.accelerator != "gpu"
        labels = {f"{_GKE}-accelerator": options.accelerator} if of_gke else {}
    memory = options.memory or f"{_MEMORY * chips}Gi"
    secret, queue = options.pull_secret, options.queue
    in_shares = options.sweep and options.command[0] not in _SHARED
    return {
        "marks": {
            "tpu" if _is_tpu(options) else "gpu",
            "sweep" if options.sweep else "run",
        },
        "name": options.name,
        "image": options.image,
        "pods": options.sweep or nodes,
        "at_once": options.at_once or options.sweep or nodes,
        "chips": chips,
        "resource": "google.com/tpu" if _is_tpu(options) else "nvidia.com/gpu",
        "requests": {"cpu": options.cpus or _CPUS * chips, "memory": memory},
        "labels": {"kueue.x-k8s.io/queue-name": queue} if queue else {},
        "service_account": options.service_account,
        "pull_secrets": [{"name": secret}] if secret else [],
        "node_selector": labels | selector,
        "env": [_variable(item) for item in options.env],
        "volume": options.volume,
        "max_restarts": options.max_restarts,
        # Kubernetes takes $(NAME) for a variable, and $$ for a dollar.
        "arguments": [
            *(word.replace("$", "$$") for word in options.command),
            *([f"--shard=$(SHARD)/{options.sweep}"] if in_shares else []),
        ],
    }


def _variable(item: str) -> dict[str, str]:
    name, _, value = item.partition("=")
    return {"name": name, "value": value.replace("$", "$$")}


if __name__ == "__main__":
    sys.exit(main())
