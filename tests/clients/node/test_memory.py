"""The node's limit on memory; that the system holds it is shown with a real worker."""

from types import SimpleNamespace

import pytest
import torch

from fedlora.clients.node import memory, rules
from fedlora.common.errors import ConfigError
from fedlora.config import parse


@pytest.mark.parametrize(("name", "index"), [("cuda", 1), ("cuda:3", 3)])
def test_on_a_gpu_it_is_a_share_of_that_device(monkeypatch, name, index):
    told = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=i * 1000 * 2**20))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *words: told.append(words))
    memory.limit({"max-memory-mb": 500}, torch.device(name))
    memory.limit({"max-memory-mb": 10**6}, torch.device(name))
    assert told == [(0.5 / index, index), (1.0, index)]


def test_no_limit_is_none_and_a_wrong_one_is_refused():
    memory.limit({}, torch.device("cpu"))
    with pytest.raises(ConfigError, match="max-memory-mb = '2G', expected a positive integer"):
        memory.limit({"max-memory-mb": "2G"}, torch.device("cpu"))
    with pytest.raises(ConfigError, match="max-memory-mb = 0, expected a positive integer"):
        rules.ruled(parse({}), {"max-memory-mb": 0})


def test_what_an_allocator_says_is_told_apart_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**55)
    assert memory.ran_out(refused.value)
    assert memory.ran_out(MemoryError())
    assert memory.ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not memory.ran_out(RuntimeError("shapes cannot be multiplied"))
    assert "max-memory-mb = 500" in memory.refusal({"max-memory-mb": 500})
    assert "this node's memory does not suffice" in memory.refusal({})
