"""Batches and augmentation, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samrobust.data import epoch_permutation, random_crop_and_flip, take_batch

KEY = jax.random.key(7)
augment = jax.jit(random_crop_and_flip, static_argnames=("padding", "flip"))


def windows(image: np.ndarray, padding: int, flip: bool) -> list[np.ndarray]:
    """All crops of the padded image, then their mirror images, by loops."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), "reflect")
    crops = [
        padded[top : top + height, left : left + width]
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    ]
    return crops + [crop[:, ::-1] for crop in crops] if flip else crops


def which_windows(inputs, outputs, padding, flip) -> list[int]:
    """The number of the window that each output is; fails if it is none."""
    found = []
    for image, output in zip(inputs, np.asarray(outputs), strict=True):
        candidates = windows(image, padding, flip)
        matches = [
            i for i, crop in enumerate(candidates) if np.array_equal(crop, output)
        ]
        assert matches
        found.append(matches[0])
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("shape", "padding"), [((8, 6, 3), 2), ((5, 5, 1), 4)])
def test_every_output_is_one_window_of_the_padded_image(shape, padding, flip, dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (16, *shape)).astype(dtype)
    outputs = augment(images, padding=padding, flip=flip, key=KEY)
    assert outputs.shape == images.shape
    assert outputs.dtype == images.dtype
    assert len(set(which_windows(images, outputs, padding, flip))) > 1


def test_all_windows_are_equally_likely():
    image = np.arange(48, dtype=np.float32).reshape(1, 4, 4, 3)
    images = np.repeat(image, 1800, axis=0)
    outputs = np.asarray(augment(images, padding=1, flip=True, key=KEY))
    candidates = np.stack(windows(image[0], 1, True))
    same = (outputs[:, None] == candidates[None]).all(axis=(2, 3, 4))
    counts = same.sum(axis=0)
    assert counts.sum() == 1800
    expected = 1800 / 18
    # Chi-square with 17 degrees of freedom exceeds 40.8 with probability 0.001.
    assert ((counts - expected) ** 2 / expected).sum() < 40.8


def test_crops_of_different_examples_are_independent():
    images = np.repeat(
        np.arange(48.0, dtype=np.float32).reshape(1, 4, 4, 3), 64, axis=0
    )
    outputs = np.asarray(augment(images, padding=3, flip=True, key=KEY))
    assert len({output.tobytes() for output in outputs}) > 20


def test_without_padding_and_flip_the_images_are_untouched():
    images = jnp.ones([2, 4, 4, 3])
    assert random_crop_and_flip(images, padding=0, flip=False, key=KEY) is images


def test_flip_alone_mirrors_about_half_of_the_images():
    images = np.random.default_rng(1).random((200, 4, 4, 1)).astype(np.float32)
    outputs = augment(images, padding=0, flip=True, key=KEY)
    mirrored = sum(which_windows(images, outputs, 0, True))
    assert 70 <= mirrored <= 130


def test_augmentation_is_a_function_of_its_key_and_the_same_inside_jit():
    images = np.random.default_rng(2).random((8, 6, 6, 3)).astype(np.float32)
    traces = []

    @jax.jit
    def compiled(images, key):
        traces.append(None)
        return random_crop_and_flip(images, padding=2, flip=True, key=key)

    other_key = jax.random.key(8)
    for key in (KEY, KEY, other_key):
        plain = random_crop_and_flip(images, padding=2, flip=True, key=key)
        np.testing.assert_array_equal(compiled(images, key), plain)
    assert len(traces) == 1
    assert not np.array_equal(compiled(images, KEY), compiled(images, other_key))


@pytest.mark.parametrize("padding", [-1, 4])
def test_padding_outside_of_the_image_is_refused(padding):
    with pytest.raises(ValueError, match=rf"0 <= padding < 4, got padding={padding}\."):
        random_crop_and_flip(
            jnp.ones([2, 6, 4, 3]), padding=padding, flip=True, key=KEY
        )


def test_images_without_a_batch_axis_are_refused():
    with pytest.raises(ValueError, match=r"Expected images of shape \[B, H, W, C\]"):
        random_crop_and_flip(jnp.ones([6, 4, 3]), padding=1, flip=True, key=KEY)


@pytest.mark.parametrize("num_examples", [1, 2, 1000])
def test_an_epoch_permutation_holds_every_index_once(num_examples):
    order = epoch_permutation(KEY, 0, num_examples)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(num_examples))


def test_an_epoch_permutation_depends_on_key_and_epoch_only():
    compiled = jax.jit(epoch_permutation, static_argnums=2)
    orders = [np.asarray(epoch_permutation(KEY, epoch, 100)) for epoch in range(3)]
    for epoch, order in enumerate(orders):
        np.testing.assert_array_equal(compiled(KEY, epoch, 100), order)
    other = epoch_permutation(jax.random.key(8), 0, 100)
    assert len({order.tobytes() for order in [*orders, np.asarray(other)]}) == 4


def test_an_empty_permutation_is_refused():
    with pytest.raises(ValueError, match="Expected 1 <= num_examples"):
        epoch_permutation(KEY, 0, 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_pixels_are_correctly_rounded_multiples_of_one_255th(compiled):
    images = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    order, labels = jnp.arange(256), jnp.zeros(256, jnp.int32)
    take = jax.jit(take_batch, static_argnums=4) if compiled else take_batch
    batch, _ = take(images, labels, order, 0, 256)
    assert batch.dtype == jnp.float32
    np.testing.assert_array_equal(
        np.ravel(batch), np.arange(256, dtype=np.float32) / np.float32(255)
    )


def test_batches_follow_the_permutation_inside_jit_without_recompiling():
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (20, 4, 3, 2)).astype(np.uint8)
    labels = rng.integers(0, 10, 20).astype(np.uint8)
    order = rng.permutation(20).astype(np.int32)
    traces = []

    @jax.jit
    def take(start):
        traces.append(None)
        return take_batch(jnp.asarray(images), labels, order, start, 5)

    for start in range(0, 20, 5):
        batch, batch_labels = take(start)
        chosen = order[start : start + 5]
        assert batch_labels.dtype == jnp.int32
        np.testing.assert_array_equal(batch_labels, labels[chosen])
        np.testing.assert_array_equal(batch, images[chosen] / np.float32(255))
    assert len(traces) == 1


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_larger_than_the_permutation_is_refused(size):
    images = np.zeros((3, 1, 1, 1), np.uint8)
    with pytest.raises(ValueError, match=rf"1 <= size <= 3, got size={size}\."):
        take_batch(images, np.zeros(3), np.arange(3), 0, size)


def test_images_that_are_not_uint8_are_refused():
    with pytest.raises(ValueError, match="uint8, got dtype='float32'"):
        take_batch(np.zeros((3, 1, 1, 1), np.float32), np.zeros(3), np.arange(3), 0, 1)
