"""Every row has one place at most, and the same place in every process."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import DataError
from fedlora.config import Config, DataConfig, FederationConfig, client_parts
from fedlora.data import Split, client_split, joined, prepare, split_rows

DATA = DataConfig(source="mine.jsonl", partition="iid", heldout_max=0)


def table(counts: dict[str, int]) -> Dataset:
    """Rows 0, 1, 2, … with keys in turn."""
    keys = [key for i in range(max(counts.values())) for key, count in counts.items() if i < count]
    return Dataset.from_dict({"id": list(range(len(keys))), "label": keys})


def ids(rows: Dataset) -> list[int]:
    return list(rows["id"])


def clients(split: Split) -> list[list[int]]:
    return [ids(split.client(client)) for client in range(len(split.parts))]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(12, 60), min_size=3, max_size=6),
    partition=st.sampled_from(["iid", "dirichlet", "natural", "sizes"]),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_parts_are_disjoint_and_complete(counts: list[int], partition: str, fraction: float, seed: int) -> None:
    rows = table({f"k{i}": count for i, count in enumerate(counts)})
    data = replace(DATA, partition=partition, heldout_fraction=fraction, sizes="1,2,1", dirichlet_alpha=100.0)
    split = split_rows(rows, data, 3, seed)
    used = [*ids(split.heldout), *(i for part in clients(split) for i in part)]
    assert len(set(used)) == len(used) == len(rows) - split.left_out
    assert split.left_out == 0 or partition in ("natural", "sizes")
    again = split_rows(rows, data, 3, seed)
    assert clients(again) == clients(split)
    assert ids(again.heldout) == ids(split.heldout)


def test_iid_sizes_are_even() -> None:
    split = split_rows(table({"a": 103}), replace(DATA, heldout_fraction=0.1), 4, 0)
    assert len(split.heldout) == 10
    assert sorted(map(len, split.parts)) == [23, 23, 23, 24]


def test_seed_moves_rows() -> None:
    rows = table({"a": 60})
    assert clients(split_rows(rows, DATA, 2, 0)) != clients(split_rows(rows, DATA, 2, 1))


def test_sizes_are_taken_as_given() -> None:
    split = split_rows(table({"a": 100}), replace(DATA, partition="sizes", sizes="50,20,10,5"), 4, 0)
    assert [len(part) for part in split.parts] == [50, 20, 10, 5]
    assert split.left_out == 5


def test_dirichlet_alpha_sets_how_unlike_clients_are() -> None:
    rows = table({"a": 400, "b": 400})

    def spread(alpha: float) -> float:
        data = replace(DATA, partition="dirichlet", dirichlet_alpha=alpha)
        split = split_rows(rows, data, 4, 3)
        shares = [np.mean([label == "a" for label in split.client(c)["label"]]) for c in range(4)]
        return float(np.std(shares))

    assert spread(0.3) > 0.2
    assert spread(1000.0) < 0.05


def test_natural_takes_the_largest_keys_first() -> None:
    rows = table({"small": 10, "tie-b": 30, "large": 50, "tie-a": 30})
    split = split_rows(rows, replace(DATA, partition="natural"), 3, 0)
    assert split.names == ("large", "tie-a", "tie-b")
    assert [set(split.client(c)["label"]) for c in range(3)] == [{"large"}, {"tie-a"}, {"tie-b"}]


def test_natural_holds_out_rows_of_the_chosen_keys_alone(caplog: pytest.LogCaptureFixture) -> None:
    rows = table({"a": 50, "b": 40, "c": 30})
    with caplog.at_level(logging.INFO, logger="fedlora"):
        split = split_rows(rows, replace(DATA, partition="natural", heldout_fraction=0.2), 2, 0)
    assert Counter(split.heldout["label"]) == {"a": 10, "b": 8}
    assert split.left_out == 30
    assert "30 of 120 rows belong to none of the 2 clients" in caplog.text


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    fraction=st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_natural_never_takes_a_clients_last_row(counts: list[int], fraction: float, seed: int) -> None:
    rows = table({f"{i:02}": count for i, count in enumerate(counts)} | {"large": 40})
    data = replace(DATA, partition="natural", heldout_fraction=fraction)
    split = split_rows(rows, data, len(counts) + 1, seed)
    held = Counter(split.heldout["label"])
    for name, part, count in zip(split.names, split.parts, sorted([*counts, 40], reverse=True), strict=True):
        assert len(part) + held[name] == count
        assert len(part) >= 1
        assert abs(held[name] - fraction * count) < 2.0


def test_numbers_are_keys_in_their_own_order() -> None:
    rows = Dataset.from_dict({"id": list(range(30)), "user": [10, 9, 100] * 10})
    split = split_rows(rows, replace(DATA, partition="natural", partition_by="user"), 3, 0)
    assert split.names == ("9", "10", "100")


def test_caps_move_no_other_row() -> None:
    rows = table({"a": 200})
    whole = split_rows(rows, DATA, 3, 5)
    capped = split_rows(rows, replace(DATA, client_max=7, heldout_max=4), 3, 5)
    assert clients(capped) == [part[:7] for part in clients(whole)]
    assert ids(capped.heldout) == ids(whole.heldout)[:4]
    assert len(whole.heldout) == 20


def test_heldout_does_not_depend_on_the_number_of_clients() -> None:
    rows = table({"a": 100})
    assert ids(split_rows(rows, DATA, 2, 0).heldout) == ids(split_rows(rows, DATA, 9, 0).heldout)


def test_selected_rows_are_split_like_any_other() -> None:
    rows = table({"a": 40, "b": 40}).select(range(79, 19, -1))
    split = split_rows(rows, replace(DATA, partition="natural"), 2, 0)
    used = [*ids(split.heldout), *(i for part in clients(split) for i in part)]
    assert sorted(used) == list(range(20, 80))
    assert set(split.client(0)["label"]) == {"a"}


def test_the_same_split_in_another_process() -> None:
    program = (
        "from datasets import Dataset; from fedlora.config import DataConfig; from fedlora.data import split_rows;"
        "rows = Dataset.from_dict({'id': list(range(90)), 'label': ['a', 'b', 'c'] * 30});"
        "data = DataConfig(source='mine.jsonl', partition='dirichlet', heldout_max=0);"
        "print([part.tolist() for part in split_rows(rows, data, 3, 11).parts])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    rows = Dataset.from_dict({"id": list(range(90)), "label": ["a", "b", "c"] * 30})
    np.random.default_rng(0).random(7)
    split = split_rows(rows, replace(DATA, partition="dirichlet"), 3, 11)
    assert printed.strip() == str([part.tolist() for part in split.parts])


def test_global_generators_are_left_alone() -> None:
    def state() -> str:
        return f"{np.random.get_state()} {random.getstate()}"

    before = state()
    split_rows(table({"a": 50, "b": 50}), replace(DATA, partition="dirichlet"), 2, 0)
    assert state() == before


@pytest.mark.parametrize("partition", ["iid", "natural"])
def test_a_thousand_clients_take_seconds(partition: str) -> None:
    rows = table({f"{i:04}": 12 for i in range(1000)})
    start = time.perf_counter()
    split = split_rows(rows, replace(DATA, partition=partition), 1000, 0)
    assert time.perf_counter() - start < 20
    assert len(split.parts) == 1000


@pytest.mark.parametrize(
    ("counts", "changes", "clients", "message"),
    [
        ({"a": 20, "b": 20}, {"partition": "natural"}, 3, r"'label' has 2 values, too few for 3 natural clients"),
        ({"a": 20}, {"partition_by": "who", "partition": "natural"}, 1, r"no column 'who'.*'id', 'label'"),
        ({"a": 20}, {"partition": "sizes", "sizes": "10,9"}, 2, r"asks for 19 rows, but 18 are left"),
        ({"a": 20}, {}, 19, r"leaves client 18 without rows \(18 training rows for 19 clients\)"),
        ({"a": 20}, {"partition": "dirichlet", "dirichlet_alpha": 0.001}, 9, r"leaves client \d without rows.*alpha"),
        ({"a": 5}, {}, 1, r"data\.heldout-fraction = 0\.1 of 5 rows leaves none"),
    ],
)
def test_splits_that_cannot_be(counts: dict[str, int], changes: dict, clients: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_rows(table(counts), replace(DATA, **changes), clients, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a", None, None], r"'label' is empty in 2 of 3 rows"),
        ([["a"], ["b"], ["c"]], r"'label' holds list<.*expected"),
    ],
)
def test_keys_that_are_none(keys: list, message: str) -> None:
    rows = Dataset.from_dict({"label": keys})
    with pytest.raises(DataError, match=message):
        split_rows(rows, replace(DATA, partition="natural"), 1, 0)


def test_a_client_beyond_the_last() -> None:
    split = split_rows(table({"a": 20}), DATA, 2, 0)
    with pytest.raises(DataError, match="client 2 has no rows: the data is divided among 2 clients, 0 to 1"):
        split.client(2)


@given(n=st.integers(1, 30), fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_client_split(n: int, fraction: float, seed: int) -> None:
    rows = table({"a": n})
    train, test = client_split(rows, fraction, seed)
    assert sorted(ids(train) + ids(test)) == list(range(n))
    assert len(train) >= 1
    assert (len(test) >= 1) == (fraction > 0 and n > 1)
    assert ids(client_split(rows, fraction, seed)[1]) == ids(test)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(20, 60), min_size=3, max_size=6),
    partition=st.sampled_from(["iid", "dirichlet", "natural", "sizes"]),
    heldout=st.sampled_from([0.2, 0.5]),
    test=st.sampled_from([0.0, 0.3, 0.5]),
    seed=st.integers(0, 2**32),
)
def test_what_is_tested_is_nobody_elses(counts, partition, heldout, test, seed) -> None:
    rows = table({f"k{i}": count for i, count in enumerate(counts)})
    data = replace(DATA, partition=partition, heldout_fraction=heldout, sizes="1,2,1", dirichlet_alpha=100.0)
    split = split_rows(rows, replace(data, test_fraction=test), 3, seed)
    used = [*ids(split.heldout), *ids(split.test), *(i for part in clients(split) for i in part)]
    assert len(set(used)) == len(used) == len(rows) - split.left_out
    without = split_rows(rows, data, 3, seed)
    assert clients(split) == clients(without)
    assert sorted(ids(split.heldout) + ids(split.test)) == sorted(ids(without.heldout))
    assert abs(len(split.test) - test * len(without.heldout)) < 1 + (len(counts) if partition != "iid" else 0)
    assert bool(len(split.test)) == bool(test)
    for held, owners in zip((split.heldout, split.test), split.owners, strict=True):
        if partition == "natural":
            assert [split.names[owner] for owner in owners] == list(held["label"])
        else:
            assert len(owners) == 0


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural", "sizes"])
@pytest.mark.parametrize("cap", [0, 5])
def test_parts_of_other_clients(partition: str, cap: int) -> None:
    rows = table({"a": 50, "b": 40, "c": 30, "d": 20})
    changes = {"sizes": "20,10,10,5", "dirichlet_alpha": 100.0, "heldout_fraction": 0.2, "test_fraction": 0.5}
    data = replace(DATA, partition=partition, client_max=cap, **changes)
    split = split_rows(rows, data, 4, 3)

    def dealt(parts: str, count: int) -> Split:
        groups, total = client_parts(replace(data, parts=parts), count)
        assert total == 4
        return joined(split, groups)

    whole = dealt("0+1+2+3 of 4", 1)
    assert clients(whole) == [[row for part in clients(split) for row in part]]
    for part in range(4):
        alone = dealt(f"{part} of 4", 1)
        assert clients(alone) == [clients(split)[part]]
        assert alone.names == (split.names[part : part + 1] if split.names else ())
    pairs = dealt("3+0,2 of 4", 2)
    assert clients(pairs) == [clients(split)[3] + clients(split)[0], clients(split)[2]]
    for other in (whole, pairs):
        assert (ids(other.heldout), ids(other.test)) == (ids(split.heldout), ids(split.test))
        assert [list(owners) for owners in other.owners] == [list(owners) for owners in split.owners]


@pytest.mark.parametrize("partition", ["iid", "natural"])
def test_prepare_deals_the_parts_that_are_asked_for(tmp_path, partition: str) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [{"text": f"row {number}", "label": number % 3} for number in range(60)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = DataConfig(source=str(path), partition=partition, heldout_fraction=0.2, test_fraction=0.5)

    def texts(parts: str, count: int) -> tuple[list[list[str]], list[str], list[str]]:
        config = Config(data=replace(data, parts=parts), federation=FederationConfig(clients=count))
        split = prepare(config)
        held = (list(split.heldout["text"]), list(split.test["text"]))
        return [list(split.client(client)["text"]) for client in range(count)], *held

    each, *held = texts("", 3)
    whole, *same = texts("0+1+2 of 3", 1)
    assert whole == [[text for part in each for text in part]]
    assert same == held
    for part in range(3):
        assert texts(f"{part} of 3", 1) == ([each[part]], *held)


@pytest.mark.slow
def test_prepare_deals_the_packaged_set_once() -> None:
    config = Config(data=DataConfig(source="sentiment"), federation=FederationConfig(clients=4))
    split = prepare(config)
    assert split.names == ("movies", "tweets", "amazon", "nyt")
    assert len(split.heldout) == 64
    assert prepare(replace(config)) is split
