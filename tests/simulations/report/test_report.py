"""The report: its files, its numbers, its sentences, and that its page needs nothing else."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fedlora.common.errors import RunError
from fedlora.simulations import report
from fedlora.simulations.report import read, tables
from fedlora.simulations.report.figures import spectra, style
from fedlora.simulations.report.figures.series import phases, points
from fedlora.strategies.registry import NAMES
from tests.simulations.comparison.helpers import cell_path, write_comparison

_SMALL = {"strategies": ("fedavg", "flora", "fedsa"), "scenarios": ("equal",), "seeds": (0, 1), "rounds": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of three strategies and its report."""
    folder = write_comparison(tmp_path_factory.mktemp("small"), **_SMALL)
    report.write(folder)
    return folder


def _page(folder: Path) -> str:
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "report" not in path.parts
    }


def test_the_partition_shows_the_ranks_of_most_strategies_and_names_the_others(tmp_path):
    folder = write_comparison(tmp_path, **_SMALL)
    for path in (folder / "cells" / "equal" / "fedavg").glob("*.json"):
        cell = json.loads(path.read_text())
        for client in cell["partition"]["clients"]:
            client["rank"] = 4
        path.write_text(json.dumps(cell))
    report.write(folder)
    rows = _csv(folder / "report" / "figures" / "partition-equal.csv")
    assert [row["rank"] for row in rows if row["class"] == "0"] == ["16", "8", "8", "4", "4", "4"]
    assert "r is that of most strategies; fedavg trains at rank 4 everywhere." in _page(folder)


def test_scenarios_that_spend_different_epsilons_are_drawn_together(tmp_path):
    folder = write_comparison(
        tmp_path, **{**_SMALL, "strategies": ("fedavg",), "scenarios": ("much", "little", "without")}
    )
    for scenario, epsilon in (("much", 8.004), ("little", 0.999)):
        for path in (folder / "cells" / scenario).rglob("*.json"):
            cell = json.loads(path.read_text())
            for run in cell["runs"]:
                run["rounds"][-1]["privacy"] = {"epsilon": epsilon, "delta": 1e-5}
            path.write_text(json.dumps(cell))
    report.write(folder)
    rows = _csv(folder / "report" / "figures" / "epsilons.csv")
    assert {row["epsilon"] for row in rows} == {"1.0", "8.0", "none"}
    finals = _csv(folder / "report" / "tables" / "final.csv")
    for row in rows:
        scenario = {"1.0": "little", "8.0": "much", "none": "without"}[row["epsilon"]]
        same = next(one for one in finals if (one["scenario"], one["label"]) == (scenario, row["strategy"]))
        assert float(row[next(key for key in row if key in ("accuracy", "loss"))]) == pytest.approx(float(same["mean"]))


def test_every_figure_has_its_three_files_and_stands_on_the_page(small):
    figures = {path.stem: path for path in (small / "report" / "figures").glob("*.svg")}
    page = _page(small)
    assert len(figures) == 14
    for name, path in figures.items():
        assert path.with_suffix(".png").stat().st_size > 5000, name
        assert len(_csv(path.with_suffix(".csv"))) > 0, name
        assert f'id="figure-{name}"' in page


def test_the_page_asks_for_nothing_outside_and_has_unique_ids(small):
    page = _page(small)
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", page)
    outside = set(re.findall(r'\b(?:src|href)="(?!#)([^"]*)"', page))
    assert not outside
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert page.count('role="img" aria-label="') == page.count("<figure ")


def test_html_is_well_formed(small):
    class Balanced(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "br", "hr"}:
                self.open_tags.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    parser = Balanced()
    parser.feed(_page(small))
    assert not parser.open_tags


def test_tables_hold_the_numbers_of_the_cells(small):
    rows = {row["label"]: row for row in _csv(small / "report" / "tables" / "final.csv")}
    flora = rows["flora"]
    values = []
    for seed in (0, 1):
        cell = json.loads(cell_path(small, "equal", "flora", float(flora["lr"]), seed).read_text())
        values.append(cell["scores"]["test"]["accuracy"])
    assert float(flora["mean"]) == pytest.approx(fmean(values))
    assert float(flora["sd"]) == pytest.approx(stdev(values))
    assert float(flora["megabytes_down"]) == pytest.approx(3 * 1.5)
    assert rows["local"]["megabytes_up"] == ""
    assert "personal" in rows["fedsa"]["notes"]
    assert rows["base"]["rank"] == rows["base"]["p_holm"] == ""
    text = f"{fmean(values):.4f} ± {stdev(values):.4f}"
    assert text in _page(small)
    assert text in (small / "report" / "tables" / "final.md").read_text(encoding="utf-8")
    latex = (small / "report" / "tables" / "final.tex").read_text(encoding="utf-8")
    assert text.replace("±", r"$\pm$") in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1


