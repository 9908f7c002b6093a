"""The command line as a user meets it: help that teaches, one sentence per error, exit codes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedlora.cli import main, shared
from fedlora.deployment.flower_programs import config_table
from fedlora.models import adapted
from tests.federation import hears_ctrl_c, tiny

ROOT = Path(__file__).resolve().parents[2]


def fedlora(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedlora.cli", *words],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "160"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in an empty folder."""

    def run(*words: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(sys, "argv", ["fedlora", *words])
        monkeypatch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as end:
            main.main()
        written = capsys.readouterr()
        return Done(int(end.value.code or 0), written.out, written.err)

    yield run
    adapted.forget()
    shared.flags.clear()


@pytest.mark.parametrize("command", [[], ["run"], ["evaluate"], ["export"], ["data"], ["fetch"], ["doctor"], ["keys"]])
def test_every_command_explains_itself(call, command):
    done = call(*command, "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def test_help_explains_arguments_too(call):
    """Some pairs of typer and click show the name of an argument alone."""
    assert "Folder to write" in call("export", "--help").stdout


def test_the_list_of_what_is_packaged_tells_what_is_trained_here(command, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    code, said, _ = command("fetch")
    assert code == 0
    found = {line.split("│")[1].strip(): line for line in said.splitlines() if line.count("│") > 3}
    assert "trained here, on fashion-mnist" in found["fashion-vit"]
    assert "30.9 MB" in found["fashion-mnist"]


def test_the_version_is_an_option_too(call):
    from fedlora import __version__

    assert call("--version").stdout == call("version").stdout == f"{__version__}\n"


def test_keys_lists_every_key(call):
    from fedlora.config import Config

    done = call("keys")
    assert done.returncode == 0
    assert all(key in done.stdout for key in Config().to_flat())
    assert "[cosine, linear, constant]" in call("keys", "train").stdout.replace("│", "")


ERRORS = [
    (["run", "nope"], "nope: neither a TOML file nor a preset"),
    (["run", "none.toml"], "none.toml: no such file"),
    (["run", "quickstart", "-c", "lora.rnak=1"], "did you mean 'lora.rank'"),
    (["run", "quickstart", "-c", "lora.rank"], "expected key=value"),
    (["run", "quickstart", "-c", "train.lr=fast"], "train.lr = 'fast' is str, expected float"),
    (["run", "quickstart", "-c", "strategy.name=fedvag"], "; did you mean 'fedavg'?"),
    (["run", "quickstart", "-c", "strategy.name=fedavg"], "flora, florist, fslora, hetlora, lora-a2, lora-fair,"),
    (["run", "quickstart", "-c", "strategy.options=lamda=1"], "flora has no option 'lamda'"),
    (["run", "quickstart", "-c", "run.id=../../x"], "run.id = '../../x' is not the name of a single folder"),
    (["run", "quickstart", "-c", "run.name=a/b"], "run.name = 'a/b' is not the name of a single folder"),
    (["run", "quickstart", "--at-once", "2"], "--at-once needs --engine flower"),
    (["run", "--resume", "nowhere"], "nowhere: no run here"),
    (["status", "nowhere"], "nowhere: no run here"),
    (["report", "nowhere"], "nowhere: no run here"),
    (["export", "nowhere", "out"], "nowhere: no adapter here"),
    (["evaluate", "--adapter", "nowhere"], "no adapter here, adapter_config.json is missing"),
    (["fetch", "smolm2"], "'smolm2' is not packaged"),
    (["keys", "trian"], "did you mean 'train'"),
]


@pytest.mark.parametrize(("words", "says"), ERRORS, ids=[" ".join(words) for words, _ in ERRORS])
def test_a_wrong_word_is_one_sentence_and_a_failure(call, tmp_path, words, says):
    done = call(*words)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.name=missing/folder/here", "model.name"),
        ("model.device=cuda:7", "model.device = 'cuda:7'"),
        ("data.source=missing.csv", "missing.csv: no such file"),
        ("data.response-column=answer", "the form of its rows cannot be told from the columns"),
        ("federation.clients=9", "federation.clients"),
        ("lora.target-modules=query", "this model's linear modules are"),
        ("lora.ranks=99999", "client 0's rank 99999 is above"),
        ("train.optimizer=adamw-8bit", "train.optimizer = 'adamw-8bit' needs a CUDA GPU"),
    ],
)
def test_a_wrong_value_that_only_loading_shows_is_one_sentence_too(call, tmp_path, tiny_llama, change, says):
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama)), encoding="utf-8")
    done = call("run", str(preset), "-c", change)
    assert done.returncode == 1, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "refused" not in done.stdout + done.stderr  # by no client: nobody was asked
    assert "results:" not in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_a_sentence_wherever_it_is_met(call, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/there/file")

    monkeypatch.setattr(shared.configuration, "describe", full)
    done = call("keys")
    assert done.returncode == 1
    assert "error: /there/file: No space left on device; make room" in done.stderr
    assert "internal" not in done.stderr


def test_debug_gives_the_traceback(call):
    done = call("run", "nope", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_run_then_evaluate_from_another_folder(tmp_path, tiny_llama):
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama)), encoding="utf-8")
    ran = fedlora("run", str(preset), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "runs" / "tiny" / "one"
    result = json.loads((folder / "result.json").read_text())
    assert "round 0  held-out loss" in ran.stdout
    assert f"adapter: {folder / 'adapter'}" in ran.stdout

    scored = fedlora("evaluate", "--adapter", str(folder / "adapter"), cwd=ROOT)
    assert scored.returncode == 0, scored.stderr
    assert f"{result['baseline']['loss']:.4f}" in scored.stdout
    assert f"{result['rounds'][-1]['heldout']['loss']:.4f}" in scored.stdout

    refused = fedlora("evaluate", "--adapter", str(folder / "adapter"), "-c", "model.name=other", cwd=ROOT)
    assert refused.returncode == 1
    assert "model.name" in refused.stderr


def test_a_run_that_lost_a_client_shows_its_results_and_ends_as_an_error(tmp_path, tiny_llama):
    rows = tmp_path / "texts.jsonl"
    texts = [
        {"text": "a long enough text" if person != 1 else "", "person": person} for person in range(3) for _ in range(9)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    keys = {
        "data__source": str(rows),
        "data__form": "text",
        "federation__clients": 3,
        "federation__lost_clients": "fail",
    }
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama, **keys)), encoding="utf-8")
    ran = fedlora("run", str(preset), cwd=tmp_path)
    assert ran.returncode == 1, ran.stderr
    folder = tmp_path / "runs" / "tiny" / "one"
    assert f"adapter: {folder / 'adapter'}" in ran.stdout
    assert "on held-out rows" in ran.stdout
    assert re.search(r"error: all 2 rounds are done and the adapter is saved, but without .*client 1 ", ran.stderr)
    assert "set federation.lost-clients = accept" in ran.stderr
    there = fedlora("run", str(preset), cwd=tmp_path)
    assert there.returncode == 1
    assert str(folder) not in there.stdout  # what lies there is another run's
    assert "exists already" in there.stderr
    again = fedlora("run", str(preset), "-c", "run.id=two", "-c", "federation.lost-clients=accept", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_data_shows_who_gets_what(call, tmp_path, tiny_llama):
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama)), encoding="utf-8")
    done = call("data", str(preset))
    assert done.returncode == 0, done.stderr
    assert all(f"(p{person})" in done.stdout for person in range(4))


