"""`python -m launch.gpu_measure`: see `launch/gpu_measure.sh`."""

import argparse
import os
import pathlib
import shutil
import signal
import sys
import threading

from launch.gpu_measure.archive import write_archive
from launch.gpu_measure.blocks import Campaign, left_out, plan
from launch.gpu_measure.runner import DONE, run
from launch.gpu_measure.summary import write_summary

__all__ = ["main"]


def main() -> int:
    """Runs a campaign; returns 0 if all blocks are done."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu_measure.sh",
        description="Measures a machine with one GPU: speed, compilation, flags, "
        "determinism, PyTorch beside, a profile, two runs at once, then rows of the "
        "tables. Can be killed at any moment: the same command goes on.",
    )
    add = parser.add_argument
    here = pathlib.Path.cwd()
    add("--workdir", type=pathlib.Path, default=here / "runs" / "gpu", metavar="DIR")
    add("--bundle", type=pathlib.Path, default=here / "bundle", metavar="DIR")
    add("--archive", type=pathlib.Path, metavar="FILE", help="WORKDIR/results.tar.gz")
    budget = "of this command, its end included; default: %(default)s"
    add("--budget", type=float, default=560.0, metavar="SECONDS", help=budget)
    add("--trial", action="store_true", help="all of it at the tiniest size")
    add("--list", action="store_true", help="print the blocks, and run none")
    arguments = parser.parse_args()
    workdir = arguments.workdir.absolute()
    bundle, trial = arguments.bundle.absolute(), arguments.trial
    campaign = Campaign(workdir, bundle, trial, _is_on_cpu(trial))
    blocks, absent = plan(campaign), list(left_out(campaign))
    if arguments.list:
        for block in blocks:
            print(f"{block.name} (at most {block.seconds:g} s)")
        for text in absent:
            print(f"left out: {text}")
        return 0
    paths = [str(here), str(workdir / "site"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if campaign.on_cpu:  # PyTorch's threads would wait for each other busily
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:  # by default JAX takes the CPU in silence where it finds no GPU
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
    archive = arguments.archive or workdir / "results.tar.gz"
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def after() -> None:
        write_summary(blocks, workdir, absent)
        write_archive(workdir, archive.absolute())

    workdir.mkdir(parents=True, exist_ok=True)
    found = run(blocks, workdir, arguments.budget, after=after, should_stop=stop.is_set)
    print(write_summary(blocks, workdir, absent).read_text(encoding="utf-8"))
    return 0 if list(found.values()) == [DONE] * len(blocks) else 1


def _is_on_cpu(trial: bool) -> bool:
    """Tells whether no GPU is measured; only a trial may find none by itself."""
    chosen = os.environ.get("JAX_PLATFORMS", "")
    return chosen == "cpu" or (trial and not chosen and not shutil.which("nvidia-smi"))


if __name__ == "__main__":
    sys.exit(main())
