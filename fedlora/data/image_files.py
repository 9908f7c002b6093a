"""Reads images with their classes as tables: folders with a subfolder for each class, .npz files, and IDX files."""

from __future__ import annotations

import gzip
import logging
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger("fedlora")
_IDX = "-images-idx3-ubyte"
_SHOWN = 3  # largest number of names that a message lists


def is_images(path: Path) -> bool:
    """Whether this is a folder, or has the name of a file of images."""
    return path.is_dir() or path.suffix.lower() == ".npz" or path.name.removesuffix(".gz").endswith(_IDX)


def read(path: Path, data: DataConfig) -> pa.Table:
    """The images and their classes, in the columns `data.image-column` and `data.label-column`.

    An image is {"bytes", "path"}, as in the hub's sets. Of a folder it has the path alone, so that no file is read yet.

    Args:
        path: a folder, or a file of the kinds that `is_images` knows.
        data: the section data, with the names of the columns, and for .npz the split.

    Raises:
        DataError: there is no such file, or it does not hold images with their classes.
    """
    import pyarrow as pa

    try:
        if path.is_dir():
            contents, paths, labels = _folder(path)
        else:
            images, labels = _npz(path, data.split) if path.suffix.lower() == ".npz" else read_idx(path)
            contents, paths = encoded(images, path), [None] * len(labels)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}") from None
    return pa.table({data.image_column: cells(contents, paths), data.label_column: pa.array(labels)})


def cells(contents: Sequence[bytes | None], paths: Sequence[str | None]) -> pa.StructArray:
    """A column of images, {"bytes", "path"}: the bytes of each image's file, or its path."""
    import pyarrow as pa

    return pa.StructArray.from_arrays(
        [pa.array(contents, pa.large_binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )


def _folder(path: Path) -> tuple[list[None], list[str], list[str]]:
    """For each image, no bytes, its path, and the name of its subfolder."""
    from PIL import Image

    kinds = Image.registered_extensions()
    inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    loose = [entry.name for entry in inside if entry.suffix.lower() in kinds and entry.is_file()]
    if loose:
        raise ValueError(f"holds {_listed(loose)} beside its subfolders; put each image into the folder of its class")
    found: list[tuple[str, str]] = []
    skipped = 0
    for folder in filter(Path.is_dir, inside):
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        images = [entry for entry in entries if entry.suffix.lower() in kinds and entry.is_file()]
        if not images:
            raise ValueError(
                f"{folder.name} holds no image (such as .png or .jpg), but each of its subfolders is a class of "
                "images; name the folder whose subfolders are the classes, or remove this one"
            )
        skipped += len(entries) - len(images)
        found += [(str(image), folder.name) for image in images]
    classes = list(dict.fromkeys(name for _, name in found))
    if len(classes) < 2:
        raise ValueError(
            f"holds {f'one class of images, {classes[0]!r}' if classes else 'no subfolder with images'}, expected a "
            "subfolder for each of two or more classes"
        )
    if skipped:
        _log.warning("%s: number of files and folders that are no images and are left out: %d", path, skipped)
    return [None] * len(found), [image for image, _ in found], [name for _, name in found]


def _npz(path: Path, split: str) -> tuple[np.ndarray, Sequence[Any]]:
    """The arrays of images and of classes, by the names that sets use."""
    with np.load(path, allow_pickle=False) as arrays:
        pairs = [
            (f"{split}_images", f"{split}_labels"),
            (f"x_{split}", f"y_{split}"),
            ("images", "labels"),
            ("x", "y"),
        ]
        names = next((pair for pair in pairs if {*pair} <= {*arrays}), None)
        if names is None:
            raise ValueError(
                f"has the arrays {_listed(list(arrays))}, expected {' or '.join(' and '.join(pair) for pair in pairs)}"
                "; data.split says which part is meant"
            )
        images, labels = (arrays[name] for name in names)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.ndim < 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{names[0]} is {list(images.shape)} and {names[1]} is {list(labels.shape)}, expected images [n, height, "
            "width] or [n, height, width, channels] and n classes"
        )
    return images, labels.tolist()


def read_idx(path: Path) -> tuple[np.ndarray, Sequence[int]]:
    """The images of an IDX file and the classes in the file of labels beside it (http://yann.lecun.com/exdb/mnist).

    Args:
        path: the file of the images, packed with gzip or not.

    Returns:
        uint8 [n, height, width], and n classes.

    Raises:
        OSError: one of the two files cannot be read.
        ValueError: they do not hold images and as many classes.
    """
    head, _, packed = path.name.partition(_IDX)
    beside = [path.with_name(f"{head}-labels-idx1-ubyte{ending}") for ending in (packed, "", ".gz")]
    images = _idx_array(path, 3)
    labels = _idx_array(next((file for file in beside if file.is_file()), beside[0]), 1)
    if len(images) != len(labels):
        raise ValueError(f"holds {len(images)} images, but {beside[0].name} has {len(labels)} classes")
    return images, labels.tolist()


def _idx_array(path: Path, dims: int) -> np.ndarray:
    """The bytes of an IDX file as an array. It has 0, 0, 8 for bytes, the number of dimensions, their sizes, values."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    if content[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(f"{path.name} is no IDX file of bytes with {dims} dimensions")
    sizes = np.frombuffer(content, ">u4", dims, 4).astype(int)
    if len(content) != 4 + 4 * dims + sizes.prod():
        raise ValueError(
            f"{path.name} has {len(content)} bytes, expected {4 + 4 * dims + sizes.prod()} for {list(map(int, sizes))}"
            "; copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes)


def encoded(images: np.ndarray, path: Path) -> list[bytes]:
    """Each image as the bytes of a file: netpbm, which is the values after a short head, or PNG if it has opacity.

    Args:
        images: [n, height, width] or [n, height, width, 1, 3 or 4], of 8 or 16 bits without a sign.
        path: the file of the images, for messages.
    """
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    deep = images.dtype == np.uint16
    channels = images.shape[3] if images.ndim == 4 else 1
    if images.dtype not in (np.uint8, np.uint16) or images.ndim > 4 or channels not in (1, 3, *(() if deep else (4,))):
        raise ValueError(
            f"holds images of {images.dtype} and shape {list(images.shape)}, expected whole numbers of 8 or 16 bits "
            "(uint8, uint16), grey or with 3 channels (with 4 channels: uint8); convert them"
        )
    if channels == 4:
        return [_png(image) for image in images]
    height, width = images.shape[1:3]
    head = f"P{5 if channels == 1 else 6} {width} {height} {65535 if deep else 255}\n".encode()
    plain = images.astype(">u2") if deep else images
    return [head + image.tobytes() for image in plain]


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
