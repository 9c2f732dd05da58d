"""Data of one's own: a function, an .npz file, a folder of images, TFDS by name."""

import io
import json
import pathlib
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samrobust.data import (
    DATASETS,
    DatasetUnavailableError,
    check_padding,
    dataset_facts,
    fingerprint,
    from_arrays,
    load_dataset,
    own,
    prepared,
)

NUM_CLASSES, SHAPE = 3, (4, 6, 3)


def make_arrays(shape=SHAPE, num_train=9, num_test=6) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        images = rng.integers(0, 256, (count, *shape))
        arrays[f"x_{split}"] = images.astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % NUM_CLASSES
    return arrays


def check_same(dataset, arrays):
    for split in ("train", "test"):
        got = getattr(dataset, split)
        np.testing.assert_array_equal(got.images, arrays[f"x_{split}"])
        np.testing.assert_array_equal(got.labels, arrays[f"y_{split}"])
        assert (got.images.dtype, got.labels.dtype) == (np.uint8, np.int32)
        assert not got.images.flags.writeable
        assert not got.labels.flags.writeable


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current directory; caches and prepared data lie below it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    yield tmp_path
    sys.modules.pop("mine", None)  # other tests have another one


def write_npz(**changes: Any) -> dict[str, Any]:
    """Writes own.npz with other arrays where changes names them; None: without."""
    arrays = {**make_arrays(), **changes}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez("own.npz", **arrays)
    return arrays


