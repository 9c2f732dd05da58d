"""What is known of a data set without its images, and the checksum of its examples."""

import numpy as np
import pytest

from samrobust.data import (
    DATASETS,
    Dataset,
    Split,
    dataset_facts,
    datasets,
    fingerprint,
    load_dataset,
    splits,
)


def test_the_facts_of_a_data_set_are_those_of_its_images():
    digits = load_dataset("digits")
    facts = dataset_facts("digits")
    for name in ("num_classes", "image_shape", "mean", "std"):
        assert getattr(digits, name) == getattr(facts, name)
    assert (len(digits.train), len(digits.test)) == (facts.num_train, facts.num_test)
    pixels = digits.train.images / 255
    np.testing.assert_allclose(facts.mean, pixels.mean(), rtol=1e-14)
    np.testing.assert_allclose(facts.std, pixels.std(), rtol=1e-14)


def test_every_data_set_has_facts_and_they_read_no_image(monkeypatch):
    entry_of = datasets.entry_of

    def without_images(name):
        return entry_of(name)._replace(load=None)

    monkeypatch.setattr(datasets, "entry_of", without_images)
    for name in DATASETS:
        facts = dataset_facts(name)
        channels = facts.image_shape[-1]
        assert len(facts.mean) == len(facts.std) == channels
    assert dataset_facts("cifar100").num_classes == 100


def make_dataset(**changes):
    def split(count, seed):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
        return Split(images, rng.integers(0, 10, count).astype(np.int32))

    splits = {"train": split(6, 0), "validation": split(0, 1), "test": split(3, 2)}
    return Dataset("digits", 10, (0.3,), (0.4,), **(splits | changes))


def altered(split, array, change):
    arrays = {"images": split.images.copy(), "labels": split.labels.copy()}
    arrays[array] = change(arrays[array])
    return Split(**arrays)


def plus_one(array):
    array.flat[-1] = (array.flat[-1] + 1) % 10
    return array


def test_a_fingerprint_is_of_the_content_alone_and_computed_once(monkeypatch):
    split = make_dataset().train
    first = fingerprint(split)
    assert len(first) == 16
    int(first, 16)
    assert fingerprint(make_dataset().train) == first
    strided = Split(np.asfortranarray(split.images), split.labels.repeat(2)[::2])
    assert fingerprint(strided) == first
    monkeypatch.setattr(splits, "hashlib", None)
    assert fingerprint(split) == first


def test_everything_that_is_learned_or_tested_changes_the_fingerprint():
    split = make_dataset().train
    others = [
        split,
        make_dataset().validation,
        altered(split, "images", plus_one),
        altered(split, "labels", plus_one),
        altered(split, "labels", lambda labels: labels.astype(np.int64)),
        altered(split, "images", lambda images: images.swapaxes(1, 2)),
        altered(split, "images", lambda images: images.reshape(6, 2, 8, 1)),
        Split(split.images[1:], split.labels[1:]),
        Split(split.images[::-1], split.labels),
        Split(split.images, split.labels[::-1]),
    ]
    assert len({fingerprint(other) for other in others}) == len(others)


def test_the_fingerprints_of_the_digits_never_change():
    digits = load_dataset("digits")
    found = [fingerprint(split) for split in (digits.train, digits.test)]
    assert found == ["a3db20c0283e94c3", "77f1dd02d95083cb"]


IMAGES, LABELS = np.zeros([3, 4, 4, 1], np.uint8), np.arange(3, dtype=np.int32)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 255, LABELS, "images uint8 .* got .* dtype='float64'"),
        (IMAGES[0], LABELS, r"images uint8 \[N, H, W, C\], got shape=\(4, 4, 1\)"),
        (IMAGES, LABELS[:2], r"integer labels \[3\], one an image, got shape=\(2,\)"),
        (IMAGES, LABELS[:, None], r"integer labels \[3\]"),
        (IMAGES, LABELS / 1, "integer labels .* dtype='float64'"),
        (IMAGES, LABELS > 0, "integer labels .* dtype='bool'"),
        (IMAGES, LABELS - 1, "0 <= labels, got least=-1"),
        (IMAGES, [0, 1, 2], "an array of labels, got type='list'"),
    ],
)
def test_arrays_that_are_no_split_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        Split(images, labels)


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_labels_and_shapes_that_are_no_data_sets_are_refused(name):
    with pytest.raises(ValueError, match=r"labels in 0..9, got labels=\[10\]"):
        make_dataset(**{name: Split(IMAGES, np.array([0, 1, 10]))})
    with pytest.raises(ValueError, match=r"images of shape .* in all splits"):
        make_dataset(**{name: Split(IMAGES[:, :3], LABELS)})