def written(folder: Path, model: Path, rows: list[dict[str, object]], **keys: str | int) -> str:
    """A preset for `fedlora data` on these rows, as its path."""
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    keys = {"data__source": str(folder / "own.jsonl"), "data__partition": "iid", "federation__clients": 1, **keys}
    (folder / "run.toml").write_text(config_table(tiny(folder, model, data__heldout_fraction=0.3, **keys)), "utf-8")
    return str(folder / "run.toml")


def test_data_shows_examples_as_the_model_sees_them(call, tmp_path, tiny_llama):
    turns = [("system", "Be [bold]kind"), ("human", "hi"), ("gpt", "héllo 🙂"), ("human", "more?")]
    rows = [
        {"conversations": [{"from": who, "value": text} for who, text in turns]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "long " * 40}]},
        {"conversations": [{"from": "human", "value": "fourth"}]},
    ]
    done = call("data", written(tmp_path, tiny_llama, rows), "--show", "3")
    assert done.returncode == 0, done.stderr
    start = "<|im_start|>system\nBe [bold]kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert f"row 1: 56 tokens\n{start}⟦héllo 🙂<|im_end|>⟧\n" in done.stdout
    assert "row 2: nothing to predict, left out\nrow 3: 64 of 222 tokens\n" in done.stdout
    assert "fourth" not in done.stdout


