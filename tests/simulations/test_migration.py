"""`fedlora migrate`: rows that a source makes up, and a student that learns to answer as the source does."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fedlora.common.errors import ConfigError, DataError, ModelError
from fedlora.data import load_rows
from fedlora.models import adapted, peft_files
from fedlora.results.runs import adapter_folder
from fedlora.simulations.migration import migrate, student_config
from fedlora.trained import synthetic
from fedlora.trained.export import find
from tests.federation import run_locally, tiny, write_labels


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny_llama):
    """A source that has learned something: its answers begin with a person's number."""
    folder, _ = run_locally(
        tiny(
            tmp_path_factory.mktemp("source"),
            tiny_llama,
            strategy__name="flora",
            train__steps=40,
            train__batch_size=8,
            train__lr=2e-2,
            federation__rounds=2,
            evaluate__server=False,
        )
    )
    yield find(folder)
    adapted.forget()


def quiet(what, done, total):
    pass


def test_the_student_comes_to_agree_with_the_source_on_held_out_prompts(source, tmp_path, tiny_bert, tiny_llama):
    """On the same base: the share of tokens at which both agree rises, and the loss on the source's answers falls."""
    done = migrate(
        source, source.config, str(tiny_llama), tmp_path / "moved", ["train.epochs=12"],
        count=48, keep=0.75, encoder=str(tiny_bert),
    )  # fmt: skip
    assert done.after["accuracy"] > done.before["accuracy"] + 0.1
    assert done.after["loss"] < 0.8 * done.before["loss"]
    assert len(done.made.rows) <= 36 < done.made.sampled <= 48
    facts = json.loads((tmp_path / "moved" / "migration.json").read_text())
    assert facts["after"]["accuracy"] == done.after["accuracy"]
    assert adapter_folder(tmp_path / "moved") == (done.folder / "adapter").resolve()
    lines = (tmp_path / "moved" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(done.made.rows)
    real = set(synthetic.real_prompts(source.config))
    assert not real & {row["prompt"] for row in done.made.rows}


def test_an_adapter_moves_to_a_base_of_another_shape(source, tmp_path, tiny_bert, tmp_path_factory):
    from tests.tiny import save_llama

    wider = save_llama(tmp_path_factory.mktemp("wider"), seed=3, hidden_size=48, num_hidden_layers=3)
    done = migrate(
        source, source.config, str(wider), tmp_path / "moved", ["train.epochs=12", "lora.rank=2"],
        count=32, encoder=str(tiny_bert),
    )  # fmt: skip
    state = peft_files.read_adapter(done.folder / "adapter")
    assert {factors.A.shape[1] for name, factors in state.lora.items() if name.endswith("q_proj")} == {48}
    assert max(factors.rank for factors in state.lora.values()) == 2
    assert done.after["loss"] < done.before["loss"]


def test_the_answers_are_those_of_the_adapter(source):
    config, prompts = source.config, ["ash elm", "oak"]
    model = synthetic._teacher(source)
    said = synthetic.answers(model, prompts, config, quiet)
    tokenizer = model.base.tokenizer
    for prompt, answer in zip(prompts, said, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.base.device)
        start = ids.shape[1]
        for _ in range(config.data.max_length // 2):
            with torch.no_grad():
                token = int(model.model(input_ids=ids).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)
        assert answer == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_the_discriminator_keeps_what_is_like_real_prompts(tiny_bert):
    """Real prompts are of one kind; half of the made-up ones are of another."""
    real = [f"please name {n} trees" for n in range(40)]
    alike = [f"please name {n} birds" for n in range(100, 120)]
    odd = [f"%%% {n} ### ??? {n} !!!" for n in range(20)]
    made_up = [text for pair in zip(alike, odd, strict=True) for text in pair]
    kept, told_apart = synthetic.most_real(real, made_up, 0.5, str(tiny_bert))
    assert len(kept) == 20
    assert sum(text in alike for text in kept) >= 17
    assert 0.5 < told_apart < 1.0
    assert kept == [text for text in made_up if text in kept]
    _, chance = synthetic.most_real(real[::2], real[1::2], 0.5, str(tiny_bert))
    assert chance < 0.8


def test_the_command_says_what_was_made_and_how_far_both_agree(
    source, tmp_path, tiny_bert, tiny_llama, monkeypatch, capsys
):
    from fedlora.cli.main import main

    monkeypatch.chdir(tmp_path)
    words = [
        "fedlora",
        "migrate",
        "moved",
        "--adapter",
        source.adapter,
        "--to",
        tiny_llama,
        "--rows",
        16,
        "--encoder",
        tiny_bert,
    ]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().out
    assert not end.value.code
    assert "prompts made up; told from real ones in" in said
    assert "with the new adapter" in said


def test_what_does_not_fit_is_refused_before_anything_is_made(source, tmp_path, tiny_llama, tiny_bert, monkeypatch):
    monkeypatch.setattr(synthetic, "_generate", lambda *_, **__: pytest.fail("something was made up"))

    def refused(match, error=ConfigError, target=str(tiny_llama), overrides=(), rows=source.config, **options):
        with pytest.raises(error, match=match):
            migrate(source, rows, target, tmp_path / "out", overrides, encoder=str(tiny_bert), **options)
        assert not (tmp_path / "out").exists()

    refused(r"--rows is 7, expected at least 8", count=7)
    refused(r"--keep is 0\.0, expected a share above 0", keep=0.0)
    refused(r"--seeds is 0, expected at least 1", seeds=0)
    refused(r"no such file or folder", ModelError, target=str(tmp_path / "nothing"))
    refused(r"-c data\.source: a migration sets this key itself", overrides=["data.source=x"])
    refused(r"unknown key 'train\.rl'", overrides=["train.rl=1"])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three"}\n' * 20)
    refused(
        r"rows of the form text have no prompts",
        DataError,
        rows=tiny(tmp_path, tiny_llama, data__source=str(text), data__partition="iid"),
    )
    classifier = replace(
        source, config=replace(source.config, model=replace(source.config.model, task="classification"))
    )
    with pytest.raises(ConfigError, match=r"needs a language model that answers, model\.task = causal-lm"):
        migrate(classifier, source.config, str(tiny_llama), tmp_path / "out")
    assert write_labels  # the rows of a classifier have no prompts either


def test_the_students_run_has_the_sources_rank_modules_and_rate(source, tmp_path, tiny_llama):
    config = student_config(source.config, source.config, str(tiny_llama), tmp_path / "x", ["train.epochs=2"])
    assert (config.lora.rank, config.lora.ranks) == (4, "")
    assert config.lora.target_modules == source.config.lora.target_modules
    assert config.train.lr == source.config.train.lr
    assert (config.train.steps, config.train.epochs) == (0, 2.0)
    assert config.federation.clients == 1
    assert load_rows(source.config.data).num_rows > 0
