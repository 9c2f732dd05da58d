"""Our Square attack against upstream's, on one small network in both libraries.

Given the same random numbers both walk the same way, pixel by pixel; with their own
they reach the same robust accuracy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.attacks import cross_entropy, l2, linf, margin, square
from samrobust.attacks.draws import fold_in, split
from samrobust.attacks.square import L2Moves, LinfMoves, pulse, window_sizes

torch = pytest.importorskip("torch")
upstream = pytest.importorskip("pyautoattack.square")


KEY = jax.random.key(11)
LOSSES = {"margin": margin, "ce": cross_entropy}
BALLS = {"Linf": linf(0.1), "L2": l2(0.5)}


def make_attack(predict, norm, num_queries, **options):
    options = {"resc_schedule": False, "eps": BALLS[norm].radius, **options}
    return upstream.SquareAttack(predict, norm=norm, n_queries=num_queries, **options)


def make_pair(shape, seed=0):
    """A random network in JAX on NHWC and in PyTorch on NCHW, and its images."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    w1 = (2 * rng.standard_normal((size, 32)) / size**0.5).astype(np.float32)
    w2 = rng.standard_normal((32, 5)).astype(np.float32)
    images = rng.uniform(size=shape).astype(np.float32)

    def logits_fn(images):
        return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ w1) @ w2

    def predict(images):
        flat = images.permute(0, 2, 3, 1).reshape(len(images), -1)
        hidden = torch.tanh((flat - 0.5) @ torch.from_numpy(w1))
        return hidden @ torch.from_numpy(w2)

    labels = np.asarray(jnp.argmax(logits_fn(images), -1))
    return logits_fn, predict, images, labels


def to_torch(images, labels):
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


# Pieces


def test_pulses_equal_upstreams(monkeypatch):
    attack = make_attack(None, "L2", 1, device="cpu")
    monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, 0.25))
    for size in range(1, 34):
        np.testing.assert_allclose(pulse(size), attack.eta(size), atol=1e-6)


@pytest.mark.parametrize("p_init", [0.8, 0.3])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (8, 12, 1), (5, 4, 3)])
def test_the_windows_are_as_large_as_upstreams(shape, rescale, p_init):
    attack = make_attack(None, "L2", 5000, p_init=p_init, resc_schedule=rescale)
    height, width, channels = shape
    area = height * width * channels

    def upstreams(query, odd):
        side = round((attack.p_selection(query) * area / channels) ** 0.5)
        side = max(side, 3 if odd else 1)
        return min(side + (odd and side % 2 == 0), height, width)

    for odd in (False, True):
        sizes = window_sizes(5000, p_init, shape, rescale=rescale, odd=odd)
        np.testing.assert_array_equal(
            sizes, [upstreams(query, odd) for query in range(5000)]
        )


# The same walk


