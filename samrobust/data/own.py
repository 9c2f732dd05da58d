"""Your own data: an `.npz` file, or a folder of class folders of images.

Both return the mapping that `samrobust.data.splits.from_arrays` takes and checks.
"""

import hashlib
import os
import pathlib
import zipfile
from typing import IO, Any

import numpy as np

from samrobust.checks import check, shorten
from samrobust.data.cache import cached_arrays, default_cache_dir
from samrobust.data.splits import DatasetUnavailableError

__all__ = ["DECODING", "load_images", "load_npz", "one_line", "read_image"]

_SUFFIXES = (".png", ".jpg", ".jpeg")
DECODING = 2  # to be raised when `read_image` gives other arrays of the same files


def load_npz(path: pathlib.Path) -> dict[str, Any]:
    """Returns the arrays of an `.npz` file by name; nothing in it is unpickled.

    Raises:
      DatasetUnavailableError: if it is missing, no such file, or has an array that is
        damaged or pickled; names the file and the array.
    """
    if not path.is_file():
        raise DatasetUnavailableError(
            f"Expected an .npz file {path}, got no such file in {pathlib.Path.cwd()}. "
            "Run where it lies, or write its path in full."
        )
    name = None
    try:
        # Not a zip file: NumPy would speak of pickles, and of loading them anyway.
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                arrays[name] = file[name]
            return arrays
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        where = f"the array {name} in {path}" if name else f"an .npz file {path}"
        raise DatasetUnavailableError(
            f"Expected {where}, got: {one_line(error)}. Write it with numpy.savez, of "
            "arrays of numbers only."
        ) from error


def load_images(folder: pathlib.Path, cache_dir: pathlib.Path | None) -> dict[str, Any]:
    """Returns the images of `train/CLASS/*` and `test/CLASS/*`: PNG or JPEG files.

    Labels follow the sorted names of the class folders, images within a class their
    sorted names: the arrays are a function of the files, in whatever order a file
    system lists them. Names that begin with a dot are left out.

    Args:
      folder: holds `train` and `test`.
      cache_dir: for the decoded arrays, which are found again by the names and
        contents of the files; None for the default.

    Raises:
      DatasetUnavailableError: if a folder or its images are missing, or an image
        cannot be decoded.
      ValueError: for other files, other classes in `test`, or images of several shapes.
    """
    classes, found = (_classes(folder / split) for split in ("train", "test"))
    fix = "Give both the same class folders; in test some may be empty."
    odd = sorted({*classes} ^ {*found})
    check(not odd, f"the classes of {folder}/train in {folder}/test", fix, odd=odd[:4])
    files = {
        split: [
            (path, label)
            for label, name in enumerate(classes)
            for path in _images(folder / split / name, may_be_empty=split == "test")
        ]
        for split in ("train", "test")
    }
    check(bool(files["test"]), f"images in {folder}/test/*", found=found[:4])
    sha256 = hashlib.sha256()
    for path, _ in (pair for pairs in files.values() for pair in pairs):
        sha256.update(os.fsencode(path.relative_to(folder)) + b"\0")
        sha256.update(hashlib.sha256(path.read_bytes()).digest())
    source = {"decoding": DECODING, "files": sha256.hexdigest()}

    def decode() -> dict[str, np.ndarray]:
        arrays = {}
        for split, pairs in files.items():
            arrays[f"x_{split}"] = _stack([path for path, _ in pairs])
            arrays[f"y_{split}"] = np.array([label for _, label in pairs], np.int32)
        return arrays

    arrays = cached_arrays(cache_dir or default_cache_dir(), "images", source, decode)
    return {**arrays, "num_classes": len(classes)}


def read_image(file: IO[bytes] | pathlib.Path) -> np.ndarray:
    """Decodes a PNG or JPEG to uint8 `[H, W, C]`, C = 3, or 1 where it is grayscale.

    As viewers show it: turned as the orientation in its EXIF metadata says.

    Raises:
      ValueError: for other modes: palettes, transparency, 16 bits.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        mode = image.mode
        fix = f'Convert it: image.convert("{"L" if mode in ("1", "LA") else "RGB"}").'
        scale = "Scale its values to 0..255, round, and save it with 8 bits a channel."
        is_deep = mode.startswith(("I", "F"))  # which Pillow's `convert` would clip
        check(
            mode in ("RGB", "L"),
            "an RGB or a grayscale image",
            scale if is_deep else fix,
            mode=mode,
        )
        color = image.info.get("transparency")  # of PNG, in any mode
        check(color is None, "an image without transparency", fix, transparency=color)
        # Pillow's RGB of 16 bits a channel is their upper 8, and says so here alone.
        packed = "".join(str(tile[3]) for tile in image.tile)
        check("16" not in packed, "8 bits a channel", scale, packed=packed)
        pixels = np.asarray(ImageOps.exif_transpose(image))
    return pixels.reshape(*pixels.shape[:2], -1)


def _names(folder: pathlib.Path, *, may_be_empty: bool = False) -> list[str]:
    """Returns the sorted names in a folder, without hidden ones."""
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise DatasetUnavailableError(
            f"Expected a folder {folder} of class folders, got: {one_line(error)}. Put "
            f"images into {folder}/CLASS/."
        ) from error
    fix = "Or remove it."
    check(may_be_empty or bool(names), f"images in {folder}", fix, found=names)
    return names


def _classes(folder: pathlib.Path) -> list[str]:
    """Returns the names of the class folders of a split, sorted."""
    names = _names(folder)
    for path in (folder / name for name in names):
        wanted, fix = f"only class folders in {folder}", "Move it out of there."
        check(path.is_dir(), wanted, fix, **{_kind(path): path.name})
    return names


def _images(folder: pathlib.Path, *, may_be_empty: bool) -> list[pathlib.Path]:
    """Returns the files of a class, sorted by name."""
    names = _names(folder, may_be_empty=may_be_empty)
    paths = [folder / name for name in names]
    fixes = {"file": "Convert it", "folder": "Move its images up"}
    for path in paths:
        kind, is_image = _kind(path), path.suffix.lower() in _SUFFIXES
        fix = f"{fixes.get(kind, 'Replace it')}, or move it out of {folder}."
        wanted = f"only {', '.join(_SUFFIXES)} files"
        check(is_image and path.is_file(), wanted, fix, **{kind: path.name})
    return paths


def _kind(path: pathlib.Path) -> str:
    """Says in a message what is found in a folder."""
    if path.is_dir():
        return "folder"
    return "file" if path.exists() else "broken_link"


def _stack(paths: list[pathlib.Path]) -> np.ndarray:
    """Decodes image files of one shape to uint8 `[N, H, W, C]`."""
    images = None
    for i, path in enumerate(paths):
        try:
            image = read_image(path)
        except Exception as error:  # Pillow raises anything on damaged files
            raise DatasetUnavailableError(
                f"Expected an image {path}, got: {one_line(error)}. Replace the file, "
                "or move it away."
            ) from error
        if images is None:
            images = np.empty((len(paths), *image.shape), np.uint8)
        shape = images.shape[1:]
        fix = "Resize all images to one shape, all RGB or all grayscale."
        wanted = f"shape {shape}, as of {paths[0]}, of {path}"
        check(image.shape == shape, wanted, fix, shape=image.shape)
        images[i] = image
    assert images is not None
    return images


def one_line(error: Exception) -> str:
    """Returns an error of another library as one line."""
    return shorten(f"{type(error).__name__}: {error}").rstrip(".")
