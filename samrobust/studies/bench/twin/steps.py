"""The training steps that are timed: ST, SAM and AT, as published and tuned.

`ReferenceTrainer` does what the paper's PyTorch code and davda54's SAM do, written
from scratch: PGD calls `backward`, which computes the gradients of all weights and
throws them away, and updates the running statistics at every step.
`TunedTrainer` computes the same parameters in the ways PyTorch offers to do it fast.

Images are [B, C, H, W] float32 in [0, 1], labels int64 [B], on the model's device.

Out of scope: data, schedules, what is timed and how.

Reference: Wei, Zhu and Zhang, 2023, arXiv 2305.05392; Foret et al., 2021, arXiv
2010.01412; Madry et al., 2018, arXiv 1706.06083.
"""

# pyright: reportPrivateImportUsage=false, reportCallIssue=false
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own custom
from torch import Tensor, nn

from samrobust.checks import check, check_choice
from samrobust.experiments.robustbench_model import NormalizedPreActResNet
from samrobust.studies.bench.twin.variants import VARIANTS

__all__ = [
    "ReferenceTrainer",
    "Step",
    "TunedTrainer",
    "TwinSpec",
    "capture",
    "make_model",
    "make_trainer",
]

Outcome = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Outcome]
Tensors = list[Tensor]

SAM_FLOOR = 1e-12  # davda54/sam adds it to the norm of the gradient
L2_FLOOR = 1e-10  # the reference adds it to the norm of the mean loss's gradient


@dataclasses.dataclass(frozen=True)
class TwinSpec:
    """A training step and how to time it; radii and steps in pixel units (8/255).

    All fields are given by the caller, so that neither side of a comparison has a
    default that the other does not share.

    Attributes:
      method: `st`, `sam` or `at`.
      variant: of `VARIANTS`; see `reference.py`.
      batch_size: examples in a batch.
      precision: `float32`; in a tuned variant also `bfloat16`, of `pure` the only one.
      float32_matmul: `highest`, or `high` for TF32 in products and convolutions.
      device: `cpu` or `cuda`.
      network: the arguments of `NormalizedPreActResNet`, all of them.
      mean: of the pixels, a number for all channels or one for each.
      std: of the pixels, likewise.
      image_shape: (H, W, C).
      norm: of the attack, `linf` or `l2`; without effect where there is none.
      epsilon: the attack's radius.
      step_size: the length of its steps.
      num_steps: their number.
      rho: SAM's radius.
      sgd: the arguments `lr`, `momentum` and `weight_decay` (on all parameters) of SGD.
      repeats: number of timed repeats.
      min_seconds: the least duration of a repeat.

    Raises:
      ValueError: for a method or a variant that there is not. All else is checked in
        the config that it comes from.
    """

    method: str
    variant: str
    batch_size: int
    precision: str
    float32_matmul: str
    device: str
    network: Mapping[str, Any]
    mean: Sequence[float]
    std: Sequence[float]
    image_shape: Sequence[int]
    norm: str
    epsilon: float
    step_size: float
    num_steps: int
    rho: float
    sgd: Mapping[str, Any]
    repeats: int
    min_seconds: float

    def __post_init__(self) -> None:
        check_choice(("st", "sam", "at"), method=self.method)
        check_choice(VARIANTS, variant=self.variant)
        check(
            self.is_tuned or self.precision == "float32",
            "precision='float32' of a variant that is not tuned",
            "The reference code knows no other; take variant=tuned.",
            precision=self.precision,
            variant=self.variant,
        )
        check(
            self.device == "cuda" or self.variant != "graphed",
            "device='cuda' of variant='graphed'",
            "Other devices have no graphs; take variant=tuned.",
            device=self.device,
        )

    @property
    def is_tuned(self) -> bool:
        """Returns whether the step is written for speed, and not as the reference's."""
        return VARIANTS[self.variant].is_tuned

    @property
    def is_graphed(self) -> bool:
        """Returns whether a step is one CUDA graph."""
        return self.device == "cuda" and self.is_tuned and self.variant != "tuned"

    @property
    def compiler_mode(self) -> str | None:
        """Returns the mode of `torch.compile`; None: the network is not compiled."""
        variant = VARIANTS[self.variant]
        compiles = variant.compiles_on_cpu or self.device == "cuda"
        return variant.mode if compiles else None

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of the parameters."""
        is_pure = self.variant == "pure" and self.precision == "bfloat16"
        return torch.bfloat16 if is_pure else torch.float32


def make_model(spec: TwinSpec) -> nn.Module:
    """Returns the network in train mode on the spec's device."""
    return NormalizedPreActResNet(**spec.network).to(spec.device, spec.dtype).train()


