"""What lm-evaluation-harness is asked for. It is an optional extra, not installed for tests: a stand-in module takes
its calls, which shows what is passed to it and nothing of what it computes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from fedlora.common.errors import ConfigError
from fedlora.config import parse
from fedlora.models import load_base
from fedlora.trained import harness
from tests.device import DEVICE


@pytest.fixture
def adapter(tmp_path, tiny_llama):
    config = parse({"model.name": str(tiny_llama), "model.quantization": "none", "model.device": str(DEVICE)})
    model = get_peft_model(load_base(config.model).model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter", config


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in was given, and whether the adapter was at work."""
    seen = {"runs": []}
    package = ModuleType("lm_eval")
    tasks, models, hub = (ModuleType(f"lm_eval.{name}") for name in ("tasks", "models", "models.huggingface"))

    def manager(include_path):
        seen["include_path"] = include_path
        return SimpleNamespace(all_tasks=["animals"])

    def subject(**given):
        seen.update(given)
        return "the model"

    def evaluate(**given):
        layer = next(module for module in seen["pretrained"].modules() if isinstance(module, LoraLayer))
        given["adapter"] = "none" if layer.disable_adapters else layer.active_adapters[0]
        seen["runs"].append(given)
        return {"results": {"animals": {"alias": "animals", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,first": 1}}}

    tasks.TaskManager, hub.HFLM, package.simple_evaluate = manager, subject, evaluate
    package.tasks, package.models, models.huggingface = tasks, models, hub
    for module in (package, tasks, models, hub):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_the_base_and_each_adapter_are_measured(adapter, calls, tmp_path):
    folder, config = adapter
    got = harness.scores([folder], config, ["animals"], tmp_path, 5)
    row = {"animals acc": 0.5, "animals em first": 1.0}
    assert got == {"untouched base": row, "with the adapter": row}
    assert calls["include_path"] == str(tmp_path)
    assert calls["tokenizer"].eos_token == "<|im_end|>"
    assert calls["batch_size"] == config.evaluate.batch_size
    assert [run["adapter"] for run in calls["runs"]] == ["none", "adapter0"]
    for run in calls["runs"]:
        assert (run["model"], run["tasks"], run["limit"]) == ("the model", ["animals"], 5)


def test_an_unknown_task_is_one_sentence(adapter, calls):
    with pytest.raises(ConfigError, match="--lm-eval animal: the harness knows no such task; did you mean 'animals'"):
        harness.scores([adapter[0]], adapter[1], ["animal"])


def test_without_the_extra_it_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[lm-eval\]'"):
        harness.scores([adapter[0]], adapter[1], ["animals"])