def png_file(image):
    """A PNG in memory, which TFDS stores as it is."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, format="png")
    file.seek(0)
    return file


def write_images(arrays, folder="flowers", suffix=".png", names=("c", "a", "b")):
    """Writes PNG files; class k is the k-th of the sorted names."""
    for split in ("train", "test"):
        for i, image in enumerate(arrays[f"x_{split}"]):
            name = sorted(names)[arrays[f"y_{split}"][i]]
            path = pathlib.Path(folder, split, name, f"{i:02}{suffix}")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(path)


def by_class(arrays):
    """The same arrays in the order of their labels, then of their position."""
    ordered = {}
    for split in ("train", "test"):
        order = np.argsort(arrays[f"y_{split}"], kind="stable")
        for name in (f"x_{split}", f"y_{split}"):
            ordered[name] = arrays[name][order]
    return ordered


def write_tfds(arrays, *, with_ids=False, feature=None):
    """Prepares arrays as the data set `shapes` of TFDS, in ArrayRecord format."""
    import tensorflow_datasets as tfds

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "shapes"
        VERSION = tfds.core.Version("1.2.0")
        pkg_dir_path = None

        def _info(self):
            label = feature or tfds.features.ClassLabel(num_classes=NUM_CLASSES)
            shape = arrays["x_train"].shape[1:]
            features: Any = {"image": tfds.features.Image(shape=shape), "label": label}
            if with_ids:
                features["id"] = tfds.features.Text()
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            splits = {key[2:] for key in arrays if key.startswith("x_")}
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            pairs = zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)
            for i, (image, label) in enumerate(pairs):
                ids = {"id": f"{i:03}"} if with_ids else {}
                yield i, {"image": png_file(image), "label": int(label), **ids}

    Shapes(data_dir="tfds", file_format="array_record").download_and_prepare()
    return pathlib.Path("tfds/shapes/1.2.0")


# The four forms, each with the arrays that it shall give.


def of_a_function():
    pathlib.Path("mine.py").write_text(
        "import numpy as np\n"
        "def flowers():\n"
        "    with np.load('own.npz') as file:\n"
        "        return dict(file)\n"
        "def half(): return {'x_train': 0}\n"
        "def broken():\n"
        "    return 1 / 0\n"
        "number = 3\n"
    )
    return "mine:flowers", write_npz()


def of_an_npz_file():
    return "own.npz", write_npz()


def of_a_folder():
    write_images(arrays := make_arrays())
    return "./flowers", by_class(arrays)


def of_tfds():
    write_tfds(arrays := make_arrays(), with_ids=True)
    return "shapes", arrays


FORMS = [of_a_function, of_an_npz_file, of_a_folder, of_tfds]


@pytest.mark.parametrize("make", FORMS)
def test_every_form_gives_the_arrays_its_facts_and_subsets_and_the_same_again(make):
    name, arrays = make()
    dataset = load_dataset(name)
    check_same(dataset, arrays)
    pixels = arrays["x_train"].astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-13)
    assert dataset_facts(name) == (NUM_CLASSES, SHAPE, dataset.mean, dataset.std, 9, 6)
    sizes: Any = {"validation_size": 2, "train_size": 5, "test_size": 4}
    some, again = (load_dataset(name, **sizes, split_seed=1) for _ in range(2))
    for part, size in (("train", 5), ("validation", 2), ("test", 4)):
        assert len(getattr(some, part)) == size
        assert fingerprint(getattr(some, part)) == fingerprint(getattr(again, part))
    assert (some.mean, some.std) == (dataset.mean, dataset.std)
    with pytest.raises(ValueError, match=r"0 <= validation_size < 9, got .*=9\. There"):
        load_dataset(name, validation_size=9)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_does_not_follow_the_draws_that_made_the_data(seed):
    """Every fifth label is noise, drawn by the generator that most people take."""
    is_noise = np.random.default_rng(seed).random(1000) < 0.2
    images = np.zeros([1000, 1, 1, 1], np.uint8)
    images[::2] = 255
    arrays = {"x_train": images, "y_train": is_noise.astype(int)}
    np.savez("noisy.npz", **arrays, x_test=images[:2], y_test=[0, 1])
    data = load_dataset("noisy.npz", validation_size=200, split_seed=seed)
    assert 0.1 < data.validation.labels.mean() < 0.3


def test_what_is_given_beside_the_arrays_is_taken():
    given = {
        "mean": [0.1, 0.2, 0.3],
        "std": np.array([0.5, 0.5, 1], "f"),
        "num_classes": 7,
    }
    write_npz(**given)
    dataset = load_dataset("own.npz")
    assert dataset.mean == (0.1, 0.2, 0.3)
    assert dataset.std == (0.5, 0.5, 1)
    assert dataset.num_classes == 7
    gray = from_arrays("gray", {**make_arrays((1, 5, 1)), "mean": 0.5, "std": 0.25})
    assert (gray.mean, gray.std, gray.image_shape) == ((0.5,), (0.25,), (1, 5, 1))


def test_the_arrays_of_a_function_stay_its_own():
    arrays = make_arrays()
    dataset = from_arrays("mine", arrays)
    assert np.shares_memory(dataset.train.images, arrays["x_train"])
    arrays["x_train"][0] = 0  # not frozen by us


def test_mean_and_deviation_are_exact_over_many_images():
    images = np.full((600, 8, 8, 1), 255, np.uint8)
    images[::2] = 0
    labels = np.arange(600) % 2
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    dataset = from_arrays("stripes", arrays)
    assert (dataset.mean, dataset.std) == ((0.5,), (0.5,))


X, Y = make_arrays()["x_train"], make_arrays()["y_train"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y_test": None},
            r"x_train, y_train, x_test, y_test, and at most .*, got arrays=",
        ),
        ({"means": X}, "and at most mean, std, num_classes beside them"),
        ({"x_train": X / 255}, r"x_train uint8 .* np.round\(255 \* x_train\).astype"),
        ({"x_test": X[:6, ..., 0]}, r"x_test .* Add the channel axis: x_test\[..., No"),
        ({"x_train": X.astype(np.int64)}, r"dtype='int64'\. .*x_train\.astype\(np\.u"),
        *(
            ({"x_train": x.transpose(0, 3, 1, 2)}, r"x_train.transpose\(0, 2, 3, 1\)")
            for x in (X, X[..., :1])
        ),
        ({"x_train": X[:0], "y_train": Y[:0]}, r"images in x_train, got shape=\(0, 4,"),
        ({"x_test": X[:6, :3]}, r"images of shape \(4, 6, 3\) in x_test as in x_train"),
        ({"y_train": Y[1:]}, r"integer y_train \[9\], one an image, got shape=\(8,\)"),
        ({"y_train": np.eye(3)[Y]}, r"A row a label becomes y_train.argmax\(1\)"),
        ({"y_train": Y[:, None]}, r"A row a label becomes y_train\[:, 0\]\."),
        ({"y_train": Y.astype(str)}, r"np.unique\(y_train, return_inverse=True\)\[1\]"),
        ({"y_train": Y / 1}, "integer y_train .* dtype='float64'"),
        ({"y_test": np.full(6, np.nan)}, "integer y_test .* dtype='float64'"),
        ({"y_train": Y - 1}, r"y_train in 0\.\..*, got y_train=\[-1, -1, -1\]"),
        ({"y_train": Y + 1}, r"every class .* got missing=\[0\]. Number the classes"),
        ({"y_train": 0 * Y}, r"every class .* two at least, got missing=\[1\]"),
        ({"y_test": Y[:6] + 1}, r"y_test in 0\.\.2, got y_test=\[3, 3\]"),
        ({"num_classes": 2}, r"y_train in 0\.\.1, got y_train=\[2, 2, 2\]"),
        ({"num_classes": 3.0}, "an integer 2 <= num_classes"),
        ({"num_classes": 1}, "an integer 2 <= num_classes"),
        ({"mean": [0.5] * 3}, r"mean and std, or neither, got given=\['mean'\]"),
        ({"mean": [127.0] * 3, "std": [64.0] * 3}, "0 <= mean <= 1 .* not 0..255"),
        ({"mean": [0.5] * 3, "std": [0.5, 0, 1]}, "1e-06 <= std <= 1 for each of 3"),
        ({"mean": [0.5, np.nan, 0], "std": [1.0] * 3}, "0 <= mean <= 1"),
        ({"mean": [0.5], "std": [1.0]}, "for each of 3 channels"),
        ({"mean": ["a"] * 3, "std": [1.0] * 3}, "0 <= mean <= 1"),
        ({"x_train": X * np.array([1, 0, 1], "u1")}, "channels of x_train that vary"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused_by_name(changes, message):
    write_npz(**changes)
    with pytest.raises(ValueError, match=rf"own\.npz: Expected .*{message}") as error:
        load_dataset("own.npz")
    assert "\n" not in str(error.value)


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def a_single_array(path):
    np.save("array.npy", X)
    pathlib.Path("array.npy").rename(path)


def pickled(path):
    path.write_bytes(pickle.dumps(Bomb()))


def with_an_object(path):
    np.savez(path, x_train=np.array([Bomb()], dtype=object))


def with_a_damaged_member(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        member = next(m for m in file.infolist() if m.filename == "y_train.npy")
    content[member.header_offset + 250] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), r"an \.npz file own\.npz, got: BadZip"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:900]),
            r"an \.npz file own\.npz, got: BadZipFile",
        ),
        (a_single_array, r"an \.npz file own\.npz, got: "),
        (pickled, r"an \.npz file own\.npz, got: BadZipFile: File is not a zip file\."),
        (with_an_object, r"the array x_train in own\.npz, got: ValueError: Object arr"),
        (with_a_damaged_member, r"the array y_train in own\.npz, got: BadZipFile: Bad"),
    ],
)
def test_an_npz_file_that_cannot_be_read_is_named_and_nothing_unpickled(
    damage, message, here
):
    write_npz()
    damage(here / "own.npz")
    with pytest.raises(DatasetUnavailableError, match=f"Expected {message}") as error:
        load_dataset("own.npz")
    assert str(error.value).endswith("numpy.savez, of arrays of numbers only.")
    assert "\n" not in str(error.value)
    assert not (here / "exploded").exists()


def test_an_npz_file_that_is_not_there_is_looked_for_from_here(here):
    message = (
        rf"an \.npz file x/own\.npz, got no such file in {here}\. Run where it lies"
    )
    with pytest.raises(DatasetUnavailableError, match=message):
        load_dataset("x/own.npz")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone:f", r"a module gone with a data set, got reference='gone:f'\. Run in"),
        ("mine:flower", r"a data set flower in .*mine.py, .* It has flowers, half, "),
        ("mine:number", "a function, got name='mine:number', value=3"),
        ("mine:half", "Expected x_train, y_train, x_test, y_test, and"),
        (
            "mine:broken",
            r"the data set mine:broken to run, got at .*mine.py, line 7: Z",
        ),
    ],
)
def test_a_function_that_gives_no_data_set_is_refused(name, message):
    of_a_function()
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "one of cifar10, cifar100, digits, package.module:function, a file NAME"),
        ("cifar-10", "or the name of a data set in TFDS, got name='cifar-10'"),
        ("./gone", r"a folder \./NAME that is there, .* got name='\./gone'"),
        ("~/gone", "a folder"),
        ("gs://bucket/own.npz", "a path of the file system as name"),
    ],
)
def test_a_name_of_no_known_form_is_refused_with_those_that_are(name, message, here):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        load_dataset(name)
    assert not list(here.iterdir())


def test_a_file_or_folder_is_found_behind_its_bare_name():
    write_npz()
    write_images(make_arrays())
    for name, meant in (("own", r"own\.npz"), ("flowers", r"\./flowers")):
        with pytest.raises(DatasetUnavailableError, match=rf"Did you mean {meant}\?"):
            load_dataset(name)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_decoded_once_and_found_again_by_content(channels, monkeypatch):
    write_images(arrays := make_arrays((*SHAPE[:2], channels)))
    check_same(load_dataset("flowers/"), by_class(arrays))
    shutil.copytree("flowers", "copy")
    with monkeypatch.context() as patch:
        patch.setattr(own, "read_image", None)
        check_same(load_dataset("./copy"), by_class(arrays))
        patch.setattr(own, "DECODING", own.DECODING + 1)
        with pytest.raises(DatasetUnavailableError, match="not callable"):
            load_dataset("./copy")
    Image.fromarray(arrays["x_train"][1].squeeze()).save("copy/train/a/00.png")
    assert not np.array_equal(
        load_dataset("./copy").train.images[0], arrays["x_train"][0]
    )


def test_the_arrays_of_the_caller_can_still_be_written():
    arrays = make_arrays()
    arrays |= {name: arrays[name].astype(np.int32) for name in ("y_train", "y_test")}
    from_arrays("flowers", arrays)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        arrays[name][:] = 0


def test_names_and_suffixes_order_the_images_and_hidden_files_are_left_out():
    arrays = make_arrays()
    write_images(arrays, suffix=".PNG", names=("b", "B", "10"))
    pathlib.Path("flowers/train/.DS_Store").write_text("")
    pathlib.Path("flowers/train/B/.thumbs").write_text("")
    check_same(load_dataset("./flowers"), by_class(arrays))  # 10 < B < b


def test_a_class_may_have_no_image_in_the_test_set():
    write_images(make_arrays())
    for path in pathlib.Path("flowers/test/b").iterdir():
        path.unlink()
    data = load_dataset("./flowers")
    assert data.num_classes == 3
    assert set(data.test.labels.tolist()) == {0, 2}


def test_jpeg_files_are_images_too():
    write_images(arrays := make_arrays(), suffix=".jpg")
    images = load_dataset("./flowers").train.images
    with Image.open("flowers/train/a/00.jpg") as image:
        np.testing.assert_array_equal(images[0], np.asarray(image))
    assert images.shape == arrays["x_train"].shape


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def damage_pixels(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(content)


def resave(change):
    def save(path):
        with Image.open(path) as image:
            change(image).save(path)

    return save


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"an image flowers/test/b/01\.png, got: \w+: .*"),
        (damage_pixels, r"an image flowers/test/b/01\.png, got: \w+: .*"),
        (lambda path: path.write_bytes(b""), "an image .*, got: UnidentifiedImageErr"),
        (
            lambda path: path.write_text("text"),
            "an image .*b/01.png, got: Unidentified",
        ),
        (resave(lambda i: i.convert("RGBA")), "got mode='RGBA'. Convert it: image.con"),
        (resave(lambda i: i.convert("P")), "an RGB or a grayscale image, got mode='P'"),
        (resave(lambda i: i.convert("1")), "an RGB or a grayscale image, got mode='1'"),
        (
            resave(lambda i: i.resize((4, 4))),
            r"shape \(4, 6, 3\), as of flowers/test/a/00\.png, of flowers/test/b/01\.pn"
            r"g, got shape=\(4, 4, 3\)\. Resize all images to one shape",
        ),
        (resave(lambda i: i.convert("L")), r"got shape=\(4, 6, 1\)\. .* all grayscale"),
        (
            lambda path: path.rename(path.with_suffix(".bmp")),
            r"only \.png, \.jpg, \.jpeg files, got file='01\.bmp'\. Convert it",
        ),
        (
            lambda path: path.with_suffix(".png.d").mkdir(),
            r"files, got folder='01\.png\.d'\. Move its images up, or move it out of f",
        ),
        (
            lambda path: path.with_name("dead.png").symlink_to("gone.png"),
            r"files, got broken_link='dead\.png'\. Replace it, or move it out of flow",
        ),
        (
            lambda path: path.parent.rename(path.parent.with_name("d")),
            r"the classes of flowers/train in flowers/test, got odd=\['b', 'd'\]",
        ),
        (
            lambda path: [file.unlink() for file in path.parents[1].glob("*/*")],
            r"images in flowers/test/\*, got found=\['a', 'b', 'c'\]",
        ),
        (
            lambda path: [file.unlink() for file in path.parents[2].glob("train/b/*")],
            "images in flowers/train/b",
        ),
        (
            lambda path: shutil.rmtree(path.parent.parent),
            "a folder flowers/test of class folders, got: FileNotFoundError",
        ),
        (
            lambda path: (path.parent.parent.parent / "train/note.txt").write_text(""),
            r"only class folders in flowers/train, got file='note\.txt'\. Move it out",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused_by_the_file(damage, message):
    write_images(make_arrays())
    damage(pathlib.Path("flowers/test/b/01.png"))
    errors = (ValueError, DatasetUnavailableError)
    with pytest.raises(errors, match=f"Expected .*{message}") as error:
        load_dataset("./flowers")
    assert "\n" not in str(error.value)


def test_a_header_that_promises_more_pixels_than_there_are_is_damage():
    write_images(make_arrays())
    path = pathlib.Path("flowers/test/a/00.png")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 2**15, 2**15)  # width and height
    path.write_bytes(content)
    with pytest.raises(
        DatasetUnavailableError, match=r"an image flowers/test/a/00\.png"
    ):
        load_dataset("./flowers")


@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE[:2], 1)])
def test_a_data_set_of_tfds_without_ids_has_the_order_of_its_records(shape):
    import tensorflow_datasets as tfds

    directory = write_tfds(make_arrays(shape))
    dataset = load_dataset("shapes")
    for split in ("train", "test"):
        builder: Any = tfds.builder_from_directory(directory)
        source = builder.as_data_source(split)
        np.testing.assert_array_equal(
            getattr(dataset, split).images, [record["image"] for record in source]
        )
        assert getattr(dataset, split).labels.tolist() == [r["label"] for r in source]
    assert (dataset.image_shape, dataset.num_classes) == (shape, NUM_CLASSES)


def test_records_are_decoded_once_and_found_again_by_content(monkeypatch, here):
    write_tfds(make_arrays(), with_ids=True)
    first = load_dataset("shapes")
    monkeypatch.setattr(prepared, "read_image", None)
    shutil.copytree("tfds", "elsewhere/configured")
    again = load_dataset("configured/shapes", data_dir=here / "elsewhere")
    check_same(again, make_arrays())
    assert fingerprint(again.train) == fingerprint(first.train)


def test_a_version_of_a_data_set_of_tfds_is_named_as_tfds_does(here):
    directory = write_tfds(make_arrays())
    shutil.copytree(directory, directory.with_name("1.10.0"))
    for name, version in (("shapes", "1.10.0"), ("shapes:1.2.0", "1.2.0")):
        found = prepared.find_prepared(name, here / "tfds")
        assert found == here / "tfds" / "shapes" / version
    named, newest = load_dataset("shapes:1.2.0"), load_dataset("shapes")
    assert fingerprint(named.train) == fingerprint(newest.train)
    message = (
        r"shapes:2\.0\.0 in .*, got shapes:1\..* as array_record, shapes:1\..* Set"
    )
    with pytest.raises(DatasetUnavailableError, match=message):
        load_dataset("shapes:2.0.0")
    message = r"after a colon, got name='shapes/1\.2\.0'\. Write shapes:1\.2\.0\.$"
    with pytest.raises(ValueError, match=message):
        load_dataset("shapes/1.2.0")


def drop_test(arrays):
    return {name: arrays[name] for name in ("x_train", "y_train")}


@pytest.mark.parametrize("case", ["no test", "no classes", "other format", "damaged"])
def test_prepared_data_of_another_kind_are_refused_with_what_they_are(case):
    import tensorflow_datasets as tfds

    arrays = make_arrays()
    if case == "no test":
        write_tfds(drop_test(arrays))
        message = r"images and labels in .*shapes.*, got: splits \['train'\] and featur"
    elif case == "no classes":
        write_tfds(arrays, feature=tfds.features.Scalar(np.int64))
        message = r".*'label': 'Scalar'\}\. Wanted are train and test, image and label"
    elif case == "other format":
        info = write_tfds(arrays) / "dataset_info.json"
        content = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
        info.write_text(json.dumps(content))
        message = (
            ".* shapes in .*tfds as TFDS prepares .*, got shapes:1.2.0 as tfrecord"
        )
    else:
        path = write_tfds(arrays) / "shapes-train.array_record-00000-of-00001"
        path.write_bytes(path.read_bytes()[:100])
        message = "images and labels in .*/shapes/1.2.0, got: "
    with pytest.raises(DatasetUnavailableError, match=f"Expected {message}") as error:
        load_dataset("shapes")
    assert "\n" not in str(error.value)


def test_without_the_data_the_error_lists_what_is_prepared_and_what_is_known():
    with pytest.raises(DatasetUnavailableError, match="got nothing of the kind"):
        load_dataset("mnist")
    write_tfds(make_arrays())
    message = (
        r"Expected cifar10, cifar100, digits, or mnist in .*/tfds as TFDS prepares it "
        r"in ArrayRecord format, got shapes\. Set data_dir .* tfds\.builder\('mnist', "
    )
    for name in ("mnist", "mnist/small"):
        with pytest.raises(
            DatasetUnavailableError, match=message.replace("mnist", name)
        ):
            dataset_facts(name)


def test_a_data_set_is_one_file_and_a_line_in_one_dict(monkeypatch):
    write_npz()
    pathlib.Path("mine.py").write_text(
        "import numpy as np\n"
        "from samrobust.data import DatasetEntry, DatasetFacts\n"
        f"FACTS = DatasetFacts{tuple(dataset_facts('own.npz'))}\n"
        "FACTS = FACTS._replace(mean=(0.25, 0.5, 0.75))\n"
        "FLOWERS = DatasetEntry(FACTS, lambda **_: dict(np.load('own.npz')))\n"
    )
    monkeypatch.setitem(DATASETS, "flowers", "mine:FLOWERS")
    dataset = load_dataset("flowers", test_size=5)
    assert (dataset.name, dataset.mean) == ("flowers", (0.25, 0.5, 0.75))
    assert dataset_facts("flowers").mean == (0.25, 0.5, 0.75)
    with pytest.raises(ValueError, match="flowers, package"):
        load_dataset("-")


def test_the_padding_is_held_against_the_shorter_side_of_the_images():
    check_padding((4, 6, 3), padding=3)
    message = r"0 <= data\.padding < 4, got data\.padding=4\. Images are 4x6\."
    with pytest.raises(ValueError, match=message):
        check_padding((4, 6, 3), **{"data.padding": 4})


def test_an_image_with_two_channels_has_no_place_here():
    file = io.BytesIO()
    Image.new("LA", (2, 2)).save(file, format="png")
    file.seek(0)
    with pytest.raises(ValueError, match=r"got mode='LA'\. Convert it: .*\(\"L\"\)"):
        own.read_image(file)


def test_pixels_of_sixteen_bits_are_to_be_scaled_and_not_converted():
    """Pillow's `convert` cuts them off at 255."""
    file = io.BytesIO()
    Image.fromarray(np.full([2, 2], 30_000, np.uint16)).save(file, format="png")
    file.seek(0)
    with pytest.raises(ValueError, match=r"got mode='I;16'\. Scale its values"):
        own.read_image(file)


@pytest.mark.parametrize(("mode", "color"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_an_image_with_a_transparent_color_is_refused(mode, color):
    file = io.BytesIO()
    Image.new(mode, (2, 2)).save(file, format="png", transparency=color)
    file.seek(0)
    with pytest.raises(ValueError, match="without transparency, got transparency="):
        own.read_image(file)


def test_an_image_of_sixteen_bits_a_channel_is_refused_and_not_cut_to_eight():
    def chunk(kind, content):
        length, body = struct.pack(">I", len(content)), kind + content
        return length + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)  # 1 x 1, RGB
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 255, 256, 65280))
    chunks = ((b"IHDR", header), (b"IDAT", pixel), (b"IEND", b""))
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))
    with pytest.raises(ValueError, match="8 bits a channel, got packed='RGB;16B'"):
        own.read_image(file)


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_an_image_is_turned_as_its_orientation_says(form):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # as a camera held upright writes it: a quarter turn clockwise
    pixels = np.array([[100], [200]], np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(file, form, exif=exif, quality=100)
    file.seek(0)
    np.testing.assert_array_equal(own.read_image(file)[..., 0], np.rot90(pixels, -1))