def make_trainer(
    spec: TwinSpec, model: nn.Module, *, mode: str | None = None
) -> "ReferenceTrainer":
    """Returns the trainer of the spec's variant.

    Args:
      spec: of the step.
      model: of `make_model`.
      mode: of `torch.compile`; None: the network is not compiled.
    """
    make = TunedTrainer if spec.is_tuned else ReferenceTrainer
    return make(spec, model, mode=mode)


class ReferenceTrainer:
    """A trainer that steps as the reference code does.

    Attributes:
      spec: method, attack and optimizer.
      model: the network, updated in place by `step`.
      optimizer: SGD with weight decay on all parameters.
    """

    layout = torch.contiguous_format

    def __init__(self, spec: TwinSpec, model: nn.Module, *, mode: str | None = None):
        self.spec, self.model = spec, model.to(memory_format=self.layout)
        self._network = model if mode is None else torch.compile(model, mode=mode)
        fused = spec.is_tuned or None  # None: as PyTorch chooses
        self.optimizer = torch.optim.SGD(model.parameters(), **spec.sgd, fused=fused)

    def place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a batch on the device, in the memory layout of the step."""
        device = self.spec.device
        return images.to(device, memory_format=self.layout), labels.to(device)

    def step(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Outcome:
        """Takes a step; returns the batch's summed loss and number of right answers.

        Args:
          images: [B, C, H, W].
          labels: [B].
          start: the attack's first perturbation, a random one if not given.
        """
        if self.spec.method == "at":
            images = images + self.perturbation(images, labels, start)
        self.optimizer.zero_grad()
        loss, logits = self.loss(images, labels)
        loss.backward()
        if self.spec.method == "sam":
            self._take_gradient_at_ascended_weights(images, labels)
        self.optimizer.step()
        num_correct = (logits.argmax(dim=1) == labels).float().sum()
        return loss.detach() * len(labels), num_correct

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean cross entropy in float32, and the logits [B, K]."""
        spec = self.spec
        lower = spec.precision == "bfloat16" and spec.dtype == torch.float32
        with torch.autocast(spec.device, torch.bfloat16, enabled=lower):
            logits = self._network(images.to(spec.dtype))
        return F.cross_entropy(logits.float(), labels), logits

    def image_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss's gradient in the images, as the attack takes it."""
        images = images.detach().requires_grad_()
        self.loss(images, labels)[0].backward()
        assert images.grad is not None
        return images.grad

    def perturbation(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """Returns PGD's last iterate, less the images."""
        delta = self._random_start(images) if start is None else start
        delta = torch.clamp(delta, -images, 1 - images)
        for _ in range(self.spec.num_steps):
            gradient = self.image_gradient(images + delta, labels)
            delta = torch.clamp(self._ascend(delta, gradient), -images, 1 - images)
        return delta

    def _random_start(self, images: Tensor) -> Tensor:
        """Draws uniformly in linf; in l2 a uniform length in a random direction."""
        epsilon, delta = self.spec.epsilon, torch.empty_like(images)
        if self.spec.norm == "linf":
            return delta.uniform_(-epsilon, epsilon)
        lengths = torch.rand([len(images), 1, 1, 1], device=images.device) * epsilon
        delta.normal_()
        return delta * (lengths / _lengths(delta))

    def _ascend(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """Takes a step of `step_size`, projected onto the ball of radius `epsilon`."""
        epsilon, step_size = self.spec.epsilon, self.spec.step_size
        if self.spec.norm == "linf":
            return (delta + step_size * gradient.sign()).clamp(-epsilon, epsilon)
        direction = gradient / (_lengths(gradient) + L2_FLOOR)
        return torch.renorm(delta + step_size * direction, 2, 0, epsilon)

    def _take_gradient_at_ascended_weights(
        self, images: Tensor, labels: Tensor
    ) -> None:
        """Replaces the gradients at w by those at w + rho g / (||g|| + 1e-12)."""
        pairs = [(x, x.grad) for x in self.model.parameters() if x.grad is not None]
        params: Tensors = [param for param, _ in pairs]
        saved = [param.detach().clone() for param in params]
        with torch.no_grad():
            self._ascend_weights(params, [gradient for _, gradient in pairs])
        self.optimizer.zero_grad()
        self.loss(images, labels)[0].backward()
        self._put_back(params, saved)

    def _ascend_weights(self, params: Tensors, gradients: Tensors) -> None:
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = self.spec.rho / (norm + SAM_FLOOR)
        for param, gradient in zip(params, gradients, strict=True):
            param.add_(gradient * scale)

    def _put_back(self, params: Tensors, saved: Tensors) -> None:
        for param, value in zip(params, saved, strict=True):
            param.data = value


class TunedTrainer(ReferenceTrainer):
    """A trainer with the same parameters, step by step, as fast as PyTorch makes them.

    Convolutions in channels_last, gradients of the images alone in the attack, which
    leaves the running statistics as they are, one fused kernel for SGD and few for SAM.
    With `precision="bfloat16"` the network runs in autocast, its last linear layer
    too, and the loss in float32. `pure` has its parameters and momentum in bfloat16 as
    well: it reads and writes less than the other side, and loses small updates.
    """

    layout = torch.channels_last

    def image_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the gradient of the mean loss in the images, and no other."""
        images = images.detach().requires_grad_()
        return torch.autograd.grad(self.loss(images, labels)[0], images)[0]

    def perturbation(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """Returns PGD's last iterate, less the images."""
        with _frozen(self.model):
            return super().perturbation(images, labels, start)

    def _ascend_weights(self, params: Tensors, gradients: Tensors) -> None:
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        scale = self.spec.rho / (norm + SAM_FLOOR)
        torch._foreach_add_(params, torch._foreach_mul(gradients, scale))

    def _put_back(self, params: Tensors, saved: Tensors) -> None:
        with torch.no_grad():  # in place: a CUDA graph knows addresses
            torch._foreach_copy_(params, saved)


def capture(step: Step, images: Tensor, labels: Tensor) -> Step:
    """Returns the step as one CUDA graph, replayed on copies of its batches.

    Random starts differ from replay to replay. The step is taken three times before it
    is captured, for everything that is made at its first call: compiled programs,
    momentum buffers, the choice of algorithms.
    """
    images, labels = images.clone(), labels.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(images, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = step(images, labels)

    def replay(new_images: Tensor, new_labels: Tensor) -> Outcome:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        return outcome

    return replay


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Takes running statistics, and gradients of the parameters, out of the passes.

    A compiled backward pass computes all gradients that it could be asked for, so that
    asking for those of the images alone is not enough.
    """
    norms = [x for x in model.modules() if isinstance(x, nn.BatchNorm2d)]
    model.requires_grad_(False)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        model.requires_grad_(True)
        for norm in norms:
            norm.track_running_stats = True


def _lengths(values: Tensor) -> Tensor:
    """Returns the l2 norm of each example, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(values, dim=(1, 2, 3), keepdim=True)
