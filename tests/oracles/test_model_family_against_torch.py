"""The networks of `MODELS` against PyTorch twins of the same weights, in float64.

The twins are written from the papers and their authors' code: blocks out of
`torch.nn`, the vision transformer's being PyTorch's own encoder layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.models import ResNet, ViT, WideResNet

torch = pytest.importorskip("torch")
nn = torch.nn

MEAN, STD = (0.4, 0.5), (0.2, 0.3)


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def theirs(values: Any) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def conv(inputs: int, outputs: int, window: int = 3, stride: int = 1) -> Any:
    return nn.Conv2d(inputs, outputs, window, stride, window // 2, bias=False)


class Twin(nn.Module):
    """Normalizes pixels, and averages over them."""

    def forward(self, images: Any) -> Any:
        mean, std = (theirs(v).reshape(1, 2, 1, 1) for v in (MEAN, STD))
        return self.head(self.features((images - mean) / std))


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1, self.conv2 = (
            conv(inputs, outputs, 3, stride),
            conv(outputs, outputs),
        )
        self.equal = inputs == outputs
        if not self.equal:
            self.shortcut = conv(inputs, outputs, 1, stride)

    def forward(self, inputs: Any) -> Any:
        active = torch.relu(self.norm1(inputs))
        hidden = self.conv2(torch.relu(self.norm2(self.conv1(active))))
        return hidden + (inputs if self.equal else self.shortcut(active))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.conv2 = (
            conv(inputs, outputs, 3, stride),
            conv(outputs, outputs),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = conv(inputs, outputs, 1, stride)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, inputs: Any) -> Any:
        hidden = torch.relu(self.norm1(self.conv1(inputs)))
        hidden = self.norm2(self.conv2(hidden))
        if self.projects:
            inputs = self.shortcut_norm(self.shortcut(inputs))
        return torch.relu(hidden + inputs)


def add_stages(model: Any, block: Any, stem: int, widths: Any, counts: Any) -> None:
    channels = stem
    for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for j in range(count):
            name, stride = f"stage{i + 1}_block{j + 1}", 2 if i and not j else 1
            model.add_module(name, block(channels, width, stride))
            channels = width
    model.names = [name for name, _ in model.named_children() if "block" in name]
    model.head = nn.Linear(channels, 3)


class WideTwin(Twin):
    """WRN-16-1."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(2, 16), nn.BatchNorm2d(64)
        add_stages(self, WideBlock, 16, (16, 32, 64), (2, 2, 2))

    def features(self, hidden: Any) -> Any:
        hidden = self.stem(hidden)
        for name in self.names:
            hidden = self.get_submodule(name)(hidden)
        return torch.relu(self.norm(hidden)).mean((2, 3))


class ResNetTwin(Twin):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(2, 4), nn.BatchNorm2d(4)
        add_stages(self, BasicBlock, 4, (4, 8), (1, 2))

    def features(self, hidden: Any) -> Any:
        hidden = torch.relu(self.norm(self.stem(hidden)))
        for name in self.names:
            hidden = self.get_submodule(name)(hidden)
        return hidden.mean((2, 3))


class ViTTwin(Twin):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Conv2d(2, 8, 2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(8))
        self.positions = nn.Parameter(torch.zeros(1 + 3 * 4, 8))
        for i in (1, 2):
            layer = nn.TransformerEncoderLayer(
                8, 2, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
            )
            self.add_module(f"block{i}", layer)
        self.norm, self.head = nn.LayerNorm(8, 1e-6), nn.Linear(8, 3)

    def features(self, hidden: Any) -> Any:
        patches = self.embedding(hidden).flatten(2).transpose(1, 2)
        token = self.class_token.expand(len(patches), 1, -1)
        tokens = torch.cat([token, patches], 1) + self.positions
        return self.norm(self.block2(self.block1(tokens)))[:, 0]


FAMILY = {
    "WRN-16-1": (WideTwin, WideResNet, {"depth": 16, "widen": 1}),
    "ResNet": (ResNetTwin, ResNet, {"width": 4, "blocks": (1, 2)}),
    "ViT": (ViTTwin, ViT, {"patch": 2, "dim": 8, "depth": 2, "heads": 2}),
}
_RENAMED = {
    "self_attn.in_proj_": "qkv.",
    "self_attn.out_proj": "projection",
    "linear1": "mlp1",
    "linear2": "mlp2",
}


def to_jax(model: Any) -> dict[str, Any]:
    """The tensors of a twin by our names and in our layouts."""
    variables: dict[str, Any] = {"params": {}}
    for name, tensor in model.state_dict().items():
        for theirs, ours in _RENAMED.items():
            name = name.replace(theirs, ours)
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        array = tensor.numpy()
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        if path == ["embedding"] and leaf == "weight":
            array = array.reshape(-1, array.shape[-1])
        elif leaf == "weight" and array.ndim == 2:
            array = array.T
        collection = "batch_stats" if "running" in leaf else "params"
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        node = variables.setdefault(collection, {})
        for part in path:
            node = node.setdefault(part, {})
        node[leaf.removeprefix("running_")] = np.array(array)
    return variables


def make_twin(kind: Any) -> Any:
    """A twin in float64, none of whose weights and statistics is left at 0 or 1."""
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_logits_gradients_and_statistics_are_those_of_the_twin(name, train):
    kind, entry, fields = FAMILY[name]
    model = entry(num_classes=3, mean=MEAN, std=STD, dtype=jnp.float64, **fields)
    twin = make_twin(kind).train(train)
    variables = to_jax(twin)
    images = np.random.default_rng(0).uniform(size=(4, 6, 8, 2))
    pixels = theirs(images.transpose(0, 3, 1, 2)).requires_grad_()
    expected = twin(pixels)
    torch.cos(expected).sum().backward()

    @jax.jit
    def run(variables: Any, images: Any) -> Any:
        def total(images: Any) -> Any:
            logits, updated = model.apply(
                variables, images, train=train, mutable=["batch_stats"]
            )
            return jnp.cos(logits).sum(), (logits, updated)

        return jax.grad(total, has_aux=True)(images)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    gradient, (logits, updated) = run(variables, images)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-10)
    image_gradient = pixels.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, image_gradient, atol=1e-10)
    assert np.abs(image_gradient).max() > 1e-4
    after = to_jax(twin).get("batch_stats", {})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        updated.get("batch_stats", {}),
        after,
    )


def test_the_twin_has_the_parameters_of_resnet_18_and_wrn_28_10():
    """Counted by PyTorch, without memory for them."""
    with torch.device("meta"):
        wide, plain = Twin(), Twin()
        wide.stem, wide.norm = conv(3, 16), nn.BatchNorm2d(640)
        add_stages(wide, WideBlock, 16, (160, 320, 640), (4, 4, 4))
        wide.head = nn.Linear(640, 10)
        plain.stem, plain.norm = conv(3, 64), nn.BatchNorm2d(64)
        add_stages(plain, BasicBlock, 64, (64, 128, 256, 512), (2, 2, 2, 2))
        plain.head = nn.Linear(512, 10)
    assert sum(p.numel() for p in wide.parameters()) == 36_479_194
    assert sum(p.numel() for p in plain.parameters()) == 11_173_962