def test_curves_add_up_bytes_and_seconds(small):
    rows = [r for r in _csv(small / "report" / "figures" / "metric-megabytes-equal.csv") if r["strategy"] == "flora"]
    assert [int(row["round"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["megabytes"]) for row in rows] == pytest.approx([0, 1.85, 3.7, 5.55])
    assert all(float(b["seconds"]) > float(a["seconds"]) for a, b in pairwise(rows))


def test_tick_labels_keep_their_digits(small):
    drawn = (small / "report" / "figures" / "sweep-equal.svg").read_text(encoding="utf-8")
    assert all(f">{lr}<" in drawn for lr in ("0.001", "0.004", "0.016"))


def test_nothing_else_changes_and_the_same_data_make_the_same_page(small, tmp_path):
    before, page = _sums(small), _page(small)
    out = report.write(small, tmp_path / "out")
    assert _sums(small) == before
    assert out == tmp_path / "out" / "report.html"
    assert out.read_text(encoding="utf-8") == page


def test_one_seed_and_one_rate_are_warned_of(tmp_path):
    shape = {**_SMALL, "seeds": (0,), "rates": (0.004,), "baselines": (), "causal": True}
    page = report.write(write_comparison(tmp_path, **shape)).read_text(encoding="utf-8")
    assert "One seed: there are no ranks and no tests" in page
    assert "One learning rate" in page
    assert (
        "Not shown, since this scenario has no numbers for them: the learning-rate sweep, intruder dimensions" in page
    )
    assert ">rank<" not in page


def test_an_unfinished_comparison_reports_what_is_there(tmp_path):
    write_comparison(tmp_path, **_SMALL)
    cell_path(tmp_path, "equal", "flora", 0.016, 1).unlink()
    damaged = cell_path(tmp_path, "equal", "flora", 0.016, 0)
    damaged.write_text("{half a", encoding="utf-8")
    newer = cell_path(tmp_path, "equal", "fedavg", 0.016, 0)
    newer.write_text(newer.read_text().replace('"schema": 1', '"schema": 9', 1))
    failed = cell_path(tmp_path, "equal", "fedsa", 0.016, 0)
    cell = json.loads(failed.read_text()) | {"status": "failed", "error": "the loss of <client 2> is not finite"}
    failed.write_text(
        json.dumps({key: value for key, value in cell.items() if key not in {"scores", "runs", "spectra"}})
    )
    dirty = cell_path(tmp_path, "equal", "fedsa", 0.001, 0)
    cell = json.loads(dirty.read_text())
    cell["code"]["dirty"], cell["device"]["device"] = True, "cuda"
    dirty.write_text(json.dumps(cell))
    for seed, base in enumerate(("one", "other")):
        path = cell_path(tmp_path, "equal", "fedavg", 0.001, seed)
        cell = json.loads(path.read_text())
        cell["runs"][0]["base"] = base
        path.write_text(json.dumps(cell))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "1 of 32 cells are missing" in page
    assert "28 of 32 cells are complete" in page
    assert "cells/equal/flora/lr0.016-seed0.json: cannot be read" in page
    assert "schema 9, this version reads 1" in page
    assert "fedsa at 0.016, seed 0, failed: the loss of &lt;client 2&gt; is not finite" in page
    assert "changes that are in no commit" in page
    assert "several devices" in page
    assert "began from 2 models with other weights" in page


def test_a_grid_without_cells_is_a_page_too(tmp_path):
    write_comparison(tmp_path, **_SMALL)
    shutil.rmtree(tmp_path / "cells")
    assert "Scenario equal has no cells yet" in report.write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (None, "", "no run here, result.json is missing"),
        ("grid.json", "{", "grid.json: cannot be read"),
        ("grid.json", '{"schema": 2}', "grid.json: schema 2, this version reads 1"),
        ("grid.json", '{"schema": 1}', "lacks metric"),
        ("result.json", "[]", "result.json: holds a list"),
        ("result.json", '{"schema": 1}', "has no rounds"),
    ],
)
def test_folders_that_hold_no_results(tmp_path, name, text, message):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=message):
        report.write(tmp_path)
    assert not (tmp_path / "report").exists()


def _single(folder: Path) -> Path:
    write_comparison(folder / "grid", **_SMALL)
    cell = json.loads(cell_path(folder / "grid", "equal", "flora", 0.004, 0).read_text())
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / "run" / "result.json").write_text(json.dumps(cell["runs"][0]))
    return folder / "run"


