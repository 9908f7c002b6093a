"""Each field of a whole round's messages left out in turn, in both directions: one client is refused, nothing ends."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.client_app import app as client_app
from fedlora.common.errors import WireError
from fedlora.exchange import Broadcast, ClientUpdate, parts, wire
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from tests.federation import METRICS, tensors_of, tiny

pytestmark = pytest.mark.usefixtures("fresh_process")
ADAPTER = AdapterState(lora={"m": LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 2.0)})
Cut = tuple[str, Callable[[RecordDict], object]]


def cuts(content: RecordDict) -> Iterator[Cut]:
    """What can be left out of a message: each record, each key and metric, and of the tensors one of each part."""
    for name, record in content.items():
        yield f"record {name}", lambda c, n=name: c.pop(n)
        if name in content.array_records:
            with tensors_of(copy.deepcopy(content), name) as arrays:
                keys = {key.rsplit("|", 1)[-1]: key for key in arrays}
            for key in keys.values():
                yield f"{name}: array {key}", lambda c, n=name, k=key: _without_array(c, n, k)
        else:
            for key in record:
                yield f"{name}: {key}", lambda c, n=name, k=key: c[n].pop(k)


def _without_array(content: RecordDict, name: str, key: str) -> None:
    with tensors_of(content, name) as arrays:
        del arrays[key]


class Cutting:
    """The product's clients, of which one gets, or sends, messages that lack something: another thing in each round."""

    def __init__(self, kind: str, question: bool, client: int = 2) -> None:
        self.app, self._kind, self._question, self._client = ClientApp(), kind, question, client
        self.left: dict[str, str] = {}
        self.skip = 0
        self._todo: list[Cut] | None = None
        for register in (self.app.query(), self.app.train(), self.app.train("project"), self.app.evaluate()):
            register(self._answer)

    def _answer(self, message: Message, context: Context) -> Message:
        chosen = message.metadata.message_type == self._kind and context.node_config["partition-id"] == self._client
        if chosen and self._question:
            self._cut(message.content, message.metadata.group_id)
        answer = client_app(message, context)
        if chosen and not self._question:
            self._cut(answer.content, message.metadata.group_id)
        return answer

    def _cut(self, content: RecordDict, group: str) -> None:
        if self._todo is None:
            self._todo = list(cuts(content))[self.skip :]
        if self._todo:
            what, cut = self._todo.pop(0)
            cut(content)
            self.left[group] = what


@pytest.mark.parametrize(
    ("kind", "upload", "question"),
    [
        *(("train", "fp32", question) for question in (True, False)),
        ("train", "int8", False),
        *(("evaluate", "fp32", question) for question in (True, False)),
        *(("train.project", "fp32", question) for question in (True, False)),
    ],
)
def test_a_round_goes_on_whatever_one_message_lacks(tmp_path, tiny_llama, kind, question, upload):
    cutting = Cutting(kind, question)
    config = tiny(
        tmp_path,
        tiny_llama,
        federation__rounds=50,
        train__steps=1,
        evaluate__server=False,
        evaluate__clients=kind == "evaluate",
        data__client_test_fraction=0.3,
        wire__upload_dtype=upload,
        lora__target_modules="q_proj",
        strategy__name="lora-fair",
        wire__sum="sketch" if kind == "train.project" else "none",
        wire__sketch_width=4,
        wire__sketch_passes=2,
    )
    simulation.in_process(config, client_app=cutting.app)
    entries = json.loads((folder_of(config) / "result.json").read_text())["rounds"]
    assert 8 < len(cutting.left) < 50
    for entry in entries:
        what = cutting.left.get(str(entry["round"]))
        failures = (entry["client-test"] if kind == "evaluate" else entry)["failures"]
        if what is None:
            assert failures == {}, entry["round"]
            continue
        if (what, question) in [(f"metrics: {name}", False) for name in OPTIONAL]:
            assert failures == {}, what
            continue
        assert list(failures) == ["2"], what
        assert "Traceback" not in failures["2"], what
        assert "Error:" not in failures["2"], (what, failures["2"])


# Of an evaluation: which there are depends on the task.
OPTIONAL = ("perplexity", "exact-match", "calibration-error", "macro-f1")


@pytest.mark.parametrize("question", [True, False], ids=["asked", "answered"])
def test_a_run_starts_whatever_one_introduction_lacks(tmp_path, tiny_llama, question):
    done = 0
    while True:
        cutting = Cutting("query", question)
        cutting.skip = done
        config = tiny(
            tmp_path,
            tiny_llama,
            run__id=f"run-{done}",
            federation__rounds=1,
            federation__wait_timeout=0.0,
            train__steps=1,
            evaluate__server=False,
        )
        simulation.in_process(config, client_app=cutting.app)
        result = json.loads((folder_of(config) / "result.json").read_text())
        if not cutting.left:
            assert done > (2 if question else 8)
            return
        assert set(result["rounds"][0]["clients"]) == {"0", "1", "3"}, cutting.left
        done += 1


def test_what_one_part_of_a_nodes_message_lacks_is_that_clients_alone():
    def answer(client: int) -> RecordDict:
        return wire.encode_update(ClientUpdate(client, ADAPTER, num_examples=3, metrics=METRICS), "base")

    sent = Broadcast(round=1, adapter=ADAPTER)
    whole = parts.join({client: answer(client) for client in (3, 4)})
    assert len(whole) == 6
    for name in whole:
        cut = copy.deepcopy(whole)
        del cut[name]
        for client, part in parts.split(cut, "node 9").items():
            assert isinstance(part, RecordDict)
            if name.startswith(f"{client}/"):
                with pytest.raises(WireError, match=f"client {client}: the message "):
                    wire.decode_update(part, client, sent, "base")
            else:
                assert wire.decode_update(part, client, sent, "base").update.client_id == client
