"""The training steps that are timed: ST, SAM and AT, as published and tuned.

`ReferenceTrainer` does what the paper's PyTorch code and davda54's SAM do, written
anew from the facts about them: PGD calls `backward`, which computes the gradients of
all weights to throw them away, and updates the running statistics at every step.
`TunedTrainer` computes the same parameters in the ways PyTorch offers to do it fast.

Images are [B, C, H, W] float32 in [0, 1], labels int64 [B], on the model's device.

Out of scope: data, schedules, what is timed and how.

Reference: Wei, Zhu and Zhang, 2023, arXiv 2305.05392; Foret et al., 2021, arXiv
2010.01412; Madry et al., 2018, arXiv 1706.06083.
"""

# pyright: reportPrivateImportUsage=false, reportCallIssue=false
import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own custom
from torch import Tensor, nn

from samrobust.studies.bench.twin.network import PreActResNet
from samrobust.studies.bench.twin.spec import Spec

__all__ = [
    "ReferenceTrainer",
    "Step",
    "TunedTrainer",
    "capture",
    "make_model",
    "make_trainer",
]

Outcome = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], Outcome]

SAM_FLOOR = 1e-12  # davda54/sam adds it to the norm of the gradient
L2_FLOOR = 1e-10  # the reference adds it to the norm of the mean loss's gradient


def make_model(spec: Spec) -> PreActResNet:
    """The network in train mode on the spec's device."""
    model = PreActResNet(
        width=spec.width,
        blocks=spec.blocks,
        num_classes=spec.num_classes,
        in_channels=spec.image_shape[-1],
        mean=[float(x) for x in spec.mean],
        std=[float(x) for x in spec.std],
    )
    return model.to(spec.device).train()


def make_trainer(
    spec: Spec, model: PreActResNet, *, compiled: bool = False
) -> "ReferenceTrainer":
    """The trainer of the spec's variant; `compiled` is for the tuned ones."""
    if spec.is_tuned:
        return TunedTrainer(spec, model, compiled=compiled)
    return ReferenceTrainer(spec, model)


class ReferenceTrainer:
    """The training step as the reference code takes it.

    Attributes:
      spec: method, attack and optimizer.
      model: the network, updated in place by `step`.
      optimizer: SGD with weight decay on all parameters.
    """

    def __init__(self, spec: Spec, model: PreActResNet):
        self.spec = spec
        self.model = model
        self.optimizer = self._make_optimizer()

    def place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, in the memory format of the step."""
        device = self.spec.device
        return images.to(device), labels.to(device)

    def step(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Outcome:
        """One step; the summed loss of the batch, and the number of right answers.

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
        """The mean cross entropy, and the logits [B, K]."""
        logits = self.model(images)
        return F.cross_entropy(logits, labels), logits

    def image_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the mean loss in the images, as the attack takes it."""
        images = images.detach().requires_grad_()
        self.loss(images, labels)[0].backward()
        assert images.grad is not None
        return images.grad

    def perturbation(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """PGD's last iterate, less the images."""
        delta = self._random_start(images) if start is None else start
        delta = torch.clamp(delta, -images, 1 - images)
        for _ in range(self.spec.num_steps):
            gradient = self.image_gradient(images + delta, labels)
            delta = torch.clamp(self._ascend(delta, gradient), -images, 1 - images)
        return delta

    def _random_start(self, images: Tensor) -> Tensor:
        """Uniform in the linf ball; in l2 a uniform length in a random direction."""
        epsilon, delta = self.spec.epsilon, torch.empty_like(images)
        if self.spec.norm == "linf":
            return delta.uniform_(-epsilon, epsilon)
        lengths = torch.rand([len(images), 1, 1, 1], device=images.device) * epsilon
        delta.normal_()
        return delta * (lengths / _lengths(delta))

    def _ascend(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """A step of `step_size`, projected onto the ball of radius `epsilon`."""
        epsilon, step_size = self.spec.epsilon, self.spec.step_size
        if self.spec.norm == "linf":
            return (delta + step_size * gradient.sign()).clamp(-epsilon, epsilon)
        direction = gradient / (_lengths(gradient) + L2_FLOOR)
        return torch.renorm(delta + step_size * direction, 2, 0, epsilon)

    def _make_optimizer(self, **options: bool) -> torch.optim.SGD:
        return torch.optim.SGD(
            self.model.parameters(),
            lr=self.spec.learning_rate,
            momentum=self.spec.momentum,
            weight_decay=self.spec.weight_decay,
            **options,
        )

    def _take_gradient_at_ascended_weights(
        self, images: Tensor, labels: Tensor
    ) -> None:
        """Replaces the gradients at w by those at w + rho g / (||g|| + 1e-12)."""
        params, gradients = self._params_and_gradients()
        saved = [param.detach().clone() for param in params]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = self.spec.rho / (norm + SAM_FLOOR)
        with torch.no_grad():
            for param, gradient in zip(params, gradients, strict=True):
                param.add_(gradient * scale)
        self.optimizer.zero_grad()
        self.loss(images, labels)[0].backward()
        for param, value in zip(params, saved, strict=True):
            param.data = value

    def _params_and_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(x, x.grad) for x in self.model.parameters() if x.grad is not None]
        return [param for param, _ in pairs], [gradient for _, gradient in pairs]


