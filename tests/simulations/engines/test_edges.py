"""Edges between the server and its clients: the same run, in messages that each carry a region."""

import json
from collections.abc import Sequence

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

from fedlora.adapters import AdapterState, LoraFactors, map_tensors
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import StrategyError, WireError
from fedlora.common.events import listen
from fedlora.config import Config
from fedlora.deployment.edge import sooner
from fedlora.exchange import Broadcast, ClientUpdate, parts, summed, wire
from fedlora.exchange.heads import HEAD
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import local
from fedlora.strategies.checks.clients import simulated
from fedlora.strategies.checks.sums import check_summed_ranks
from fedlora.strategies.configured import configured
from fedlora.strategies.server.region import Region
from fedlora.strategies.server.summing import add_up
from fedlora.strategies.server_app import app as server_app
from tests.device import run_bound
from tests.federation import METRICS, tiny
from tests.simulations.engines.test_cohorts import apart
from tests.simulations.engines.test_local import saved_adapter

RUN = 9
FLAT, TWO, DEEP = [0, 1, 2, 3], [[0, 1], [2, 3]], [[0, [1, [2]]], 3]


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    pass


class Tree:
    """Nodes, and edges with nodes of their own, in one process.

    Attributes:
        asked: (name of the edge, or "") -> the messages to it: what was asked, and the clients of its parts.
        lost: the clients and edges whose node is gone.
    """

    def __init__(self, config: Config, folder) -> None:
        self.config, self.folder = config, folder
        self.lost: dict[str, set[int]] = {}
        self.asked: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self._regions: dict[str, Region] = {}

    def grid(self, shape: Sequence, config: Config, where: str = "") -> local.LocalGrid:
        """A grid to these nodes: a number is that client, a list an edge with these nodes below."""
        configs = []
        for place, below in enumerate(shape):
            name = f"{where}e{place}"
            if isinstance(below, list):
                earlier = sooner(config)
                self._regions[name] = Region(self.grid(below, earlier, name), earlier, name, len(leaves(below)))
                configs.append({"edge": name})
            else:
                configs.append({"state": str(self.folder / "clients"), "resident": True, "partition-id": below})
        return local.LocalGrid(self._client, configs, config.to_flat(), RUN)  # pyright: ignore[reportArgumentType]

    def _client(self, message: Message, context: Context) -> Message:
        kind, number = message.metadata.message_type, message.metadata.group_id
        name = str(context.node_config.get("edge", context.node_config.get("partition-id")))
        if int(number) in self.lost.get(name, ()):
            return Message(Error(5, "Error: Node Unavailable"), reply_to=message)
        if name not in self._regions:
            return client_app(message, context)
        content = message.content
        ids = tuple(parts.split(content, "x")) if parts.is_joined(content) else ()
        self.asked.setdefault(name, []).append((kind, ids))
        task = "describe" if kind == "query" else kind.rpartition(".")[2]
        return Message(self._regions[name].answer(task, content), reply_to=message)

    def play(self, shape: Sequence):
        """`(adapter, result)` of a run."""
        held_folds._held.clear()
        flat = self.config.to_flat()
        server_app(self.grid(shape, self.config), Context(RUN, 1, {}, RecordDict(), flat))
        result = json.loads((folder_of(self.config) / "result.json").read_text())
        return saved_adapter(folder_of(self.config)), result


def leaves(shape) -> list[int]:
    return [client for below in shape for client in (leaves(below) if isinstance(below, list) else [below])]


def both(tmp_path, model, shape, **keys):
    """The run with nodes of the server alone, and that with edges: `(adapter, result)` of each, and the tree."""
    found = []
    for name, nodes in (("flat", FLAT), ("edges", shape)):
        (tmp_path / name).mkdir()
        tree = Tree(tiny(tmp_path / name, model, **{"evaluate__server": False, **keys}), tmp_path / name)
        found.append(tree.play(nodes))
    return *found, tree


