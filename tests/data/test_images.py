"""Images from folders, Parquet, .npz and IDX files; what they become in RGB; bad ones are named in one sentence."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from fedlora.common.errors import DataError
from fedlora.config import DataConfig, ModelConfig
from fedlora.data import LazyExamples, encode, load_rows, sources, split_rows
from fedlora.data.checked import check_rows, lines
from fedlora.data.conversations import RowError
from fedlora.data.images import decoded
from fedlora.tasks.registry import task_of
from tests.tiny import image_processor

TASK = task_of(ModelConfig(task="image-classification", labels=2))


def drawn(seed: int = 0, size: tuple[int, ...] = (16, 16, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def as_file(image: Image.Image | np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def folder_of(path: Path, each: int = 2) -> Path:
    """Two classes, with images that differ in size."""
    for label, name in enumerate(("cat", "dog")):
        (path / name).mkdir(parents=True)
        for number in range(each):
            size = (16 + 8 * number, 16, 3)
            (path / name / f"{number}.png").write_bytes(as_file(drawn(10 * label + number, size)))
    return path


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def rows_of(cells: list[Any], labels: list[Any] | None = None) -> datasets.Dataset:
    return datasets.Dataset(pa.table({"image": cells, "label": labels or [at % 2 for at in range(len(cells))]}))


def seen(cell: Any) -> np.ndarray:
    image = decoded(cell)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_a_folder_has_a_class_in_each_subfolder_and_reads_no_image_before_it_is_used(tmp_path):
    folder = folder_of(tmp_path / "pets")
    (folder / "cat" / ".hidden.png").write_bytes(b"x")
    (folder / "dog" / "notes.txt").write_text("x")
    rows = load_rows(DataConfig(source=str(folder)))
    assert rows.features["label"].names == ["cat", "dog"]
    assert [Path(cell["path"]).parent.name for cell in rows["image"]] == ["cat", "cat", "dog", "dog"]
    assert all(cell["bytes"] is None for cell in rows["image"])
    np.testing.assert_array_equal(seen(rows["image"][3]), drawn(11, (24, 16, 3)))


def test_parquet_holds_images_as_the_hub_does_or_as_bytes_alone(tmp_path):
    files = [as_file(drawn(at)) for at in range(2)]
    hub = datasets.Dataset.from_dict({"image": [Image.fromarray(drawn(at)) for at in range(2)], "label": [0, 1]})
    hub = hub.cast_column("image", datasets.Image())
    hub.to_parquet(str(tmp_path / "hub.parquet"))
    pq.write_table(
        pa.table({"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1]}),
        tmp_path / "struct.parquet",
    )
    pq.write_table(pa.table({"image": files, "label": [0, 1]}), tmp_path / "plain.parquet")
    for name in ("hub", "struct", "plain"):
        rows = load_rows(DataConfig(source=str(tmp_path / f"{name}.parquet")))
        for at, cell in enumerate(rows[:]["image"]):
            np.testing.assert_array_equal(seen(cell), drawn(at))


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels")])
def test_npz_holds_arrays_under_the_names_that_sets_use(tmp_path, names):
    for size in ((3, 16, 16), (3, 16, 16, 1), (3, 16, 16, 3), (3, 16, 16, 4)):
        images = drawn(0, size)
        np.savez(tmp_path / "set.npz", **{names[0]: images, names[1]: np.array([[0], [1], [1]])})
        rows = load_rows(DataConfig(source=str(tmp_path / "set.npz")))
        assert rows["label"][:] == [0, 1, 1]
        plain = images.reshape(3, 16, 16, -1).astype(float)
        if size[-1] == 4:
            opacity = plain[..., 3:] / 255
            plain = plain[..., :3] * opacity + 255 * (1 - opacity)
        for cell, wanted in zip(rows["image"], plain, strict=True):
            np.testing.assert_allclose(seen(cell), np.broadcast_to(wanted, (16, 16, 3)), atol=1)


def test_npz_of_16_bits_keeps_the_whole_range(tmp_path):
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(1, 16, 16)
    np.savez(tmp_path / "deep.npz", images=deep, labels=[0])
    (cell,) = load_rows(DataConfig(source=str(tmp_path / "deep.npz")))["image"]
    np.testing.assert_array_equal(seen(cell)[..., 0].reshape(-1), np.arange(256))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_with_the_labels_beside_them(tmp_path, packed):
    images, labels = drawn(0, (3, 28, 28)), np.array([1, 0, 1], np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        content = gzip.compress(idx(values)) if packed else idx(values)
        (tmp_path / f"train-{name}-ubyte{'.gz' * packed}").write_bytes(content)
    source = tmp_path / f"train-images-idx3-ubyte{'.gz' * packed}"
    rows = load_rows(DataConfig(source=str(source)))
    assert rows["label"][:] == [1, 0, 1]
    np.testing.assert_array_equal(seen(rows["image"][2])[..., 1], images[2])


def test_every_mode_of_pillow_becomes_the_rgb_that_the_eye_sees():
    grey = drawn(0, (16, 16))
    np.testing.assert_array_equal(seen(as_file(grey))[..., 2], grey)
    np.testing.assert_array_equal(seen(as_file(grey.astype(np.uint16) * 257))[..., 0], grey)
    np.testing.assert_array_equal(seen(as_file(grey.astype(np.uint16) * 257, "TIFF"))[..., 0], grey)
    hidden = np.dstack([drawn(1), np.repeat([[0, 255]], 16, axis=0).repeat(8, axis=1).astype(np.uint8)])
    found = seen(as_file(hidden))
    assert (found[:, :8] == 255).all()  # transparent: whatever colour is stored there
    np.testing.assert_array_equal(found[:, 8:], hidden[:, 8:, :3])
    palette = Image.fromarray(drawn(2)).quantize(16)
    np.testing.assert_array_equal(seen(as_file(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(seen(as_file(bits))[..., 0], np.where(grey > 127, 255, 0))
    assert seen(as_file(Image.fromarray(drawn(3)).convert("CMYK"), "JPEG")).shape == (16, 16, 3)
    turned = Image.fromarray(drawn(4, (16, 8, 3)))
    buffer = io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(seen(buffer.getvalue()), np.rot90(drawn(4, (16, 8, 3)), -1))


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (as_file(drawn(0, (64, 64, 3)), "JPEG")[:-400], "an image that is cut off or damaged"),
        (as_file(drawn(0, (64, 64, 3)))[:-400], "an image that is cut off or damaged"),
        (as_file(drawn())[:20], "cut off or damaged|no image of a kind"),
        (b"", "an empty image, of 0 bytes"),
        (b"GIF is what it is not", "no image of a kind that can be read"),
        (b"DDS \x7c" + bytes(203), "no image of a kind that can be read"),  # pixels that pillow has not implemented
        ("cat.png", "text of 7 characters, expected an image"),
        ({"bytes": None, "path": "/nowhere/cat.png"}, "an image whose file is not there"),
        (as_file(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "an image of fractions"),
        (as_file(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "values beyond 16 bits"),
    ],
)
def test_a_bad_image_is_one_sentence(cell, words):
    with pytest.raises(RowError, match=words):
        decoded(cell)


@pytest.mark.skipif(not features.check("avif"), reason="this pillow reads no AVIF")
def test_a_damaged_avif_is_one_sentence():
    head, data, values = as_file(drawn(0, (64, 64, 3)), "AVIF").partition(b"mdat")
    with pytest.raises(RowError, match="cut off or damaged"):
        decoded(head + data + bytes(len(values)))


def test_examples_are_what_the_processor_makes_and_only_a_rounds_are_kept(tmp_path):
    processor, data = image_processor(), DataConfig(source=str(folder_of(tmp_path / "pets", each=3)))
    rows = load_rows(data)
    examples = LazyExamples(rows, processor, data, TASK)
    for at in range(6):
        example = examples[at]
        wanted = processor(images=[decoded(rows["image"][at])])["pixel_values"][0]
        scale, shift = (example[name][:, None, None] for name in ("scale", "shift"))
        np.testing.assert_allclose(example["pixels"] * scale + shift, wanted, atol=1e-6)
        assert example["pixels"].dtype == np.uint8
        assert example["labels"] == at // 3
    examples.ahead([1, 2])
    examples.ahead([2, 4])
    assert sorted(examples._done) == [2, 4]


def test_a_bad_file_of_a_folder_is_named(tmp_path):
    folder = folder_of(tmp_path / "pets")
    (folder / "dog" / "0.png").write_bytes(b"")
    data = DataConfig(source=str(folder))
    with pytest.raises(DataError, match=r"file dog/0.png: an empty image, of 0 bytes; put back the file"):
        LazyExamples(load_rows(data), image_processor(), data, TASK)
    whole = as_file(drawn(0, (64, 64, 3)))
    (folder / "dog" / "0.png").write_bytes(whole[: len(whole) // 2])  # its head is whole
    examples = LazyExamples(load_rows(data), image_processor(), data, TASK)
    with pytest.raises(DataError, match=r"file dog/0.png: an image that is cut off or damaged"):
        examples[2]
    found = check_rows(load_rows(data), image_processor(), data, TASK)
    assert [fault.split(";")[0] for fault in found.faults] == ["file dog/0.png: an image that is cut off or damaged"]
    assert found.classes == {"cat": 2, "dog": 2}
    assert "pixels: 256 in each image, as the model sees it" in lines(found, data)


def test_rows_without_an_image_or_a_class_are_left_out(tmp_path, caplog):
    file = as_file(drawn())
    rows = rows_of([{"bytes": file, "path": None}, None, {"bytes": file, "path": None}], [1, 0, None])
    data = DataConfig(source="rows")
    assert len(encode(rows, image_processor(), data, TASK)) == 1
    assert (
        "2 of 3 rows have nothing to predict and are left out: no image (row 2); a blank label (row 3)" in caplog.text
    )


def emptied(folder: Path) -> Path:
    for file in (folder / "dog").iterdir():
        file.unlink()
    return folder


def one_class(folder: Path) -> Path:
    (emptied(folder) / "dog").rmdir()
    return folder


def loose(folder: Path) -> Path:
    (folder / "more.jpg").write_bytes(as_file(drawn(), "JPEG"))
    return folder


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def idx_file(folder: Path, images: bytes, labels: bytes | None) -> Path:
    (folder / "a-images-idx3-ubyte").write_bytes(images)
    if labels is not None:
        (folder / "a-labels-idx1-ubyte").write_bytes(labels)
    return folder / "a-images-idx3-ubyte"


IMAGES, LABELS = idx(np.zeros((2, 4, 4), np.uint8)), idx(np.zeros(2, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (one_class, "holds one class of images, 'cat', expected a subfolder for each of two or more classes"),
        (emptied, "dog holds no image"),
        (loose, "holds 'more.jpg' beside its subfolders; put each image into the folder of its class"),
        (lambda folder: folder / "cat", "holds '0.png', '1.png' beside"),
        (lambda folder: folder.parent, "pets holds no image .* name the folder whose subfolders are the classes"),
        (lambda folder: npz(folder, a=[1]), "has the arrays 'a', expected train_images and train_labels or"),
        (lambda folder: npz(folder, x=np.zeros((2, 4, 4)), y=[0, 1]), "images of float64 .* expected whole numbers"),
        (lambda folder: npz(folder, x=np.zeros((2, 4, 4), np.uint8), y=[0]), r"x is \[2, 4, 4\] and y is \[1\]"),
        (lambda folder: folder / "no.npz", "no.npz: no such file"),
        (
            lambda folder: idx_file(folder, IMAGES[:-3], LABELS),
            "has 45 bytes, expected 48 for .2, 4, 4.; copy it again",
        ),
        (lambda folder: idx_file(folder, b"P5" + IMAGES, LABELS), "is no IDX file of bytes with 3 dimensions"),
        (lambda folder: idx_file(folder, IMAGES, None), "a-labels-idx1-ubyte: no such file"),
        (lambda folder: idx_file(folder, IMAGES, idx(np.zeros(3, np.uint8))), "holds 2 images, but .* has 3 classes"),
    ],
)
def test_a_source_of_images_that_cannot_be_used_is_one_sentence(tmp_path, spoil, words):
    path = spoil(folder_of(tmp_path / "pets"))
    with pytest.raises(DataError, match=words) as error:
        load_rows(DataConfig(source=str(path)))
    assert "\n" not in str(error.value)


def test_rows_of_texts_are_refused_by_their_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 0}\n')
    data = DataConfig(source=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"no column 'image', which data.form = 'image' needs; the columns are 'text'"):
        encode(load_rows(data), image_processor(), data, TASK)
    with pytest.raises(DataError, match=r"does not fit model.task, which takes the form 'image'"):
        encode(load_rows(data), image_processor(), replace(data, form="label"), TASK)


@pytest.fixture
def clothes(tmp_path, monkeypatch) -> DataConfig:
    """Fashion-MNIST with 200 random images."""
    images, labels = drawn(0, (200, 28, 28)), np.arange(200, dtype=np.uint8) % 10
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    return DataConfig(source="fashion-mnist")


def test_fashion_mnist_has_its_own_order_of_classes_and_clients_by_dirichlet_or_at_random(clothes):
    rows = load_rows(clothes)
    assert rows.features["label"].names[:2] == ["T-shirt/top", "Trouser"]
    assert rows["label"][:3] == [0, 1, 2]
    with pytest.raises(DataError, match=r"its rows belong to nobody, so that data.partition = 'natural' has no key"):
        split_rows(rows, clothes, 4, seed=0)
    skewed = split_rows(rows, replace(clothes, partition="dirichlet", dirichlet_alpha=0.1), 4, seed=0)
    even = split_rows(rows, replace(clothes, partition="iid"), 4, seed=0)
    most = [
        max(np.bincount(split.client(client)["label"]).max() / split.count(client) for client in range(4))
        for split in (skewed, even)
    ]
    assert most[0] > 2 * most[1]


@pytest.mark.slow
def test_fashion_mnist():
    rows = load_rows(DataConfig(source="fashion-mnist"))
    assert np.bincount(rows["label"]).tolist() == [6000] * 10
    assert rows.features["label"].names[rows[0]["label"]] == "Ankle boot"
    assert decoded(rows[0]["image"]).size == (28, 28)
