"""The images in a run's report: those of the clients' rows, of simulations alone, and none where none are wanted."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fedlora.config import Config, parse
from fedlora.data import prepare
from fedlora.data.images import decoded
from fedlora.results.record import RunRecord
from fedlora.simulations import report
from tests.federation import run_locally, tiny
from tests.tasks.test_image_classification import config_of

WORDS = "No samples of the clients' images: "


def write_domains(path: Path, rows: int = 60) -> Path:
    """Small images of two classes and three domains, all different."""
    draw = np.random.default_rng(0)
    table = []
    for at in range(rows):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        table.append({"image": image, "label": ("cat", "dog")[at % 2], "domain": ("ink", "oil", "photo")[at % 3]})
    parquet.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> tuple[Config, Path]:
    folder = tmp_path_factory.mktemp("samples")
    keys: dict[str, Any] = {"evaluate__by": "domain", "federation__rounds": 1, "lora__ranks": "2"}
    config = config_of(folder, tiny_vit, write_domains(folder / "rows.parquet"), **keys)
    return config, run_locally(config)[0]


@pytest.fixture
def run(finished: tuple[Config, Path], tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def page_of(folder: Path, **options: int) -> str:
    return report.write(folder, **options).read_text(encoding="utf-8")


def pictures_in(page: str) -> list[np.ndarray]:
    """The images that stand in the figure of samples, decoded."""
    figure = page.partition('id="figure-samples"')[2].partition("</figure>")[0]
    found = re.findall(r'href="data:image/png;base64,([^"]+)"', figure)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_the_images_are_the_first_rows_of_each_client_with_class_and_domain(finished, run):
    config, _ = finished
    page = page_of(run, samples=4)
    split = prepare(config)
    names = split.rows.features["label"].names
    expected = [(client, int(at)) for client, part in enumerate(split.parts) for at in part[:4]]
    with (run / "report" / "figures" / "samples.csv").open(encoding="utf-8", newline="") as file:
        told = list(csv.DictReader(file))
    assert [(int(row["client"]), int(row["row"]) - 1) for row in told] == expected
    for row, (_, at) in zip(told, expected, strict=True):
        assert (row["class"], row["group"]) == (names[split.rows[at]["label"]], split.rows[at]["domain"])
    shown = pictures_in(page)
    assert len(shown) == len(expected) == 8
    for image, (_, at) in zip(shown, expected, strict=True):
        assert np.array_equal(image, np.asarray(decoded(split.rows[at]["image"])))
    assert "with the class and the domain below" in page
    outside = set(re.findall(r'\b(?:src|href)="(?!#|data:)([^"]*)"', page))
    assert not outside


def test_large_images_are_made_small(tmp_path, tiny_vit):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (300, 150), "red").save(tmp_path / "images" / label / f"{number}.png")
    config = config_of(tmp_path, tiny_vit, tmp_path / "images", federation__rounds=1, lora__ranks="2")
    shown = pictures_in(page_of(run_locally(config)[0]))
    assert {image.shape for image in shown} == {(32, 64, 3)}


def test_nothing_is_left_of_images_that_are_not_wanted(run):
    assert pictures_in(page_of(run))
    assert (run / "report" / "figures" / "samples.png").is_file()
    page = page_of(run, samples=0)
    assert "Samples" not in page
    assert not list((run / "report" / "figures").glob("samples*"))


@pytest.mark.parametrize("simulated", [False, None])
def test_a_run_that_was_no_simulation_here_shows_no_image(run, simulated):
    page_of(run)  # as somebody might have done who has the rows
    record = json.loads((run / "result.json").read_text())
    assert record.pop("simulated") is True
    (run / "result.json").write_text(json.dumps(record if simulated is None else record | {"simulated": simulated}))
    page = page_of(run)
    assert WORDS + "they are shown of simulations in one process alone" in html.unescape(page)
    assert "data:image" not in page
    assert not list((run / "report" / "figures").glob("samples*"))


def test_rows_that_cannot_be_read_again_are_a_sentence(run):
    record = json.loads((run / "result.json").read_text())
    record["config"]["data.source"] = str(run / "gone.parquet")
    (run / "result.json").write_text(json.dumps(record))
    page = html.unescape(page_of(run))
    assert f"{WORDS}the rows cannot be read again on this machine: {run / 'gone.parquet'}: no such file" in page
    assert "data:image" not in page


def test_a_run_on_texts_has_no_such_section(tmp_path, tiny_llama):
    folder, record = run_locally(tiny(tmp_path, tiny_llama, federation__rounds=1))
    assert record["simulated"] is True
    assert "Samples" not in page_of(folder)


def test_a_record_is_of_no_simulation_unless_it_always_was(tmp_path):
    config = parse({"run.dir": str(tmp_path), "run.id": "one"})
    for simulated, recorded in ((False, False), (True, False)):
        record = RunRecord(config, simulated=simulated)
        assert record.data["simulated"] is recorded
        record.finish("interrupted")
        config = parse({"run.resume": True}, config)
