"""The sharpness family on one page: what each method is worth, and what it costs.

    samrobust table --config=configs/sharpness.py --seeds=3
    samrobust recheck --workdir=runs/sharpness

The data, the network and the attacks of configs/digits.py. `GRID` has four
settings of each method, `ROWS` the best of them on held-out training images, by
the mean of the natural and the four robust accuracies over two seeds:

    samrobust table --config=configs/sharpness.py --rows=configs/sharpness.py:GRID \
        --config.data.validation_size=297 --config.evaluation.split=validation \
        --seeds=2 --workdir=runs/sharpness-grid

Standard training for twice the epochs or with four times the weight decay, smoothed
labels, and adversarial training at a quarter of the smallest radius are controls.
"""

from samrobust.experiments.configuration import load_config
from samrobust.types import Config

# Around what the methods' authors take, a factor of two or more apart.
STRENGTHS = {
    "sam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "sam,rho={},start=0.8": (0.2, 0.4, 0.8, 1.6),
    "asam,rho={}": (0.5, 1, 2, 4),
    "asam_davda,rho={}": (0.5, 1, 2, 4),
    "gsam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "friendly_sam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "looksam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "esam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "sam_on,rho={}": (0.25, 0.5, 1, 2),
    "fisher_sam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "fsam,rho={}": (0.1, 0.2, 0.4, 0.8),
    "ssam,mask=fisher,rho={}": (0.1, 0.2, 0.4, 0.8),
    "ssam,mask=dynamic,rho={}": (0.1, 0.2, 0.4, 0.8),
    "awp,gamma={}": (0.005, 0.01, 0.02, 0.04),
    "msam,rho={}": (0.3, 1, 3, 10),
    # A step of its own kind once in 20, for which the authors' rate is 1.
    "entropy_sgd,gamma={},training.learning_rate=1": (0.003, 0.03, 0.3, 3),
    "swa,start={}": (0.25, 0.5, 0.75, 0.9),
    "ema,decay={}": (0.9, 0.97, 0.99, 0.997),
    "label_smoothing,alpha={}": (0.05, 0.1, 0.2, 0.4),
}
GRID = [row.format(value) for row, values in STRENGTHS.items() for value in values]
ROWS = [
    "st",
    "st,training.epochs=40",
    "st,training.weight_decay=0.002",
    "label_smoothing,alpha=0.4",
    "sam,rho=0.4",
    "sam,rho=1.6,start=0.8",
    "asam,rho=2",
    "asam_davda,rho=2",
    "gsam,rho=0.4",
    "friendly_sam,rho=0.8",
    "looksam,rho=0.2",
    "esam,rho=0.4",
    "sam_on,rho=2",
    "fisher_sam,rho=0.4",
    "fsam,rho=0.4",
    "ssam,mask=fisher,rho=0.8",
    "ssam,mask=dynamic,rho=0.8",
    "awp,gamma=0.04",
    "msam,rho=0.3",
    "entropy_sgd,gamma=0.003,training.learning_rate=1",
    "swa,start=0.75",
    "ema,decay=0.9",
    "at,norm=linf,eps=4",
]


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    return load_config(f"configs/digits.py:{row}")