SKETCHED = {"wire__sum": "sketch", "wire__sketch_passes": 2, "wire__sketch_width": 2}
PERSONAL = {"strategy__name": "fedsa", "lora__ranks": "2", "evaluate__clients": True, "data__client_test_fraction": 0.3}


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__name": "fedavg-zeropad"},
        {"strategy__name": "ffa"},
        {"strategy__name": "flora"},
        {"strategy__name": "lora-fair", "wire__upload_dtype": "int8", "federation__fraction": 0.5},
        {"strategy__name": "flora", **SKETCHED},
        {"strategy__name": "fedavg-zeropad", "privacy__secure_sum": True},
        PERSONAL,
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
@pytest.mark.parametrize("shape", [TWO, DEEP], ids=["two", "deep"])
def test_a_run_through_edges_is_the_run_without_them(tmp_path, tiny_llama, keys, shape):
    (one, first), (two, second), tree = both(tmp_path, tiny_llama, shape, **keys)
    assert apart(one, two) <= run_bound(0.0 if "privacy__secure_sum" not in keys else 1e-6)
    for left, right in zip(first["rounds"], second["rounds"], strict=True):
        assert right["failures"] == {}
        assert left["clients"].keys() == right["clients"].keys()
        assert (left["download-bytes"], left["upload-bytes"]) == (right["download-bytes"], right["upload-bytes"])
        crossed = [border["upload-bytes"] for border in right["borders"].values()]
        assert sum(crossed) <= right["upload-bytes"]
        assert "borders" not in left
        if "client-test" in left:
            assert left["client-test"] == right["client-test"]
    edges = {about["client-id"]: about.get("edges", []) for about in second["clients"]}
    deep = {0: ["e0"], 1: ["e0", "e0e1"], 2: ["e0", "e0e1", "e0e1e1"], 3: []}
    assert edges == (deep if shape is DEEP else {0: ["e0"], 1: ["e0"], 2: ["e1"], 3: ["e1"]})
    asked = [ids for kind, ids in tree.asked["e0"] if kind == "train"]
    assert all({*ids} <= {*leaves(shape[0])} for ids in asked)
    assert len(asked) <= len(second["rounds"])


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__name": "fedavg", "lora__ranks": "2"},
        {"strategy__name": "fedavg-zeropad", "federation__max_share": 1.0, "strategy__server_optimizer": "adam"},
        {"strategy__name": "ffa", "wire__upload_dtype": "int8", "wire__dtype": "bf16"},
        {"strategy__name": "rolora", "federation__fraction": 0.5},
        {"strategy__name": "rblora", "lora__ranks": "2"},
        {"strategy__name": "flora", "wire__sum": "sketch"},
        {"strategy__name": "lora-fair", "wire__sum": "sketch"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
@pytest.mark.parametrize("shape", [TWO, DEEP], ids=["two", "deep"])
def test_a_run_of_edges_that_add_up_is_the_run_without_them(tmp_path, tiny_llama, keys, shape):
    (one, first), (two, second), _ = both(tmp_path, tiny_llama, shape, wire__edges="sum", **keys)
    assert apart(one, two) <= run_bound(1e-6)
    for left, right in zip(first["rounds"], second["rounds"], strict=True):
        assert right["failures"] == {}
        assert left["clients"].keys() == right["clients"].keys()
        for client, said in left["clients"].items():
            for name in ("num-examples", "weight", "train-steps"):
                assert said[name] == right["clients"][client][name]
            assert said["train-loss"] == pytest.approx(right["clients"][client]["train-loss"], rel=1e-4)
    whole = second["rounds"][0]
    assert whole["download-bytes"] == first["rounds"][0]["download-bytes"]
    if "federation__fraction" not in keys and keys.get("wire__upload_dtype") is None:
        assert whole["upload-bytes"] < first["rounds"][0]["upload-bytes"]


@pytest.mark.parametrize("edges", ["forward", "sum"])
def test_a_node_of_a_region_that_is_gone_is_one_client_less_and_an_edge_all_of_its_clients(tmp_path, tiny_llama, edges):
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="fedavg-zeropad",
        federation__rounds=4,
        evaluate__server=False,
        wire__edges=edges,
    )
    tree = Tree(config, tmp_path)
    tree.lost = {"0": {2}, "e1": {3}}
    _, result = tree.play(TWO)
    counted = [sorted(map(int, entry["clients"])) for entry in result["rounds"]]
    assert counted == [[0, 1, 2, 3], [1, 2, 3], [0, 1], [0, 1, 2, 3]]
    assert "Node Unavailable" in result["rounds"][1]["failures"]["0"]
    assert {*result["rounds"][2]["failures"]} == {"2", "3"}
    assert result["rounds"][1]["refused"] == []


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"strategy__name": "hetlora"},
            "needs the clients' own factors, and the server would see only their mean; use",
        ),
        ({"strategy__name": "flora"}, "unless they are sketched; set wire.sum = sketch"),
        ({"strategy__name": "flora", **SKETCHED}, "asks each client a second question; set 1"),
        ({"privacy__secure_sum": True}, "set wire.edges = forward"),
        ({"federation__schedule": "buffered"}, "set synchronous"),
        ({"strategy__robust": "median"}, "judges each client's update, and the server sees none"),
        ({"strategy__correction": "feddyn"}, "keeps sums of each client, and the server sees none"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_needs_more_than_a_sum_is_refused(tmp_path, keys, says):
    config = tiny(tmp_path, tmp_path, wire__edges="sum", **{"strategy__name": "fedavg-zeropad", **keys})
    with pytest.raises(StrategyError, match=f"wire.edges = sum: .*{says}"):
        configured(config)
    unequal = tiny(tmp_path, tmp_path, wire__edges="sum", strategy__name="rblora")
    with pytest.raises(StrategyError, match=r"wire\.edges = sum: strategy\.name = rblora averages a row"):
        check_summed_ranks(configured(unequal), simulated(unequal), unequal)


def reply(client: int, rank: int, examples: int) -> tuple[Broadcast, RecordDict]:
    """A broadcast, and a client's answer whose A and B are its id + 1."""
    start = AdapterState(lora={"m": LoraFactors(A=torch.zeros(rank, 3), B=torch.zeros(2, rank), scaling=2.0)})
    end = AdapterState(lora={"m": LoraFactors(torch.ones(rank, 3), torch.ones(2, rank), 2.0)})
    end = map_tensors(lambda name, tensor: (client + 1) * tensor, end)
    update = ClientUpdate(client, end, examples, metrics=METRICS)
    return Broadcast(round=1, adapter=start), wire.encode_update(update, "model")


def test_a_sum_is_the_weighted_mean_and_one_that_does_not_add_up_is_refused():
    made = {client: reply(client, rank, examples) for client, rank, examples in ((1, 1, 10), (4, 2, 30))}
    sent, answers = ({client: pair[place] for client, pair in made.items()} for place in (0, 1))
    weights, together = {1: 10, 4: 20}, dict.fromkeys(sent, (1, 4))
    parted = add_up(answers, sent, together, weights, "model", private=False)
    assert summed.joined(parted[4]) == 1
    update, members = summed.decode(parted[1], 1, sent, "model", weights)
    assert [member.update.num_examples for member in members] == [10, 20], "weights bound what clients claim"
    # scaling 2 goes into A: rows of 2 * 2 with weight 1/3, and of 2 * 5 with weight 2/3
    assert update.adapter.lora["m"].scaling == 1.0
    assert torch.allclose(update.adapter.lora["m"].A, torch.tensor([[8.0], [20 / 3]]).expand(2, 3))
    assert torch.allclose(update.adapter.lora["m"].B, torch.tensor([4.0, 10 / 3]).expand(2, 2))
    # the same again, one edge further up
    above = add_up(parted, sent, together, weights, "model", private=False)
    assert torch.equal(
        summed.decode(above[1], 1, sent, "model", weights)[0].adapter.lora["m"].A, update.adapter.lora["m"].A
    )
    for weights, says in (({1: 9, 4: 20}, "num-examples"), ({1: 10}, "cannot be in it")):
        near = {client: sent[client] for client in weights}
        with pytest.raises(WireError, match=says):
            summed.decode(parted[1], 1, near, "model", weights)
    lone = add_up({4: parted[4]}, sent, together, {1: 10, 4: 20}, "model", private=False)
    assert "client 4 came with client 1, that has no sum" in str(lone[4])
    parted[1].config_records["sum/head"]["num-examples"] = 29
    with pytest.raises(WireError, match="a sum of 29 examples, but its clients have 30"):
        summed.decode(parted[1], 1, sent, "model", {1: 10, 4: 20})


class Twice(Tree):
    """The edge with the longest name puts client 2 into two sums."""

    def _client(self, message: Message, context: Context) -> Message:
        forger = max(self._regions, key=len)
        if message.metadata.message_type != "train" or context.node_config.get("edge") != forger:
            return super()._client(message, context)
        asked = parts.split(message.content, "x")
        some = [parts.join({client: asked[client] for client in pair}) for pair in ((0, 2), (1, 2))]
        answers = [self._regions[forger].answer("train", one) for one in some]
        first, second = (parts.split(answer, "x") for answer in answers)
        return Message(parts.join({0: first[0], 1: second[1], 2: second[2]}), reply_to=message)


def test_a_client_counts_in_one_sum_and_the_second_with_it_is_refused(tmp_path, tiny_llama):
    keys = {"strategy__name": "fedavg", "lora__ranks": "2", "wire__edges": "sum", "evaluate__server": False}
    for shape in ([[0, 1, 2], 3], [[[0, 1, 2]], 3]):
        place = tmp_path / str(len(shape[0]))
        place.mkdir()
        _, result = Twice(tiny(place, tiny_llama, **keys), place).play(shape)
        for entry in result["rounds"]:
            assert [*entry["clients"]] == ["0", "2", "3"]
            assert "sent a sum with client 2, which is in another sum" in entry["failures"]["1"]


class Growing(Tree):
    """Its last client comes after the first round."""

    def grid(self, shape, config, where=""):
        made = super().grid(shape, config, where)
        if where == "e1":
            late, rounds = max(made.get_node_ids()), self.asked.setdefault("e0", [])
            there = made.get_node_ids
            made.get_node_ids = lambda: [
                node for node in there() if node != late or any(kind == "train" for kind, _ in rounds)
            ]
        return made


def test_a_client_that_comes_later_to_a_region_joins_the_run(tmp_path, tiny_llama):
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name="flora",
        federation__rounds=5,
        federation__min_clients=3,
        federation__wait_timeout=0.5,
        evaluate__server=False,
    )
    _, result = Growing(config, tmp_path).play(TWO)
    counted = [len(entry["clients"]) for entry in result["rounds"]]
    assert counted[0] == 3
    assert counted[-1] == 4
    [late] = [about for about in result["clients"] if "joined-in-round" in about]
    assert (late["client-id"], late["edges"]) == (3, ["e1"])