def test_a_single_run_has_a_page_of_its_own(tmp_path):
    folder = _single(tmp_path)
    page = report.write(folder).read_text(encoding="utf-8")
    figures = {path.stem for path in (folder / "report" / "figures").glob("*.svg")}
    assert {"metric-round", "metric-megabytes", "metric-seconds", "clients", "cost", "aggregation-error"} <= figures
    assert "Not shown, since this run has no numbers for them: the adapter's spectrum." in html.unescape(page)
    assert page.count("<tr>") > 4


def _by(number: int) -> dict[str, Any]:
    """Metrics by domain after a round: far better in "north" than in "south"."""
    values = {
        "north": {"loss": 0.5 - 0.1 * number, "accuracy": 0.7 + 0.1 * number, "rows": 30},
        "south": {"loss": 0.9 - 0.1 * number, "accuracy": 0.5 + 0.05 * number, "rows": 10},
    }
    ends = {"mean": fmean, "worst": min}
    found = {word: {"accuracy": f(v["accuracy"] for v in values.values())} for word, f in ends.items()}
    found["mean"]["loss"] = fmean(v["loss"] for v in values.values())
    found["worst"]["loss"] = max(v["loss"] for v in values.values())
    return {"column": "domain", "values": values, **found}


def test_a_run_has_a_section_by_value_with_the_recorded_numbers(tmp_path):
    folder = _single(tmp_path)
    assert 'id="figure-by-value"' not in report.write(folder).read_text(encoding="utf-8")
    record = json.loads((folder / "result.json").read_text())
    record["baseline-by"] = _by(0)
    for entry in record["rounds"]:
        entry["heldout-by"] = _by(entry["round"])
    (folder / "result.json").write_text(json.dumps(record))
    page = report.write(folder).read_text(encoding="utf-8")
    assert "<h2>By domain</h2>" in page
    assert "Held-out rows by domain, after round 3" in page
    lines = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page)]
    cells = {line[0]: line[1:] for line in lines if len(line) == 4}
    assert cells["north"] == ["30", "1.0000", "0.2000"]
    assert cells["south"] == ["10", "0.6500", "0.6000"]
    assert cells["mean"] == ["", "0.8250", "0.4000"]
    assert cells["worst"] == ["", "0.6500", "0.6000"]
    assert cells["standard deviation"] == ["", f"{stdev([1.0, 0.65]):.4f}", f"{stdev([0.2, 0.6]):.4f}"]
    drawn = _csv(folder / "report" / "figures" / "by-value.csv")
    south = [float(row["value"]) for row in drawn if (row["metric"], row["domain"]) == ("accuracy", "south")]
    assert south == pytest.approx([0.5, 0.55, 0.6, 0.65])


def test_a_comparison_has_a_table_by_value_and_curves_of_their_mean(tmp_path):
    folder = write_comparison(tmp_path, **{**_SMALL, "strategies": ("fedavg", "flora"), "seeds": (0, 1)})
    grid = json.loads((folder / "grid.json").read_text())
    (folder / "grid.json").write_text(json.dumps(grid | {"metric": "accuracy-mean-by"}))
    for path in folder.glob("cells/*/*/*.json"):
        cell = json.loads(path.read_text())
        shift = 0.1 * cell["seed"] + (0.2 if cell["label"] == "flora" else 0.0)
        values = {"north": {"accuracy": 0.6 + shift, "loss": 1.0}, "south": {"accuracy": 0.4 + shift, "loss": 1.0}}
        for part in ("validation", "test"):
            more = {"accuracy-mean-by": 0.5 + shift, "accuracy-worst-by": 0.4 + shift}
            cell["scores"][part] |= {"by": {"column": "domain", "values": values}, **more}
        for run in cell["runs"]:
            for entry in run["rounds"]:
                entry["heldout-by"] = _by(entry["round"])
        path.write_text(json.dumps(cell))
    report.write(folder)
    text = (folder / "report" / "tables" / "final.md").read_text(encoding="utf-8")
    table = text[text.index("### Test accuracy by domain in scenario equal, mean over seeds") :]
    assert "| strategy | north | south | mean | worst |" in table
    assert "| flora | 0.8500 | 0.6500 | 0.7500 | 0.6500 |" in table
    assert "| fedavg | 0.6500 | 0.4500 | 0.5500 | 0.4500 |" in table
    curves = _csv(folder / "report" / "figures" / "metric-round-equal.csv")
    last = [row for row in curves if row["round"] == "3"]
    assert last
    assert all(float(value) == pytest.approx(0.825) for row in last for name, value in row.items() if name == "mean")


