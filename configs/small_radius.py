"""CIFAR-10 at l-inf 1/255 and below: SAM beside the cheap opponents that it has there.

    samrobust table --config=configs/small_radius.py --workdir=runs/cifar10 \
        --config.model.dtype=bfloat16
    samrobust recheck --workdir=runs/cifar10 --linf=1 --l2= --num-examples=1000

Is SAM the lightweight substitute for adversarial training? Network, data, training
and evaluation are those of `configs/cifar10.py`, so the rows of both are the same runs:
in one workdir, with the same `dtype`, neither trains again what the other has. The
order is for a short loan of a GPU: baselines first, then cheap rows, the most missed
ones first, and those with attacks of ten steps last. A run that is stopped goes on with
the same command. On one NVIDIA H200 in bfloat16 ST trained in 114 s and SAM in 215 s;
by their passes PGD adversarial training takes 7.67 times as long as ST and TRADES 9
times, a quarter of an hour or a little more.
"""

from samrobust.experiments.configuration import base_config, finish
from samrobust.types import Config

ROWS = [
    "st",
    "sam,rho=0.4",
    "fgsm_rs,eps=1",
    "free,eps=1,m=8",
    "sam,rho=0.4,start=0.8",
    "msam,rho=0.3",
    "label_smoothing,alpha=0.1",
    "sam,rho=0.2",
    "fgsm_rs,eps=0.5",
    "free,eps=0.5,m=8",
    "sam,rho=0.1",
    "fgsm_rs,eps=0.25",
    "free,eps=0.25,m=8",
    "at,norm=linf,eps=1",
    "at,norm=linf,eps=0.5",
    "at,norm=linf,eps=0.25",
    "trades,norm=linf,eps=1,beta=1",
]


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    config = base_config()
    config.data.name = "cifar10"
    # Free-AT replays full batches alone.
    config.training.drop_remainder = row.startswith("free")
    return finish(config, row)
