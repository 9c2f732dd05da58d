"""The windows of the Square attack: how large they are and what is written into them.

All of it is known before the attack runs: plain NumPy, nothing random. Sizes are in
pixels, images are [B, H, W, C].

Reference: Andriushchenko et al. (2020), arXiv 1912.00049, and the code of AutoAttack.
"""

import math

import numpy as np

__all__ = ["pulse", "pulses", "window_sizes"]

# The share of the image that a window covers halves after each of these queries.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_HALVINGS_END = 10000  # the number of queries that they are made for


def window_sizes(
    num_queries: int,
    p_init: float,
    shape: tuple[int, ...],
    *,
    rescale: bool,
    odd: bool,
) -> np.ndarray:
    """The side of the square window of each query.

    Args:
      num_queries: >= 1.
      p_init: the share of the image that the first window covers, in (0, 1].
      shape: of an image, [H, W, C].
      rescale: stretch the schedule, made for 10,000 queries, to `num_queries`.
      odd: round even sides up, and none below 3, as the l2 attack does.

    Returns:
      int32 [num_queries], not rising, each at least 1 and at most min(H, W).

    >>> window_sizes(60, 0.8, (32, 32, 3), rescale=False, odd=False)[[0, 10, 11, 51]]
    array([29, 29, 20, 14], dtype=int32)
    """
    sides = [
        _side(p_init / 2 ** _halvings(query, num_queries, rescale), shape, odd)
        for query in range(num_queries)
    ]
    return np.array(sides, np.int32)


def _halvings(query: int, num_queries: int, rescale: bool) -> int:
    if rescale:
        query = int(query / num_queries * _HALVINGS_END)
    return sum(query > after for after in _HALVINGS)


def _side(share: float, shape: tuple[int, ...], odd: bool) -> int:
    height, width, channels = shape
    # Multiplied and divided by the channels as in upstream's code: the same rounding.
    side = round(math.sqrt(share * (height * width * channels) / channels))
    side = max(side, 3) | 1 if odd else max(side, 1)
    return min(side, height, width)


def pulse(size: int) -> np.ndarray:
    """What the l2 attack writes into a window: two opposite pulses, of unit norm.

    The upper half falls off from its centre in square rings, the lower half is minus
    the same; where `size` is odd the lower half is a row higher.

    Returns:
      float32 [size, size] for size >= 1.

    >>> pulse(2).round(4)
    array([[ 0.1387,  0.6934],
           [-0.1387, -0.6934]], dtype=float32)
    """
    upper, lower = _half(size // 2, size), _half(size - size // 2, size)
    both = np.concatenate([upper, -lower])
    return (both / np.sqrt(np.sum(both**2))).astype(np.float32)


def _half(height: int, width: int) -> np.ndarray:
    """A pulse of unit norm, float64 [height, width]; empty where the height is 0.

    At distance d from the centre, in rings, it is `1/(d+1)**2 + ... + 1/M**2`: M
    squares of growing side and falling height lie on top of each other.
    """
    rows = np.abs(np.arange(height) - height // 2)[:, None]
    columns = np.abs(np.arange(width) - width // 2)[None, :]
    num_squares = max(height // 2, width // 2) + 1
    heights = 1 / np.arange(1, num_squares + 1) ** 2
    stacked = np.cumsum(heights[::-1])[::-1]
    values = stacked[np.maximum(rows, columns)]
    return values / np.sqrt(np.sum(values**2)) if height else values


def pulses(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pulse of each window, each distinct one once.

    Args:
      sizes: from `window_sizes`, int [num_queries].

    Returns:
      float32 [D, S, S], S the largest size, zeros below and to the right of smaller
      pulses; and int32 [num_queries], which of the D pulses a query takes.
    """
    distinct, which = np.unique(sizes, return_inverse=True)
    largest = int(distinct[-1])
    padded = [
        np.pad(pulse(int(size)), (0, largest - int(size))) for size in distinct
    ]  # zeros at the end of both axes
    return np.stack(padded), which.astype(np.int32)
