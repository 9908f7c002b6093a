"""Each optimizer, for several clients in one batch: to each what it gets alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlora.clients.optimizers.registry import OPTIMIZERS
from fedlora.config import LoraConfig
from fedlora.models import adapted
from tests.clients.training.test_cohort import CONFIG, RANKS, both, check, labelled, random_adapter, sentences
from tests.device import model_config
from tests.tiny import save_bert

# LoRA-Pro divides by B'B, and AdamW then makes whole steps of what was small: rounding is magnified.
LOOSE = {"lora-pro": 2e-4}
OPTIONS = {"lora-pro": ("", "base=sgd"), "riemannian": ("", "base=sgd"), "allora": ("", "scale=step")}
CASES = [
    (name, options)
    for name in OPTIMIZERS.names
    if OPTIMIZERS.load(name).shares_batch and name not in ("adamw", "sgd")
    for options in OPTIONS.get(name, ("",))
]


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_each_client_gets_what_it_gets_alone(tiny_llama, name, options):
    """Unequal ranks and data, and a penalty on the parameters: factors that lie in one tensor are strided views."""
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama, quantization="nf4"), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [
        sentences(count, seed, longest) for seed, (count, longest) in enumerate([(9, 12), (3, 7), (14, 30), (1, 6)])
    ]
    config = replace(CONFIG, optimizer=name, optimizer_options=options, prox_mu=0.1, weight_decay=0.1)
    check(adapters, *both(bench, adapters, data, config), on_cpu=LOOSE.get(name, 1e-5))


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_heads_beside_the_pairs_are_each_clients_own(tmp_path, name):
    lora = LoraConfig(target_modules="query,value")
    bench = adapted.adapted_model(model_config(save_bert(tmp_path / "bert"), task="classification"), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [labelled(8, seed) for seed in range(4)]
    check(
        adapters, *both(bench, adapters, data, replace(CONFIG, optimizer=name, steps=5)), on_cpu=LOOSE.get(name, 1e-5)
    )


@pytest.mark.parametrize("trainable", ["A", "B", "R", "ABR"])
def test_factors_without_a_trained_partner_and_cores_take_adamws_steps(tiny_llama, trainable, caplog):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    adapters = [random_adapter(bench, lora, rank, seed, core="R" in trainable) for seed, rank in enumerate(RANKS)]
    data = [sentences(8, seed) for seed in range(4)]
    config = replace(CONFIG, steps=3)
    expected = both(bench, adapters, data, config, trainable=trainable)
    for name in ("lora-rite", "lora-pro", "riemannian", "allora", "lora-plus"):
        caplog.clear()
        alone, together = both(bench, adapters, data, replace(config, optimizer=name), trainable=trainable)
        check(adapters, alone, together)
        check(adapters, expected[0], alone)
