"""A mistake that is all clients' alike is one sentence before the run; what was not run leaves no folder."""

from __future__ import annotations

import io
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from rich.console import Console
from transformers import AutoTokenizer

from fedlora.common.errors import DataError, FedLoraError, ModelError, RunError
from fedlora.common.events import emit, listen
from fedlora.exchange import wire
from fedlora.results.display import RunDisplay, cut_line
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from fedlora.strategies import server_app
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import crashing
from tests.tiny import CHAT_TEMPLATE, save_llama


@pytest.fixture(autouse=True)
def _fresh(fresh_process: None) -> None:
    """Bases and folds of one test are not the next one's."""


def rows(path: Path, *found: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("engine", [simulation.in_process, flower.run])
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data__source": "missing.jsonl"}, r"missing\.jsonl: no such file"),
        ({"data__form": "text"}, "no column 'text'"),
        ({"model__task": "classification"}, "no column 'text', which data.form = 'label' needs"),
        ({"model__name": "missing/folder/"}, r"model\.name = 'missing/folder/'"),
        ({"model__device": "cuda:7"}, "cuda:7"),
        ({"lora__target_modules": "query"}, "this model's linear modules are"),
        ({"data__partition": "iid", "federation__clients": 100, "lora__ranks": "2"}, "leaves client 51 without rows"),
    ],
    ids=str,
)
def test_a_common_mistake_is_said_before_anybody_is_asked(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, keys: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(server_app, "RunRecord", lambda config: pytest.fail("a run began"))
    monkeypatch.setattr(flower, "_superlink", lambda home: pytest.fail("Flower was started"))
    with pytest.raises(FedLoraError, match=says):
        engine(tiny(tmp_path, tiny_llama, **keys))
    assert not (tmp_path / "runs").exists()


def test_rows_that_no_client_can_read_are_a_common_mistake(tmp_path: Path, tiny_llama: Path) -> None:
    found = [{"text": f"ash {number}", "label": 5} for number in range(60)]
    keys = {"model__task": "classification", "data__partition": "iid", "strategy__name": "fedavg", "lora__ranks": "2"}
    keys["data__source"] = rows(tmp_path / "classes.jsonl", *found)
    with pytest.raises(DataError, match=r"'label' holds classes outside 0 to 1 in lines? .* set model\.labels"):
        simulation.in_process(tiny(tmp_path, tiny_llama, **keys))
    assert not (tmp_path / "runs").exists()


def test_a_tokenizer_without_a_default_template_is_refused_before_the_run(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "named")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    with pytest.raises(DataError, match=r"choose one of 'rag', 'tool_use' as data\.chat-template"):
        simulation.in_process(tiny(tmp_path, model))
    assert not (tmp_path / "runs").exists()
    _, result = run_locally(tiny(tmp_path, model, data__chat_template="rag", federation__rounds=1))
    assert result["status"] == "completed"


def test_one_clients_mistake_is_its_own(tmp_path: Path, tiny_llama: Path) -> None:
    found = [{"text": f"ash {n}", "label": 5 if n % 2 else n % 4 // 2, "who": n % 2} for n in range(40)]
    keys = {
        "model__task": "classification",
        "data__partition_by": "who",
        "strategy__name": "fedavg",
        "lora__ranks": "2",
    }
    keys["data__source"] = rows(tmp_path / "classes.jsonl", *found)
    more = {"federation__clients": 2, "federation__rounds": 1, "evaluate__server": False}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **keys, **more))
    assert set(result["rounds"][0]["clients"]) == {"0"}
    assert "'label' holds classes outside 0 to 1 in lines" in result["rounds"][0]["failures"]["1"]


def test_many_long_rows_are_told_of_before_the_run_and_after_it(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fedlora"), "propagate", True)
    keys = {"federation__clients": 2, "federation__rounds": 1, "data__partition": "iid", "strategy__name": "fedavg"}
    found = [{"text": "ash " * (20 if number % 4 == 0 else 2)} for number in range(40)]
    keys["data__source"] = rows(tmp_path / "texts.jsonl", *found)
    folder, result = run_locally(tiny(tmp_path, tiny_llama, **keys, lora__ranks="2", train__steps=9))
    warned = "25% of the rows are longer than data.max-length = 64 tokens and are cut; with data.max-length = 81, 95"
    assert caplog.text.count(warned) == 1
    shares = [answer["train-cut"] for answer in result["rounds"][0]["clients"].values()]
    assert all(0.1 < share < 0.5 for share in shares)
    assert result["rounds"][0]["train-cut"] == pytest.approx(sum(shares) / 2)
    assert f"{sum(shares) / 2:.1%} of the rows that clients trained on are longer than data.max-length = 64" in (
        cut_line(folder)
    )
    caplog.clear()
    more = {"run__id": "two", "data__max_length": 81, "train__steps": 1}
    folder, _ = run_locally(tiny(tmp_path, tiny_llama, **keys, lora__ranks="2", **more))
    assert "are longer than" not in caplog.text + cut_line(folder)


def closed() -> ClientApp:
    app = ClientApp()
    app.query()(lambda message, context: Message(Error(wire.REFUSED, "closed"), reply_to=message))
    return app


def test_nothing_is_left_of_what_was_not_run(tmp_path: Path, tiny_llama: Path) -> None:
    config = tiny(tmp_path, tiny_llama)
    with pytest.raises(RunError, match="0 of 4 clients can take part"):
        simulation.in_process(config, client_app=closed())
    assert not (tmp_path / "runs").exists()

    def stop(kind: str, facts: dict[str, Any]) -> None:
        if kind == "evaluate-start":
            raise KeyboardInterrupt

    with listen(stop), pytest.raises(KeyboardInterrupt):
        simulation.in_process(config)
    assert not (tmp_path / "runs").exists()


def test_what_was_run_or_was_there_before_stays(tmp_path: Path, tiny_llama: Path) -> None:
    config = tiny(tmp_path, tiny_llama, evaluate__server=False, federation__min_clients=4)
    with pytest.raises(RunError, match="3 of 4 clients answered"):
        simulation.in_process(config, client_app=crashing(0, "train"))
    assert json.loads((folder_of(config) / "result.json").read_text())["status"] == "failed"
    with pytest.raises(RunError, match="exists already"):
        simulation.in_process(config)
    assert (folder_of(config) / "result.json").is_file()
    (tmp_path / "b").mkdir()
    mine = tmp_path / "b" / "runs"
    mine.mkdir()
    with pytest.raises(ModelError):
        simulation.in_process(tiny(tmp_path / "b", tiny_llama, model__device="cuda:7"))
    assert mine.is_dir()


def test_results_are_told_of_once_there_are_some(tmp_path: Path, tiny_llama: Path) -> None:
    config = tiny(tmp_path, tiny_llama)
    result = folder_of(config) / "result.json"
    held: list[bool] = []

    class Look(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == f"results: {folder_of(config)}":
                held.append("baseline" in json.loads(result.read_text()))

    handler = Look()
    logging.getLogger("fedlora").addHandler(handler)
    logging.getLogger("fedlora").setLevel(logging.INFO)
    try:
        simulation.in_process(config)
    finally:
        logging.getLogger("fedlora").removeHandler(handler)
    assert held == [True]


def test_a_comparison_on_a_device_that_is_not_here_is_refused_before_its_first_cell(tmp_path, tiny_llama, monkeypatch):
    def cell(*_: object) -> None:
        raise AssertionError("a cell was looked at")

    from fedlora.simulations.comparison import checks as of_scenarios

    monkeypatch.setattr(of_scenarios, "check", cell)
    grid = SimpleNamespace(cells=[], scenarios={})
    with pytest.raises(ModelError, match=r"^--slots = 'cuda:99', but torch .* sees \d+ CUDA devices"):
        of_scenarios.check_scenarios(grid, ["cpu", "cuda:99"])


def test_a_piped_run_says_where_it_stands_when_it_was_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    written = io.StringIO()
    with RunDisplay(Console(file=written, width=200)) as display, listen(display):
        emit("evaluate-start", examples=64)
        for done in range(16, 65, 16):
            now[0] += 6
            emit("evaluate-step", done=done, total=64)
        emit("round-start", round=1, rounds=3, clients=1)
        emit("client-start", client_id=0, rank=4, round=1)
        for step in range(1, 9):
            now[0] += 4
            emit("client-step", client_id=0, step=step, steps=8, loss=2.0, round=1)
    assert written.getvalue().splitlines() == [
        "evaluated 32 of 64 held-out rows",
        "evaluated 64 of 64 held-out rows",
        "round 1 of 3: 1 client is asked",
        "round 1  client 0  step 3 of 8  loss 2.0000",
        "round 1  client 0  step 6 of 8  loss 2.0000",
    ]


def test_a_hundred_clients_with_one_reason_are_few_lines() -> None:
    written = io.StringIO()
    with RunDisplay(Console(file=written, width=200)) as display, listen(display):
        for client in range(100):
            emit("client-failed", client_id=client, node=client, reason=f"client {client} refused: closed", round=1)
        emit("client-failed", client_id=100, node=100, reason="client 100 refused: no room", round=1)
    assert written.getvalue().splitlines() == [
        *(f"round 1  not counted: client {client} refused: closed" for client in range(3)),
        "  and 97 more for the same reason",
        "round 1  not counted: client 100 refused: no room",
    ]
