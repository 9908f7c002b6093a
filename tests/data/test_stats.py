"""The numbers of each client are counted from its own rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedlora.common.errors import DataError
from fedlora.config import DataConfig, parse
from fedlora.data import ClientStatistics, client_statistics, split_rows
from fedlora.results.display import data_table
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification

DATA = DataConfig(source="mine.jsonl", heldout_fraction=0.0)


def test_labels_by_name() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"]), "who": Value("string")})
    rows = Dataset.from_dict(
        {"text": ["ab", "abcd", "x"], "label": [1, 1, 0], "who": ["p", "p", "q"]}, features=features
    )
    split = split_rows(rows, replace(DATA, partition_by="who"), 2, 0)
    assert client_statistics(split, DATA, Classification()) == [
        ClientStatistics(client_id=0, name="p", rows=2, mean_characters=3.0, labels={"yes": 2}),
        ClientStatistics(client_id=1, name="q", rows=1, mean_characters=1.0, labels={"no": 1}),
    ]


def test_characters_of_pairs_and_chats() -> None:
    data = replace(DATA, partition="iid")
    pairs = Dataset.from_dict({"prompt": ["abc", "d"], "response": ["é", "xyz"], "other": ["long text", ""]})
    (pair,) = client_statistics(split_rows(pairs, data, 1, 0), data, CausalLM())
    messages = [[{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]]
    (chat,) = client_statistics(split_rows(Dataset.from_dict({"messages": messages}), data, 1, 0), data, CausalLM())
    assert (pair.rows, pair.mean_characters, pair.labels, pair.name) == (2, 4.0, {}, "")
    assert chat.mean_characters == 5.0


def test_numbers_without_names() -> None:
    rows = Dataset.from_dict({"text": ["a"] * 12, "label": [0, 1, 10] * 4})
    data = replace(DATA, partition="iid")
    (client,) = client_statistics(split_rows(rows, data, 1, 0), data, Classification())
    assert client.labels == {"0": 4, "1": 4, "10": 4}


def test_missing_column() -> None:
    data = replace(DATA, partition="iid")
    split = split_rows(Dataset.from_dict({"words": ["a"]}), data, 1, 0)
    with pytest.raises(DataError, match="no column 'text'"):
        client_statistics(split, data, Classification())


def test_very_many_clients_are_a_line_for_each_rank() -> None:
    config = parse({"lora.ranks": "8,4", "federation.clients": 100})
    clients = [ClientStatistics(i, f"person {i}", 10 + i, 100.0, {"good": i % 2, "bad": 1}) for i in range(100)]
    few, many = data_table(clients[:40], config, 5), data_table(clients, config, 5)
    assert few.row_count == 40
    assert many.caption == "100 clients; --every-client lists each"
    columns = {column.header: [*column.cells] for column in many.columns}
    assert columns["rank"] == ["8", "4"]
    assert columns["clients"] == ["50", "50"]
    assert columns["rows"] == ["2950", "3000"]  # 10, 12 … 108 and 11, 13 … 109
    assert columns["of one, least"] == ["10", "11"]
    assert columns["median"] == ["59", "60"]
    assert columns["most"] == ["108", "109"]
    assert columns["labels"] == ["good: 0  bad: 50", "good: 50  bad: 50"]
    assert data_table(clients, config, 5, every=True).row_count == 100