def test_the_spectrum_of_an_adapter_is_that_of_its_product(tmp_path):
    A, B = torch.randn(4, 9), torch.randn(7, 4)
    key = "base_model.model.layer.q"
    save_file({f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    about = {"lora_alpha": 3, "r": 4, "alpha_pattern": {"layer.q": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    (found,) = spectra.adapter_spectra(tmp_path, most=5)
    expected = torch.linalg.svdvals((8 / 4 * B @ A).double())[:4].tolist()
    assert found == pytest.approx([*expected, 0.0], rel=1e-5)


def test_every_strategy_has_a_look_of_its_own():
    assert set(NAMES) <= set(style.KNOWN)
    looks = style.styles([*style.KNOWN, "fedavg-rank4", "fedavg-rank8", "flora-nf4", "mine:Own", "other:Own"])
    assert len(set(looks.values())) == len(looks)
    assert looks["fedavg-rank4"].color == looks["fedavg"].color
    assert looks["flora-nf4"].color == looks["flora"].color
    assert style.styles(["fedavg-zeropad-x"])["fedavg-zeropad-x"].color == style.KNOWN["fedavg-zeropad"].color
    assert style.styles(["flora"]) == {"flora": looks["flora"]}
    known = list(style.KNOWN.values())
    assert len({(one.marker, one.dash) for one in known}) == len(known)  # without colour


def test_points_are_means_over_seeds_of_the_rounds_that_have_a_number():
    runs = [
        {"baseline": {"loss": 4.0}, "rounds": [{"round": 1, "upload-bytes": 10**6, "heldout": {"loss": 2.0}}]},
        {"rounds": [{"round": 1, "upload-bytes": 3 * 10**6, "heldout": {"loss": 3.0}}, {"round": 2}]},
    ]
    found = points(runs, lambda entry: entry.get("heldout", {}).get("loss"))
    assert [(p.round, p.mean, p.n) for p in found] == [(0, 4.0, 1), (1, 2.5, 2)]
    assert found[1].megabytes == 2.0
    assert found[1].sd == pytest.approx(stdev([2.0, 3.0]))


def test_phases_name_what_is_left_of_a_round():
    assert phases([{"seconds": {"clients": 3.0, "checkpoint": 1.0, "round": 5.0}}]) == {
        "clients": 3.0, "checkpoint": 1.0, "other": 2.0,
    }  # fmt: skip


def test_latex_and_markdown_escape_what_is_special_there():
    table = tables.Table("50% a_b", ("a|b", "x"), (("c_1 & d", "± 1"),))
    assert r"a\|b" in tables.markdown([table])
    assert r"c\_1 \& d & $\pm$ 1 \\" in tables.latex([table])
    assert r"\caption{50\% a\_b}" in tables.latex([table])


def test_flat_joins_keys():
    assert read.flat({"a": {"b": 1}, "c": [1, 2]}) == {"a.b": 1, "c": "1, 2"}


@pytest.fixture
def browser(tmp_path):
    """Opens a page and returns its DOM, the addresses it asked for, and the browser's log."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is not installed, and without it nobody has seen the page; install chromium")
        pytest.skip("chromium is not installed")

    def look(page: Path) -> tuple[str, set[str], str]:
        log = tmp_path / "net.json"
        command = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom",
        ]  # fmt: skip
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=180, check=True)
        events = json.loads(log.read_text(encoding="utf-8"))["events"]
        asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
        own = {url for url in asked if not re.match(r"https?://([^/]*\.)?(google|googleapis|gstatic)\.", url)}
        return done.stdout, {url for url in own if re.match("(https?|ftp|wss?):", url)}, done.stderr

    return look


@pytest.mark.slow
def test_a_browser_would_notice_a_request(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="http://outside.invalid/x.png">', encoding="utf-8")
    assert browser(page)[1] == {"http://outside.invalid/x.png"}


@pytest.mark.slow
@pytest.mark.parametrize("large", [True, False])
def test_a_browser_shows_the_page_without_a_single_request(browser, tmp_path, large):
    shape = {} if large else {**_SMALL, "strategies": ("fedavg", "flora"), "seeds": (0,)}
    path = report.write(write_comparison(tmp_path / "grid", **shape))
    shown, asked, log = browser(path)
    assert not asked
    assert "CONSOLE" not in log
    figures = re.findall(r"<figure .*?</figure>", shown, re.DOTALL)
    assert len(figures) == len(list((path.parent / "figures").glob("*.svg")))
    for figure in figures:
        assert "<svg" in figure
        assert len([d for d in re.findall(r'<path d="([^"]+)"', figure) if _has_size(d)]) > 5


def _has_size(path: str) -> bool:
    """Whether a path spans more than a point."""
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]
    return len(set(numbers[::2])) > 1 or len(set(numbers[1::2])) > 1
