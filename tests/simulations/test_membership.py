"""`fedlora audit`: a run that learned its rows by heart is told from one that learned nothing; bad input is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.common.errors import DataError, RunError
from fedlora.config import parse
from fedlora.simulations import membership
from fedlora.simulations.report import read, write
from fedlora.trained import export
from tests.federation import WORDS, run_locally, tiny


def random_rows(path: Path, people: int = 2, rows: int = 40) -> Path:
    """Rows whose answers can only be learned by heart."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(people * rows):
            row = {
                "prompt": " ".join(draw.sample(WORDS, 3)),
                "response": " ".join(draw.sample(WORDS, 3)),
                "person": f"p{number % people}",
            }
            file.write(json.dumps(row) + "\n")
    return path


def trained(folder: Path, model: Path, **keys) -> export.Source:
    """A run of two clients with twenty rows each, of which sixteen train; as many are held out."""
    base = {
        "federation__clients": 2,
        "federation__rounds": 1,
        "lora__ranks": "8,8",
        "data__source": str(random_rows(folder / "random.jsonl")),
        "data__heldout_fraction": 0.5,
        "data__client_max": 16,
        "evaluate__server": False,
        "train__batch_size": 8,
    }
    config = tiny(folder, model, **{**base, **keys})
    found, _ = run_locally(config)
    return export.find(found)


@pytest.fixture(scope="module")
def heart(tmp_path_factory, tiny_llama) -> export.Source:
    keys = {"federation__rounds": 3, "train__steps": 60, "train__lr": 1e-2, "train__schedule": "constant"}
    return trained(tmp_path_factory.mktemp("heart"), tiny_llama, **keys)


def test_rows_learned_by_heart_are_told_from_others(heart) -> None:
    found = membership.audit(heart, rows=32)
    assert len(found.members) == len(found.others) == 32
    assert found.members.mean() < found.others.mean() - 1
    for attack in found.attacks.values():
        assert attack.auc > 0.9


def test_a_run_that_learned_nothing_tells_nothing(tmp_path, tiny_llama) -> None:
    found = membership.audit(trained(tmp_path, tiny_llama, train__steps=1, train__lr=1e-9), rows=32)
    low, high = found.attacks["loss"].interval
    assert low < 0.5 < high
    assert found.attacks[membership.CALIBRATED].advantage < 0.5


def test_others_are_all_rows_that_no_client_trained_on(heart) -> None:
    pairs = membership._pairs(heart.config, heart.result, 1000, 0)
    seen = {json.dumps(row, sort_keys=True) for own in pairs.clients for row in own.rows}
    free = {json.dumps(row, sort_keys=True) for row in pairs.others.rows}
    whole = Path(heart.config.data.source).read_text(encoding="utf-8").splitlines()
    assert len(seen) == 32
    assert not seen & free
    assert len(seen | free) == len(whole) == 80


def test_each_shadow_trains_on_one_row_of_each_pair(heart) -> None:
    pairs = membership._pairs(heart.config, heart.result, 12, 0)
    coins = membership._coins(12, 4, 0)
    assert (coins.sum(axis=0) == 2).all()
    for inside in coins:
        tables = pairs.tables(inside)
        assert [len(table) for table in tables] == [len(own) for own in pairs.clients]
        for (client, at, other), member in zip(pairs.chosen, inside, strict=True):
            held = [json.dumps(row) for row in tables[client]]
            assert (json.dumps(pairs.clients[client].rows[int(at)]) in held) == member
            assert (json.dumps(pairs.others.rows[int(other)]) in held) != member


@pytest.mark.slow
def test_shadow_runs_are_made_once_and_find_at_least_as_much(heart) -> None:
    found = membership.audit(heart, rows=32, shadows=2)
    made = sorted(heart.run.glob("audit/*/*/result.json"))
    again = membership.audit(heart, rows=32, shadows=2)
    assert len(made) == 2
    assert made == sorted(heart.run.glob("audit/*/*/result.json"))
    assert np.array_equal(found.attacks[membership.SHADOWS].members, again.attacks[membership.SHADOWS].members)
    assert found.attacks[membership.SHADOWS].auc > 0.9


def test_the_report_draws_the_audit(heart) -> None:
    found = membership.audit(heart, rows=32)
    private = replace(found, privacy={"level": "example", "epsilon": 2.0, "delta": 1e-5})
    membership.write([found, private])
    page = write(heart.run, heart.run / "page").read_text(encoding="utf-8")
    assert "Membership inference" in page
    assert "ε = 2" in page
    curve = (heart.run / "page" / "figures" / "membership.csv").read_text(encoding="utf-8")
    assert curve.count("loss, compared with the base model") > 4


def test_the_command_prints_what_was_found(heart, monkeypatch) -> None:
    done = CliRunner().invoke(app, ["audit", str(heart.run), "--rows", "20"])
    assert done.exit_code == 0, done.output
    assert "20 training rows" in done.output
    assert len(read.audit(heart.run)) == 1


def test_an_odd_number_of_shadows_is_refused(heart) -> None:
    with pytest.raises(RunError, match="--shadows 3: half of them train on each row; give an even number"):
        membership.audit(heart, shadows=3)


def test_rows_of_others_are_needed(tmp_path, tiny_llama) -> None:
    source = trained(tmp_path, tiny_llama, data__heldout_fraction=0.0, data__client_max=0, train__steps=1)
    with pytest.raises(DataError, match="80 training rows, and 0 rows that no client had; an audit needs 10 of each"):
        membership.audit(source)


def test_rows_that_lie_elsewhere_are_noticed(heart) -> None:
    elsewhere = replace(heart, config=parse({"data.client-max": 15}, heart.config))
    with pytest.raises(DataError, match=r"client 0 trained on 16 rows, and .* has 15 for it"):
        membership.audit(elsewhere)