class TunedTrainer(ReferenceTrainer):
    """The same parameters, step by step, as fast as stock PyTorch makes them.

    Convolutions in channels_last, gradients of the images alone in the attack, which
    leaves the running statistics as they are, one fused kernel for SGD and few for SAM.
    With `precision="bfloat16"` the network runs in autocast, its last linear layer
    too, and the loss in float32.
    """

    def __init__(self, spec: Spec, model: PreActResNet, *, compiled: bool = False):
        super().__init__(spec, model.to(memory_format=torch.channels_last))
        # Mode "default": Inductor fuses what lies between the convolutions. It has no
        # templates for their gradients, so that "max-autotune" would spend minutes on
        # the forward passes alone; `capture` takes its CUDA graph of the whole step.
        self._network = torch.compile(model) if compiled else model

    def place(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A batch on the device, in channels_last."""
        images, labels = super().place(images, labels)
        return images.contiguous(memory_format=torch.channels_last), labels

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross entropy in float32, and the logits [B, K]."""
        lower = self.spec.precision == "bfloat16"
        with torch.autocast(self.spec.device, torch.bfloat16, enabled=lower):
            logits = self._network(images)
        return F.cross_entropy(logits.float(), labels), logits

    def image_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the mean loss in the images, and no other."""
        images = images.detach().requires_grad_()
        return torch.autograd.grad(self.loss(images, labels)[0], images)[0]

    def perturbation(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """PGD's last iterate, less the images."""
        with _frozen(self.model):
            return super().perturbation(images, labels, start)

    def _make_optimizer(self, **options: bool) -> torch.optim.SGD:
        return super()._make_optimizer(fused=True, **options)

    def _take_gradient_at_ascended_weights(
        self, images: Tensor, labels: Tensor
    ) -> None:
        params, gradients = self._params_and_gradients()
        saved = [param.detach().clone() for param in params]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        scale = self.spec.rho / (norm + SAM_FLOOR)
        with torch.no_grad():
            torch._foreach_add_(params, torch._foreach_mul(gradients, scale))
        self.optimizer.zero_grad()
        self.loss(images, labels)[0].backward()
        with torch.no_grad():
            torch._foreach_copy_(params, saved)


def capture(step: Step, images: Tensor, labels: Tensor) -> Step:
    """The step as one CUDA graph, replayed on copies of the batches it is given.

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
    """Batch statistics without running ones, and no gradients of the parameters.

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
    """The l2 norm of each example, [B, 1, 1, 1]."""
    return torch.linalg.vector_norm(values, dim=(1, 2, 3), keepdim=True)