def test_data_shows_classes_by_name_and_the_token_that_nothing_predicts(call, tmp_path, tiny_llama):
    rows = [{"text": f"ab {number}", "label": "yes" if number else "no"} for number in range(8)]
    preset = written(tmp_path, tiny_llama, rows)
    assert "row 1: 5 tokens\na⟦b 0<|im_end|>⟧" in call("data", preset, "--show", "1").stdout
    shown = call("data", preset, "--show", "2", "-c", "model.task=classification").stdout
    assert "ab 0 → ⟦no⟧" in shown
    assert "ab 1 → ⟦yes⟧" in shown


def test_data_on_a_text_column_of_numbers_is_one_sentence(call, tmp_path, tiny_llama):
    done = call("data", written(tmp_path, tiny_llama, [{"text": number} for number in range(8)]))
    assert done.returncode == 1
    assert "lines 1, 2, 3, 4, 5 and 3 more: column 'text' holds a number, expected text" in done.stderr


def test_data_is_the_check_before_a_run(call, tmp_path, tiny_llama):
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ash"}]}
    rows = [good] * 18
    rows[2] = {"messages": [{"role": "user", "content": "hi"}]}
    rows[4] = {"messages": [*good["messages"], {"role": "user", "content": "birch " * 9}, good["messages"][1]]}
    rows[6] = {"messages": []}
    done = call("data", written(tmp_path, tiny_llama, rows))
    assert done.returncode == 0, done.stderr
    assert "rows: 2 of 18 rows have nothing to predict and are left out: no assistant's message after another one " in (
        done.stdout
    )
    assert "(line 3); an empty list of messages (line 7)" in done.stdout
    assert "tokens: median 25, 95 % within 103, longest 103; data.max-length = 64" in done.stdout
    assert "cut: 1 lose a part of the last question or answer, which are longer together" in done.stdout
    assert (
        "6% of the rows are longer than data.max-length = 64 tokens and are cut; with data.max-length = 103"
        in done.stdout
    )
    rows[8] = {"messages": [{"role": "user", "content": "secret"}, {"role": "assistant", "content": None}]}
    (tmp_path / "two").mkdir()
    done = call("data", written(tmp_path / "two", tiny_llama, rows))
    assert done.returncode == 1
    assert "line 9: column 'messages' holds a message whose 'content' is nothing (null), expected a list" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-c", "max-stepz=3"], "node config: unknown key 'max-stepz'; did you mean 'max-steps'?"),
        (["-c", "max-steps=abc"], "node config: max-steps = 'abc', expected a positive integer"),
        (["-c", "max-memory-mb=0"], "node config: max-memory-mb = 0, expected a positive integer"),
        (["-c", "max-epsilon=-1"], "node config: max-epsilon = -1, expected a number above 0"),
        (["-c", "delta=1e-6"], "node config: delta is that of max-epsilon, which is not set; set both"),
        (["--rank", "99999"], "node config: rank = 99999, expected a whole number from 1 to 4096"),
        (["--rank", "9", "-c", "max-rank=8"], "node config: rank = 9 is above its own max-rank = 8"),
        (["-c", "partition-id=-1"], "node config: partition-id = -1, expected a number from 0"),
        (["-c", "partition-id=x"], "node config: partition-id = 'x', expected a number from 0"),
        (["-c", "allow-files=yes"], "node config: allow-files = 'yes', expected true or false"),
        (["-c", "text-column=words"], "node config: text-column describes a file of the node's own"),
        (["-c", "data=nowhere.csv"], "node config: data does not name a file or folder on this node"),
        (["--run", "sentiment"], "node: --run works only with --check"),
    ],
)
def test_a_node_whose_config_is_wrong_does_not_start(call, monkeypatch, words, says):
    from fedlora.deployment import node

    monkeypatch.setattr(node, "join", lambda *args, **keys: pytest.fail("it started"))
    done = call("node", "--insecure", *words)
    assert done.returncode == 1
    assert says in done.stderr


def test_a_node_is_checked_without_a_server(call, tmp_path, tiny_llama):
    run = written(tmp_path, tiny_llama, [{"text": "ash", "label": 0}] * 8, model__task="classification")
    own = tmp_path / "north.csv"
    own.write_text("text;label\nash;1\nbirch;0\n;1\n" + "elm;1.0\n" * 9, encoding="utf-8")
    words = ["node", "--check", "--run", run, "--data", str(own), "--rank", "3", "--model", str(tiny_llama)]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "client 0: rank 3, 12 training rows, 3 steps in a round" in done.stdout
    assert "1 of 12 rows have nothing to predict and are left out: a blank text (line 4)" in done.stdout
    assert "classes: 0 (1), 1 (10)" in done.stdout
    assert "tokens: median 3, 95 % within 5, longest 5; data.max-length = 64" in done.stdout
    assert "max-steps" in call(*words, "-c", "max-steps=2").stderr
    worse = tmp_path / "south.csv"
    worse.write_text("text,label\nsecret,1\nbirch,2\n", encoding="utf-8")
    words[words.index(str(own))] = str(worse)
    done = call(*words)
    assert done.returncode == 1
    assert "south.csv: column 'label' counts its classes from 1 to 2" in done.stderr