def test_what_an_edge_cannot_do_is_an_answer(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__wait_timeout=0.1)
    nobody = Region(local.LocalGrid(client_app, [], config.to_flat(), RUN), config, "north", 2)
    answer = nobody.answer("describe", wire.encode_hello("model"))
    assert isinstance(answer, Error)
    assert answer.code == 5, "to be asked again, as a node that is not there"
    assert "the edge north: 0 of 2 clients connected within" in answer.reason
    old = wire.encode_hello("model")
    old.config_records[HEAD]["protocol"] = 1
    assert "the edge north: the server uses protocol 1" in nobody.answer("describe", old).reason
    assert "without records" in nobody.answer("train", RecordDict()).reason


def test_an_edge_counts_what_its_region_sends(tmp_path, tiny_llama):
    events = []
    with listen(lambda kind, facts: events.append((kind, facts))):
        config = tiny(tmp_path, tiny_llama, federation__rounds=1, evaluate__server=False, strategy__name="flora")
        _, result = Tree(config, tmp_path).play(TWO)
    said = [facts for kind, facts in events if kind == "region-answered"]
    assert [(facts["task"], facts["round"], facts["clients"]) for facts in said] == [("train", 1, 2), ("train", 1, 2)]
    for way in ("upload-bytes", "download-bytes"):
        assert sum(facts[way] for facts in said) == result["rounds"][0][way]
        assert [b[way] for b in result["rounds"][0]["borders"].values()] == [facts[way] for facts in said]
