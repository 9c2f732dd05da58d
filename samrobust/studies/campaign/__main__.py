"""`python -m samrobust.studies.campaign`: see `launch/gpu_measure.sh`."""

import argparse
import os
import pathlib
import signal
import sys
import threading

from samrobust.studies.campaign.blocks import Campaign, plan
from samrobust.studies.campaign.runner import DONE, run
from samrobust.studies.campaign.summary import write_archive, write_summary

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
    add("--budget", type=float, default=720.0, metavar="SECONDS", help="%(default)s")
    add("--trial", action="store_true", help="all of it at the tiniest size")
    add("--list", action="store_true", help="print the blocks, and run none")
    arguments = parser.parse_args()
    workdir = arguments.workdir.absolute()
    campaign = Campaign(workdir, arguments.bundle.absolute(), arguments.trial)
    blocks = plan(campaign)
    if arguments.list:
        for block in blocks:
            print(f"{block.name} (at most {block.seconds:g} s)")
        return 0
    paths = [str(here), str(workdir / "site"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    archive = arguments.archive or workdir / "results.tar.gz"
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def after() -> None:
        write_summary(blocks, workdir)
        write_archive(workdir, archive.absolute())

    workdir.mkdir(parents=True, exist_ok=True)
    found = run(blocks, workdir, arguments.budget, after=after, should_stop=stop.is_set)
    print(write_summary(blocks, workdir).read_text(encoding="utf-8"))
    return 0 if list(found.values()) == [DONE] * len(blocks) else 1


if __name__ == "__main__":
    sys.exit(main())
