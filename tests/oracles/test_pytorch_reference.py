"""The PyTorch benchmark: what it prints, what it refuses, and that its steps are right.

The parity file is made by our network and training step, so that its gate is held to
what it is there for. The steps are held to the oracle in `torch_twin`.
"""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samrobust.attacks.losses import cross_entropy
from samrobust.experiments.robustbench import with_normalization
from samrobust.models import PreActResNet
from samrobust.models.torch.names import to_tensors
from samrobust.models.torch.weights import Weights
from samrobust.training import make_train_step

torch = pytest.importorskip("torch")
twin = pytest.importorskip("torch_twin")
benchmark = pytest.importorskip("samrobust.studies.bench.twin.reference")
steps = pytest.importorskip("samrobust.studies.bench.twin.steps")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
NETWORK = {"width": 8, "blocks": [1, 1], "num_classes": 10, "in_channels": 3}
SPEC = {
    "method": "st",
    "variant": "reference",
    "batch_size": 4,
    "precision": "float32",
    "float32_matmul": "highest",
    "device": "cpu",
    "network": NETWORK,
    "mean": MEAN,
    "std": STD,
    "image_shape": [8, 8, 3],
    "norm": "linf",
    "epsilon": 8 / 255,
    "step_size": 2 / 255,
    "num_steps": 2,
    "rho": 0.1,
    "sgd": SGD,
    "repeats": 2,
    "min_seconds": 0.01,
}
VARIANTS = ["reference", "tuned"]


def make_parity() -> dict[str, Any]:
    """The content of a parity file, by our network and one of our training steps."""
    model = PreActResNet(width=8, blocks=(1, 1), mean=MEAN, std=STD)
    tx = optax.chain(
        optax.with_extra_args_support(optax.add_decayed_weights(SGD["weight_decay"])),
        optax.sgd(SGD["lr"], momentum=SGD["momentum"]),
    )
    init, step = make_train_step(model, tx)
    state = jax.jit(init)(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(4, 8, 8, 3)).astype(np.float32)
    labels = jnp.asarray(rng.integers(0, 10, 4))

    def loss(images) -> Any:
        logits: Any = model.apply(state.variables, images, train=True)
        return jnp.sum(cross_entropy(logits, labels)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(images)
    updated, _ = jax.jit(step)(state, images, labels, jax.random.key(1))
    weights = Weights(to_tensors(state.variables, model), {"mean": MEAN, "std": STD})
    moved = to_tensors({"params": updated.params}, model)
    return {
        **{f"network/{name}": x for name, x in with_normalization(weights).items()},
        **{f"updated/model.{name}": x for name, x in moved.items()},
        "images": images,
        "labels": np.asarray(labels),
        "logits": np.asarray(logits),
        "image_gradient": np.asarray(gradient),
    }


@pytest.fixture(scope="module")
def arrays():
    return make_parity()


@pytest.fixture(scope="module")
def parity_file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "parity.npz"
    np.savez(path, **arrays)
    return path


def run_script(parity_file, **changes):
    spec = json.dumps(SPEC | changes | {"parity": str(parity_file)})
    command = [sys.executable, "-m", benchmark.__name__, spec]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make_spec(**changes):
    network = NETWORK | {k: changes.pop(k) for k in NETWORK if k in changes}
    return steps.TwinSpec(**SPEC | {"network": network} | changes)


# --- the script -----------------------------------------------------------------------


def check_results(results, variant=SPEC["variant"]):
    told = {"seconds", "peak_memory", "parity", "versions", "float32_matmul"}
    assert results.keys() == told
    assert len(results["seconds"]) == 2
    assert min(results["seconds"]) > 0
    assert results["peak_memory"] > 2**20
    exact = {"logits", "image_gradient", "update"}
    assert max(results["parity"][name] for name in exact) < 1e-4
    of_step = {"step_loss", "step_gradient"} if variant == "tuned" else set()
    assert results["parity"].keys() == exact | of_step
    assert results["versions"]["torch"] == torch.__version__


def test_the_last_line_holds_the_results(parity_file):
    done = run_script(parity_file)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    check_results(json.loads(line))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sam", "variant": "resident"},
        {"method": "at", "variant": "reference", "norm": "l2", "epsilon": 0.5},
        {"method": "at", "variant": "tuned"},
        {"method": "sam", "variant": "tuned", "precision": "bfloat16"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_method_and_variant_has_its_results(changes, arrays):
    with torch.random.fork_rng():
        results = benchmark.run(make_spec(**changes), arrays)
        check_results(results, changes["variant"])


def test_another_network_is_refused_with_its_deviation(arrays):
    name = "network/model.layer2.0.conv1.weight"
    kernel = arrays[name].copy()
    kernel[0, 0, 0, 0] += 0.01
    perturbed = arrays | {name: kernel}
    with pytest.raises(ValueError, match="Expected deviations from the") as error:
        benchmark.run(make_spec(), perturbed)
    message = str(error.value)
    assert "parity file logits <= 1e-05" in message
    assert float(message.split("got logits=")[1].split(",")[0]) > 1e-5


def test_a_bad_spec_ends_the_script_with_its_message(parity_file):
    done = run_script(parity_file, method="trades")
    assert done.returncode == 1
    assert not done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert "Expected method in {st, sam, at}, got method='trades'." in message


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("variant", "fast"), ("precision", "bfloat16")]
)
def test_a_choice_that_there_is_not_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"Expected .* got .*{field}="):
        make_spec(**{field: value})


