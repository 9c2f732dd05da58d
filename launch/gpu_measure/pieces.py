"""A data set in pieces that are small enough to be carried, and back.

    python -m launch.gpu_measure.pieces pack NAME FOLDER [DATA_DIR]
    python -m launch.gpu_measure.pieces unpack FOLDER FILE.npz

Lossless WebP, each file a column of images, 10,000 at most: CIFAR-10 takes 105 MB in
six files, where its archive has 170.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

from launch.gpu_measure.blocks import MANIFEST
from samrobust.data import load_dataset
from samrobust.data.own import read_image

__all__ = ["main", "pack", "unpack"]

_SIZE, _COLUMNS = 10_000, 100  # images of a file, and in a row of it


def pack(name: str, folder: pathlib.Path, data_dir: str | None = None) -> None:
    """Writes the official images and labels of a data set as pieces.

    Args:
      name: as in `samrobust.data.load_dataset`.
      folder: receives the files.
      data_dir: as there.
    """
    dataset = load_dataset(name, data_dir=data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        images, labels = getattr(dataset, split).images, getattr(dataset, split).labels
        for number, start in enumerate(range(0, len(images), _SIZE)):
            grid = _as_grid(images[start : start + _SIZE])
            path = folder / f"{split}-{number}.webp"
            Image.fromarray(grid).save(path, lossless=True, quality=50, method=3)
        np.save(folder / f"{split}.npy", labels)
    facts = {"num_classes": dataset.num_classes, "shape": dataset.image_shape}
    np.savez(folder / "facts.npz", mean=dataset.mean, std=dataset.std, **facts)
    # The last one, for whoever brings them one by one, and for a pack that is ended.
    names = sorted({path.name for path in folder.iterdir()} - {MANIFEST})
    (folder / MANIFEST).write_text("\n".join(names) + "\n", encoding="utf-8")


def unpack(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Joins pieces in an `.npz` file, of the form that `config.data.name` takes."""
    if file.exists():
        return
    with np.load(folder / "facts.npz") as facts:
        known = dict(facts)
    height, width, channels = known.pop("shape")
    arrays = {}
    for split in ("train", "test"):
        labels = np.load(folder / f"{split}.npy")
        parts = []
        for number in range(-(-len(labels) // _SIZE)):
            grid = read_image(folder / f"{split}-{number}.webp")
            parts.append(_from_grid(grid, height, width)[:_SIZE])
        images = np.concatenate(parts)[: len(labels), ..., :channels]
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays, **known)
    temporary.replace(file)


def _as_grid(images: np.ndarray) -> np.ndarray:
    """Puts [N, H, W, C] side by side, as pixels [_, _, 3]; the last row has zeros."""
    number, height, width, channels = images.shape
    rows = -(-number // _COLUMNS)
    grid = np.zeros((rows * _COLUMNS, height, width, 3), np.uint8)
    grid[:number] = images if channels == 3 else images[..., :1]
    grid = grid.reshape(rows, _COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, _COLUMNS * width, 3)


def _from_grid(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the images of a grid, [N, H, W, 3], in a file's last piece zeros too."""
    rows = grid.shape[0] // height
    grid = grid.reshape(rows, height, _COLUMNS, width, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(-1, height, width, 3)


def main() -> None:
    """Packs or unpacks, as the command line says."""
    what, first, second, *rest = sys.argv[1:]
    if what == "pack":
        pack(first, pathlib.Path(second), *rest)
    else:
        unpack(pathlib.Path(first), pathlib.Path(second))


if __name__ == "__main__":
    main()
