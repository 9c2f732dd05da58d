"""Rank correlation, and how sure it is."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

__all__ = ["LEAST_FOR_INTERVAL", "RankCorrelation", "rank_correlation"]

# With fewer pairs a resample often holds three or four different ones, and the interval
# covers far less often than it says.
LEAST_FOR_INTERVAL = 8
_RESAMPLES = 2000


class RankCorrelation(NamedTuple):
    """Spearman's rank correlation with its bootstrap interval.

    Attributes:
      n: number of pairs.
      rho: in [-1, 1]; None with fewer than three pairs, or where all ranks tie.
      interval: of 95 %; None with fewer than eight pairs.
    """

    n: int
    rho: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        """Returns the correlation as printed: `-0.83 [-0.95, -0.41]`."""
        if self.rho is None:
            return "-"
        if self.interval is None:
            return f"{self.rho:+.2f}"
        return "{:+.2f} [{:+.2f}, {:+.2f}]".format(self.rho, *self.interval)

    @property
    def is_sure(self) -> bool:
        """Whether there is an interval, and 0 lies outside of it."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> RankCorrelation:
    """Returns Spearman's correlation of pairs, ties at their mean rank.

    The interval holds 95 % of the correlations of 2000 samples of as many pairs, drawn
    with replacement, always the same: the percentile bootstrap.

    Args:
      one: finite numbers.
      other: as many.

    Reference: Spearman (1904); Efron (1979).

    >>> str(rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]))
    '+1.00'
    """
    pairs = np.array([one, other], float)
    n = pairs.shape[1]
    (rho,) = _correlate(pairs[:, None]) if n >= 3 else (np.nan,)
    if np.isnan(rho):
        return RankCorrelation(n)
    found = RankCorrelation(n, float(rho))
    if n < LEAST_FOR_INTERVAL:
        return found
    drawn = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    resampled = _correlate(pairs[:, drawn])
    low, high = np.nanpercentile(resampled, (2.5, 97.5))  # NaN: all of a sample tie
    return found._replace(interval=(float(low), float(high)))


def _correlate(pairs: np.ndarray) -> np.ndarray:
    """Returns the correlations [M] of M samples [2, M, N]; NaN where all ranks tie."""
    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    product = (ranks[0] * ranks[1]).sum(axis=-1)
    lengths = np.sqrt(np.square(ranks).sum(axis=-1)).prod(axis=0)
    return np.where(lengths > 0, product / np.where(lengths > 0, lengths, 1), np.nan)