def test_data_holds_labels_against_the_models_classes(call, tmp_path, tiny_llama):
    rows = [{"text": "ash", "label": ("benign", "malignant", "")[number % 3]} for number in range(12)]
    preset = written(tmp_path, tiny_llama, rows, model__task="classification", model__labels=3)
    done = call("data", preset, "-c", "data.label-names=benign,malignant,unclear")
    assert done.returncode == 0, done.stderr
    assert "classes: benign (4), malignant (4), unclear (0)" in done.stdout
    assert "a blank label (lines 3, 6, 9 and 12)" in done.stdout
    done = call("data", preset, "-c", "data.label-names=benign,unclear,other")
    assert "none of data.label-names = 'benign,unclear,other' in lines 2, 5, 8 and 11" in done.stderr
    rows = [{"text": "ash", "label": number % 2 + 1} for number in range(12)]
    done = call("data", written(tmp_path, tiny_llama, rows, model__task="classification"))
    assert done.returncode == 1
    assert "counts its classes from 1 to 2, but classes count from 0; subtract 1" in done.stderr


def test_doctor_checks_quantization(call):
    done = call("doctor")
    assert "nf4 self-test" in done.stdout
    assert "int8 self-test" in done.stdout
    assert done.returncode == 0, done.stdout
    assert "targets:" not in done.stdout


def test_doctor_tells_what_lora_goes_to_in_a_model(call, tmp_path, tiny_llama):
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama)), encoding="utf-8")
    done = call("doctor", str(preset), "-c", "lora.target-modules=q_proj,up_proj")
    assert done.returncode == 0, done.stdout
    assert "targets: q_proj x2, up_proj x2" in done.stdout
    done = call("doctor", "-c", f"model.name={tiny_llama}")
    assert "targets: q_proj x2, v_proj x2" in done.stdout


@pytest.mark.parametrize(
    "told",
    [
        signal.SIGINT,
        *(
            pytest.param(told, marks=[pytest.mark.slow, pytest.mark.nightly])
            for told in (signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_keeps_what_was_finished(tmp_path, tiny_llama, told):
    preset = tmp_path / "run.toml"
    config = tiny(tmp_path, tiny_llama, federation__rounds=500)
    preset.write_text(config_table(config), encoding="utf-8")
    result = tmp_path / "runs" / "tiny" / "one" / "result.json"
    with subprocess.Popen(
        [sys.executable, "-m", "fedlora.cli", "run", str(preset)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509 - no other thread starts here
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if result.exists() and json.loads(result.read_text())["rounds"]:
                break
            time.sleep(0.2)
        process.send_signal(told)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + told, err
    assert f"interrupted; what was finished is in {result.parent}" in err
    assert "Traceback" not in err
    data = json.loads(result.read_text())
    assert data["status"] == "interrupted"
    assert data["rounds"]
    assert (result.parent / "adapter" / "adapter_model.safetensors").exists()


def test_several_adapters_are_evaluated_beside_each_other(tmp_path, tiny_llama, call):
    for number, strategy in (("one", "fedavg-zeropad"), ("two", "flora")):
        preset = tmp_path / "run.toml"
        settings = tiny(tmp_path, tiny_llama, strategy__name=strategy, run__id=number, federation__rounds=1)
        preset.write_text(config_table(settings), encoding="utf-8")
        assert call("run", str(preset)).returncode == 0
    one, two = (tmp_path / "runs" / "tiny" / number for number in ("one", "two"))
    words = ("evaluate", "--adapter", str(one / "adapter"), "--adapter", str(two / "adapter"))
    done = call(*words, "--json", str(tmp_path / "scores.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert list(found) == ["untouched base", "one", "two"]
    for number, folder in (("one", one), ("two", two)):
        held = json.loads((folder / "result.json").read_text())["rounds"][-1]["heldout"]
        assert found[number]["loss"] == pytest.approx(held["loss"], rel=1e-4)
        assert f"{found[number]['loss']:.4f}" in done.stdout
    assert "perplexity" in done.stdout
    assert "exact-match" in done.stdout
    twice = call("evaluate", "--adapter", str(one / "adapter"), "--adapter", str(one / "adapter"))
    assert "named twice" in twice.stderr
