"""Speed: how fast a training step, an epoch and an evaluation are, and against what."""

from samrobust.bench.counts import Counts, Work, count

__all__ = ["Counts", "Work", "count"]