class Replay:
    """`torch.rand` that gives what ours drew, in the order in which upstream asks."""

    def __init__(self):
        self.numbers = []

    def __call__(self, shape):
        numbers = self.numbers.pop(0)
        assert list(numbers.shape) == list(shape)
        return torch.from_numpy(numbers.astype(np.float32))

    def add_signs(self, signs):  # [B, H, W, C], where upstream has [B, C, H, W]
        signs = np.asarray(signs).transpose(0, 3, 1, 2)
        self.numbers.append(np.where(signs > 0, 0.75, 0.25))

    def add_corner(self, corner, size, shape):
        for place, length in zip(corner[0], shape[1:3], strict=True):
            room = max(length - int(size), 1)
            self.numbers.append(np.array([(place + 0.5) / room]))

    def add_flip(self, flipped):
        self.numbers.append(np.array([0.75 if flipped else 0.25]))

    def add_start_linf(self, start, images):
        self.add_signs((start > images)[:, :1] * 2 - 1)

    def add_query_linf(self, draws, shape):
        self.add_corner(draws["corner"], draws["size"], shape)
        self.numbers.append(
            np.where(np.asarray(draws["signs"]).reshape(-1, 1, 1) > 0, 0.75, 0.25)
        )

    def add_start_l2(self, start, images):
        """Reads flips and signs off the tiles' corners."""
        delta = np.asarray(start - images)
        side = images.shape[1] // 5
        before = (images.shape[1] - 5 * side) // 2
        for row in range(images.shape[1] // side):
            for column in range(images.shape[2] // side):
                i, j = before + row * side, before + column * side
                tile = delta[:, i : i + side, j : j + side]
                assert tile.shape[1:3] == (side, side)
                # The halves differ in sign: upright, the upper right is as the first.
                flipped = tile[0, 0, 0, 0] * tile[0, 0, -1, 0] < 0
                self.add_flip(flipped)
                self.add_signs(np.sign(tile[:, :1, :1]))

    def add_query_l2(self, draws, shape):
        self.add_corner(draws["corner"], draws["size"], shape)
        self.add_corner(draws["source"], draws["size"], shape)
        self.add_flip(draws["flipped"][0])
        self.add_signs(draws["signs"])


WALKS = [  # some of the examples are broken at these radii, and some are not
    (linf(0.1), (1, 8, 8, 1), "margin"),
    (linf(0.02), (1, 6, 9, 3), "ce"),
    (l2(0.4), (1, 10, 10, 3), "margin"),
    (l2(0.4), (1, 11, 10, 1), "ce"),
]


@pytest.mark.parametrize(("ball", "shape", "loss"), WALKS)
def test_with_the_same_random_numbers_the_walk_is_upstreams(
    ball, shape, loss, monkeypatch
):
    """One example at a time: upstream draws numbers only for those not yet broken."""
    num_queries, num_images = 120, 6
    logits_fn, predict, images, labels = make_pair((num_images, *shape[1:]))
    images = np.clip(images, 0.15, 0.85)  # inside, so that signs can be read off
    labels = np.asarray(jnp.argmax(logits_fn(images), -1))
    norm, moves_of = {2: ("L2", L2Moves)}.get(ball.order, ("Linf", LinfMoves))
    attack = square(ball, num_queries=num_queries, loss=LOSSES[loss])
    own = KEY[None]
    ours = jax.jit(lambda image, label: attack(logits_fn, image, label, key=own))
    sizes = window_sizes(
        num_queries, 0.8, shape[1:], rescale=False, odd=moves_of is L2Moves
    )
    start_key, query_key = split(fold_in(own, 0))
    queries = jnp.arange(num_queries)
    keys = jax.vmap(fold_in, (None, 0))(query_key, queries)
    still = moves_of(jnp.asarray(images[:1]), ball.radius, (0.0, 1.0), sizes)
    draws = jax.device_get(jax.jit(jax.vmap(still.draw))(queries, keys))
    start = np.asarray(jax.jit(still.start)(start_key))
    replay = Replay()
    name = norm.lower()
    getattr(replay, f"add_start_{name}")(start, images[:1])
    for query in range(num_queries):
        drawn = {part: values[query] for part, values in draws.items()}
        getattr(replay, f"add_query_{name}")(drawn, shape)
    numbers = list(replay.numbers)
    monkeypatch.setattr(torch, "rand", replay)
    broken = 0
    for index in range(num_images):
        one = slice(index, index + 1)
        replay.numbers = list(numbers)
        theirs = make_attack(predict, norm, num_queries, loss=loss, eps=ball.radius)
        pixels, label = to_torch(images[one], labels[one])
        theirs.init_hyperparam(pixels)
        _, expected = theirs.attack_single_run(pixels, label)
        broken += int(predict(expected).argmax(1) != label)
        np.testing.assert_allclose(
            ours(images[one], labels[one]),
            expected.numpy().transpose(0, 2, 3, 1),
            atol=2e-6,
        )
    assert 0 < broken < num_images


# The same robust accuracy


@pytest.mark.parametrize("norm", BALLS)
def test_the_robust_accuracy_lies_within_the_spread_of_upstreams_seeds(norm):
    logits_fn, predict, images, labels = make_pair((200, 10, 10, 1), seed=3)
    attack = square(BALLS[norm], num_queries=100)
    ours = jax.jit(lambda x, y, key: attack(logits_fn, x, y, key=key))
    pixels, targets = to_torch(images, labels)

    def robust(adversarial):
        return float(np.mean(np.argmax(adversarial, -1) == labels))

    expected, reached = [], []
    for seed in range(8):
        theirs = make_attack(predict, norm, 100, seed=seed)
        with torch.random.fork_rng():
            adversarial = theirs.perturb(pixels, targets)
        expected.append(robust(predict(adversarial).numpy()))
        reached.append(robust(logits_fn(ours(images, labels, jax.random.key(seed)))))
    assert 0.1 < np.mean(expected) < 0.9
    spread = np.std(expected, ddof=1)
    # Four standard errors of the difference of two means of eight runs.
    assert abs(np.mean(reached) - np.mean(expected)) <= 4 * spread * (2 / 8) ** 0.5
    assert min(expected) - spread <= np.median(reached) <= max(expected) + spread
