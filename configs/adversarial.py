"""The adversarial training family, and its cheap members, on one page.

    samrobust table --config=configs/adversarial.py --seeds=3
    samrobust recheck --workdir=runs/adversarial --num-examples=200

The data, the network and the attacks of configs/digits.py, trained against radii from a
quarter of the smallest one attacked with to the largest. `ROWS` ends with the question
of the paper, whether SAM is a lightweight substitute: what costs no more than SAM does,
or little more. SAM's settings, and the share of smoothed labels, are those of
configs/sharpness.py, chosen on held-out images; all others are the authors'.
"""

from samrobust.experiments.configuration import load_config
from samrobust.types import Config

# What costs as much as standard training, or up to twice as much.
CHEAP = [
    "label_smoothing,alpha=0.4",
    "sam,rho=0.4",
    "sam,rho=1.6,start=0.8",
    "msam,rho=0.3",
    *(f"fgsm_rs,eps={eps}" for eps in (4, 8, 16, 32)),
    *(f"nfgsm,eps={eps}" for eps in (16, 32)),
    *(f"free,eps={eps},m=4" for eps in (4, 16)),
    "at,norm=linf,eps=16,start=0.8",
]
ROWS = [
    "st",
    *CHEAP,
    *(f"at,norm=linf,eps={eps}" for eps in (4, 8, 16, 32)),
    "at,norm=l2,eps=128",
    "dynamic,eps=16",
    "cfa,eps=16",
    *(f"trades,norm=linf,eps=16,beta={beta}" for beta in ("0.5", "6")),
    "mart,norm=linf,eps=16,beta=5",
    "cfa_trades,eps=16,beta=6",
    "at,norm=linf,eps=16+label_smoothing,alpha=0.1",
    "at,norm=linf,eps=16+sam,rho=0.1",
    "at,norm=linf,eps=16+awp,gamma=0.01",
    "at,norm=linf,eps=16+rwp,gamma=0.01",
    "at,norm=linf,eps=16+ema,decay=0.99",
    # With the authors' decay of 0.999 the average would still be that of first steps.
    "at,norm=linf,eps=16+generalist,beta=0.4,generalist.decay=0.99",
    # Judged on a ninth of the training images, which are not trained on.
    "cfa,eps=16+fawa,threshold=0.2,data.validation_size=150",
    "trades,norm=linf,eps=16,beta=6+awp,gamma=0.005",
]


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    return load_config(f"configs/digits.py:{row}")
