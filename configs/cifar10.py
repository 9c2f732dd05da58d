"""CIFAR-10: Table 2 of the paper, its 12 rows under the paper's hyper-parameters.

    samrobust table --config=configs/cifar10.py --seeds=3 --workdir=runs/cifar10
    samrobust train --config=configs/cifar10.py:sam,rho=0.2 --workdir=runs/sam

Wei, Zhu and Zhang (2023), "Sharpness-Aware Minimization Alone can Improve Adversarial
Robustness", arXiv 2305.05392: PreActResNet-18, 100 epochs, batch 128, SGD.
"""

from ml_collections import ConfigDict

from samrobust.experiments.configuration import base_config, finish
from samrobust.types import Config

COLUMNS = ("natural", "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255")

# Table 2: accuracies in percent, means of three runs.
PAPER = {
    "st": (94.6, 39.6, 8.9, 76.1, 51.7),
    "sam,rho=0.1": (95.6, 45.1, 9.4, 81.0, 56.3),
    "sam,rho=0.2": (95.5, 48.9, 10.2, 82.9, 58.8),
    "sam,rho=0.4": (94.7, 56.1, 15.6, 84.0, 64.4),
    "at,norm=linf,eps=1": (93.7, 86.4, 75.5, 90.5, 86.4),
    "at,norm=linf,eps=2": (92.8, 87.4, 79.6, 90.3, 86.9),
    "at,norm=linf,eps=4": (90.9, 86.4, 81.3, 88.3, 85.7),
    "at,norm=linf,eps=8": (84.2, 81.5, 78.4, 82.5, 80.8),
    "at,norm=l2,eps=16": (94.5, 82.2, 61.7, 90.3, 84.5),
    "at,norm=l2,eps=32": (93.7, 84.9, 70.9, 91.0, 86.7),
    "at,norm=l2,eps=64": (92.7, 85.6, 75.2, 90.7, 87.5),
    "at,norm=l2,eps=128": (90.2, 85.7, 78.4, 89.6, 87.1),
}
ROWS = list(PAPER)


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    config = base_config()
    config.data.name = "cifar10"
    config.paper = ConfigDict(dict(zip(COLUMNS, PAPER.get(row, ()), strict=False)))
    return finish(config, row)