def test_a_parity_file_of_another_network_is_refused(arrays):
    with pytest.raises(ValueError, match=r"layer3\.0\.bn1"):
        benchmark.parity(make_spec(blocks=[1, 1, 1]), arrays)
    with pytest.raises(ValueError, match="shape"):
        benchmark.parity(make_spec(width=16), arrays)
    rest = {name: value for name, value in arrays.items() if name != "logits"}
    with pytest.raises(ValueError, match=r"missing=\['logits'\]"):
        benchmark.parity(make_spec(), rest)


# --- the steps ------------------------------------------------------------------------


def values_of(model):
    """Copies of a network's parameters and running statistics, by their names."""
    kinds = {"params": model.named_parameters(), "batch_stats": model.named_buffers()}
    return {
        kind: {name: tensor.detach().float().numpy().copy() for name, tensor in named}
        for kind, named in kinds.items()
    }


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(size=(8, 3, 8, 8)).astype(np.float32)
    delta = rng.uniform(-8 / 255, 8 / 255, images.shape).astype(np.float32)
    labels = torch.from_numpy(rng.integers(0, 10, 8))
    return torch.from_numpy(images), labels, torch.from_numpy(delta)


def make_model(spec):
    """The spec's network with every ReLU away from its kink, see test_against_torch."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = steps.make_model(spec)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(0.3)
                module.bias.copy_(torch.sign(torch.randn_like(module.bias)) * 2.0)
    return model


def train(steps_taken=2, *, mode=None, **changes):
    """Variables after a few steps on one batch, from a fixed start of the attack."""
    spec = make_spec(**changes)
    trainer = steps.make_trainer(spec, make_model(spec), mode=mode)
    images, labels, delta = make_batch()
    for _ in range(steps_taken):
        trainer.step(*trainer.place(images, labels), start=delta)
    return values_of(trainer.model)


def train_by_the_oracle(method, norm, epsilon, steps_taken=2):
    model = make_model(make_spec(method=method))
    optimizer = twin.sgd(model.parameters(), *SGD.values())
    images, labels, delta = make_batch()
    ball = epsilon, SPEC["step_size"], SPEC["num_steps"]
    # The reference's 1e-10 on the mean loss's gradient, on that of the sum.
    floor = {"l2": {"floor": len(labels) * 1e-10}}
    pgd = {"linf": twin.pgd_linf, "l2": twin.pgd_l2}[norm]

    def attack(model, images, labels):
        start = (images + delta).clamp(0, 1)
        options = {"start": start, "train": True, "update_statistics": True}
        options |= floor.get(norm, {})
        return pgd(model, images, labels, *ball, **options)

    for _ in range(steps_taken):
        if method == "sam":
            twin.train_step_sam(model, optimizer, images, labels, SPEC["rho"])
        elif method == "at":
            twin.train_step_at(model, optimizer, images, labels, attack)
        else:
            twin.train_step_st(model, optimizer, images, labels)
    return values_of(model)


def largest_difference(first, second):
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), first, second)
    return max(jax.tree.leaves(gaps))


METHODS = {
    "st": ("st", "linf", 8 / 255),
    "sam": ("sam", "linf", 8 / 255),
    "at linf": ("at", "linf", 8 / 255),
    "at l2": ("at", "l2", 0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", METHODS)
def test_steps_reach_the_parameters_of_the_oracle(name, variant):
    method, norm, epsilon = METHODS[name]
    ours = train(method=method, norm=norm, epsilon=epsilon, variant=variant)
    expected = train_by_the_oracle(method, norm, epsilon)
    assert largest_difference(ours["params"], expected["params"]) <= 1e-5
    start = values_of(make_model(make_spec()))
    assert largest_difference(ours["params"], start["params"]) > 1e-2


def test_only_the_reference_updates_running_statistics_in_the_attack():
    expected = train_by_the_oracle("at", "linf", 8 / 255)
    published, tuned = (train(method="at", variant=variant) for variant in VARIANTS)
    gap = largest_difference(published["batch_stats"], expected["batch_stats"])
    assert gap <= 1e-5
    gap = largest_difference(published["batch_stats"], tuned["batch_stats"])
    assert gap > 1e-3
    gap = largest_difference(published["params"], tuned["params"])
    assert gap <= 1e-5


def test_only_the_tuned_attack_leaves_the_gradients_of_the_weights_alone():
    images, labels, delta = make_batch()
    for variant in VARIANTS:
        spec = make_spec(method="at", variant=variant)
        trainer = steps.make_trainer(spec, make_model(spec))
        trainer.perturbation(*trainer.place(images, labels), delta)
        computed = [x.grad is not None for x in trainer.model.parameters()]
        assert set(computed) == {variant == "reference"}
        assert all(x.requires_grad for x in trainer.model.parameters())


@pytest.mark.filterwarnings("ignore")  # those of the compiler's own imports
def test_compiled_steps_reach_the_parameters_of_the_reference(monkeypatch):
    # Traced and differentiated as ever, but without Inductor's half a minute.
    compile_network = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda model, **_: compile_network(model, backend="aot_eager"),
    )
    options = {"method": "at", "blocks": [1]}
    compiled = train(variant="compiled", mode="default", **options)
    expected = train(variant="reference", **options)
    assert largest_difference(compiled["params"], expected["params"]) <= 1e-5


def test_gradients_in_bfloat16_are_those_in_float32_but_for_rounding(arrays):
    spec = make_spec(variant="pure", precision="bfloat16", method="sam")
    model = benchmark._loaded_model(spec, arrays)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    trainer = steps.make_trainer(spec, model)
    found = benchmark.first_step(trainer, arrays)
    assert 0 < found["step_gradient"] < benchmark.STEP_TOLERANCES["bfloat16"]
    assert found["step_loss"] < 0.02
    assert max(benchmark.parity(spec, arrays).values()) < 1e-4


def test_a_step_that_does_something_else_than_its_plain_code_is_not_timed(
    arrays, monkeypatch
):
    spec = make_spec(variant="tuned")
    wrong = steps.TunedTrainer.loss

    def loss(self, images, labels):
        value, logits = wrong(self, images, labels)
        return (value if self.model is not timed else value / 2), logits

    timed = benchmark._loaded_model(spec, arrays)
    trainer = steps.make_trainer(spec, timed)
    monkeypatch.setattr(steps.TunedTrainer, "loss", loss)
    assert benchmark.first_step(trainer, arrays)["step_gradient"] > 0.2
    monkeypatch.setattr(benchmark, "first_step", lambda *_: {"step_gradient": 0.06})
    with pytest.raises(ValueError, match=r"a step within 0\.02 .* step_gradient=0\.06"):
        benchmark.run(spec, arrays)


def test_a_graph_wants_a_cuda_device():
    with pytest.raises(ValueError, match="device='cuda' of variant='graphed'"):
        make_spec(variant="graphed")
    spec = make_spec(variant="graphed", device="cuda")
    assert (spec.is_graphed, spec.compiler_mode) == (True, None)
    assert not make_spec(variant="tuned", device="cuda").is_graphed
    assert make_spec(variant="autotuned").compiler_mode == "max-autotune-no-cudagraphs"


@pytest.mark.parametrize(("norm", "order"), [("linf", float("inf")), ("l2", 2.0)])
def test_random_starts_lie_in_the_ball_and_the_images_in_the_box(norm, order):
    spec = make_spec(method="at", norm=norm, epsilon=0.5, num_steps=0)
    trainer = steps.make_trainer(spec, make_model(spec))
    images, labels, _ = make_batch()
    delta = trainer.perturbation(images, labels)
    length = torch.linalg.vector_norm(delta.flatten(1), order, dim=1)
    assert length.max() <= 0.5 + 1e-6
    assert length.max() > 0.1
    assert (images + delta).min() >= 0
    assert (images + delta).max() <= 1


# --- the batches ----------------------------------------------------------------------


def test_the_pool_has_four_batches_like_the_data_and_is_always_the_same():
    spec = make_spec(batch_size=64)
    first, again = (benchmark.make_pool(spec) for _ in range(2))
    for batch, same in zip(first, again, strict=True):
        assert torch.equal(batch[0], same[0])
        assert torch.equal(batch[1], same[1])
    images = torch.cat([images for images, _ in first]).numpy()
    assert images.shape == (256, 3, 8, 8)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_allclose(images.mean(axis=(0, 2, 3)), MEAN, atol=0.02)
    np.testing.assert_allclose(images.std(axis=(0, 2, 3)), STD, atol=0.05)
    assert not torch.equal(first[0][0], first[1][0])
