"""CIFAR-100: Table 1 of the paper, its 12 rows under the paper's hyper-parameters.

    samrobust table --config=configs/cifar100.py --seeds=3 --workdir=runs/cifar100
    samrobust train --config=configs/cifar100.py:sam,rho=0.2 --workdir=runs/sam

Wei, Zhu and Zhang (2023), "Sharpness-Aware Minimization Alone can Improve Adversarial
Robustness", arXiv 2305.05392: PreActResNet-18, 100 epochs, batch 128, SGD.
"""

from ml_collections import ConfigDict

from samrobust.experiments.configuration import base_config, finish
from samrobust.types import Config

COLUMNS = ("natural", "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255")

# Table 1: accuracies in percent, means of three runs.
PAPER = {
    "st": (76.9, 13.6, 1.7, 44.5, 21.2),
    "sam,rho=0.1": (78.0, 19.6, 3.0, 51.5, 27.2),
    "sam,rho=0.2": (78.5, 23.1, 4.2, 54.2, 31.3),
    "sam,rho=0.4": (78.7, 28.3, 6.5, 57.0, 36.2),
    "at,norm=linf,eps=1": (73.1, 60.4, 46.6, 67.4, 61.5),
    "at,norm=linf,eps=2": (70.1, 60.3, 50.6, 65.7, 60.6),
    "at,norm=linf,eps=4": (66.2, 59.3, 52.0, 62.8, 58.9),
    "at,norm=linf,eps=8": (60.4, 55.1, 50.4, 57.0, 54.3),
    "at,norm=l2,eps=16": (74.8, 52.8, 31.4, 66.3, 57.7),
    "at,norm=l2,eps=32": (73.2, 57.4, 40.6, 67.1, 61.0),
    "at,norm=l2,eps=64": (70.7, 58.1, 45.9, 66.1, 60.7),
    "at,norm=l2,eps=128": (67.4, 58.2, 48.7, 63.9, 60.4),
}
ROWS = list(PAPER)


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    config = base_config()
    config.data.name = "cifar100"
    config.paper = ConfigDict(dict(zip(COLUMNS, PAPER.get(row, ()), strict=False)))
    return finish(config, row)
