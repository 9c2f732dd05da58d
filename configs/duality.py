"""CIFAR-10: the grid of the paper's longer version, methods, optimizers and networks.

    samrobust table --config=configs/duality.py --config.model.dtype=bfloat16
    samrobust recheck --workdir=runs/duality

Zhang, He, Zhu, Chen, Wang and Wei (2024), "On the Duality Between Sharpness-Aware
Minimization and Adversarial Training", ICML, arXiv 2402.15152, as far as its public
code shows it: data, schedule and PreActResNet-18 of `configs/cifar10.py`; SAM, ASAM and
ESAM over five radii; Adam beside SGD; adversarial training with 5 steps of half the
radius, at l-inf 4/255 and 8/255 with 10 of a quarter; a wide ResNet and DeiT-tiny.

Each row is the method as its authors meant it. So two numbers need not agree with those
of that code. Its ESAM is given the mean loss of the batch, not one of each example, and
then chooses none: it is SAM with another forward pass. And one of its evaluations hands
normalized images to AutoAttack, whose box is that of pixels in [0, 1]; here networks
normalize inside. Not public and ours are the rates and decays of Adam and of DeiT-tiny,
and the rows of these two networks, the baseline and SAM.
"""

from samrobust.experiments.configuration import base_config, finish
from samrobust.types import Config

RHOS = (0.1, 0.2, 0.3, 0.4, 0.5)
ADAM = "training.learning_rate=0.001,training.optimizer=adam"
FIVE_STEPS = "attack.num_steps=5,attack.relative_step_size.{norm}=0.5"
WIDE = "model.name=wide_resnet"
DEIT = (
    "model.name=vit,training.learning_rate=0.0005,training.optimizer=adamw,"
    "training.schedule=cosine,training.weight_decay=0.05"
)
ROWS = [
    "st",
    *(f"{method},rho={rho}" for method in ("sam", "asam", "esam") for rho in RHOS),
    f"st,{ADAM}",
    *(f"sam,rho={rho},{ADAM}" for rho in RHOS),
    *(f"at,norm=linf,eps={e},{FIVE_STEPS.format(norm='linf')}" for e in (1, 2)),
    *(f"at,norm=linf,eps={e}" for e in (4, 8)),
    *(f"at,norm=l2,eps={e},{FIVE_STEPS.format(norm='l2')}" for e in (16, 32, 64, 128)),
    *(f"{row},{network}" for network in (WIDE, DEIT) for row in ("st", "sam,rho=0.2")),
]


def get_config(row: str = "st") -> Config:
    """Returns the locked config of one row."""
    config = base_config()
    config.data.name = "cifar10"
    return finish(config, row)
