"""Your own images: a function that returns four arrays, and a table on them.

    samrobust table --config=digits --config.data.name=own_data:shapes --seeds=1 \
        '--rows=st;sam,rho=0.2;at,norm=linf,eps=8' --workdir=runs/shapes \
        '--config.evaluation.linf=(8,16)' '--config.evaluation.l2=(64,)'

in the folder of this file. Or save the arrays once, `python own_data.py`, and give
`--config.data.name=shapes.npz`. docs/data.md says what the arrays must be.
"""

import numpy as np


def shapes(num_train=600, num_test=200, size=12):
    """Returns noisy color images of a disk, a square or a diamond, the three classes.

    The same arrays at every call: a run that is resumed calls the function again.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, num_train + num_test)
    centers = rng.uniform(4, size - 4, (2, len(labels), 1, 1))
    y, x = np.abs(np.mgrid[:size, :size][:, None] - centers)  # each [N, H, W]
    distances = np.stack([np.hypot(y, x), np.maximum(y, x) * 1.15, (y + x) * 0.8])
    inside = distances[labels, np.arange(len(labels))] < 3.5
    pixels = rng.normal(100, 25, (*inside.shape, 3)) + 80 * inside[..., None]
    pixels = pixels.clip(0, 255).astype(np.uint8)  # [N, H, W, C], channels last
    return {
        "x_train": pixels[:num_train],
        "y_train": labels[:num_train],
        "x_test": pixels[num_train:],
        "y_test": labels[num_train:],
    }


if __name__ == "__main__":
    np.savez("shapes.npz", **shapes())
