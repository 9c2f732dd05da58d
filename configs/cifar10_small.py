"""Both families on real images in hours of two CPU cores: a small CIFAR-10.

    samrobust table --config=configs/cifar10_small.py --seeds=3
    samrobust recheck --workdir=runs/cifar10_small --num-examples=200
    samrobust table --config=configs/cifar10_small.py --seeds=3 \
        --rows=configs/cifar10_small.py:SMALL_RADIUS --workdir=runs/adversarial_small

5,000 training and 1,000 test images of CIFAR-10, a slim pre-activation ResNet and ten
epochs; the attacks and radii of the paper's tables. Rows and settings were chosen as in
configs/sharpness.py, on 1,000 held-out training images and one seed:

    samrobust table --config=configs/cifar10_small.py \
        --rows=configs/cifar10_small.py:GRID --config.data.validation_size=1000 \
        --config.evaluation.split=validation --workdir=runs/cifar10_small-grid

`SMALL_RADIUS` asks the paper's question at its smallest radius and below; `ADVERSARIAL`
adds the rows of configs/adversarial.py at radii up to the largest, for the same
workdir. A run of two passes a step takes two minutes of a core.
"""

from samrobust.experiments.configuration import base_config, finish, load_rows
from samrobust.types import Config

# Of each method's four settings the first three, for the network underfits: all but
# SWA, which begins earlier there, do less than with the last.
GRID = [
    row
    for index, row in enumerate(load_rows("configs/sharpness.py", "GRID"))
    if index % 4 < 3
]
ROWS = [
    "st",
    "st,training.epochs=20",
    "st,training.weight_decay=0.002",
    "label_smoothing,alpha=0.2",
    "sam,rho=0.2",
    "sam,rho=0.8,start=0.8",
    "asam,rho=0.5",
    "asam_davda,rho=1",
    "gsam,rho=0.1",
    "friendly_sam,rho=0.1",
    "looksam,rho=0.1",
    "esam,rho=0.1",
    "sam_on,rho=0.25",
    "fisher_sam,rho=0.1",
    "fsam,rho=0.4",
    "ssam,mask=fisher,rho=0.1",
    "ssam,mask=dynamic,rho=0.1",
    "awp,gamma=0.005",
    "msam,rho=1",
    "entropy_sgd,gamma=0.3,training.learning_rate=1",
    "swa,start=0.25",
    "ema,decay=0.99",
    "at,norm=linf,eps=0.25",
]
# The question of the paper: what SAM is worth beside cheap training at the same radii.
SMALL_RADIUS = [
    "st",
    "label_smoothing,alpha=0.2",
    "sam,rho=0.2",
    "sam,rho=0.8,start=0.8",
    "msam,rho=1",
    *(f"fgsm_rs,eps={eps}" for eps in ("0.25", "0.5", "1")),
    "free,eps=1,m=4",
    "at,norm=linf,eps=1,start=0.8",
    *(f"at,norm=linf,eps={eps}" for eps in ("0.25", "1")),
    "trades,norm=linf,eps=1,beta=1",
]
ADVERSARIAL = [
    *SMALL_RADIUS,
    *(f"fgsm_rs,eps={eps}" for eps in (2, 8)),
    "nfgsm,eps=8",
    "free,eps=8,m=4",
    *(f"at,norm=linf,eps={eps}" for eps in ("0.5", "2", "8")),
    "at,norm=l2,eps=32",
    "trades,norm=linf,eps=8,beta=6",
    "mart,norm=linf,eps=8,beta=5",
    "at,norm=linf,eps=8+awp,gamma=0.005",
]


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    config = base_config()
    config.data.name = "cifar10"
    config.data.train_size = 5_000
    config.data.test_size = 1_000
    config.model.width = 16
    config.model.blocks = (1, 1, 1, 1)
    config.training.epochs = 10
    config.training.batch_size = 64
    config.training.drop_remainder = True  # one shape, compiled once
    config.checkpoint.minutes = 0.25
    return finish(config, row)
