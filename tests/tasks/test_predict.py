"""Metrics against transformers' own loss, whatever the batching."""

import math

import pytest
import torch

from fedlora.data import Example
from fedlora.models import load_base
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.checked import mean_loss
from fedlora.tasks.classification import Classification
from fedlora.tasks.predict import evaluate, predict
from fedlora.tasks.scores import scores
from tests.device import bound, model_config, on_device

LM = CausalLM()


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_base(model_config(tiny_llama)).model


def examples(count: int = 7) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(5, 200, (4 + index,), generator=g).tolist()
        made.append(Example({"input_ids": ids, "labels": [-100, -100, *ids[2:]]}))
    return made


def test_the_loss_is_that_of_transformers(llama):
    batch = LM.collate(examples(), 3)
    assert float(mean_loss(LM, llama, batch).detach()) == pytest.approx(
        float(llama(**on_device(batch)).loss.detach()), rel=bound(1e-5)
    )


def test_metrics_do_not_depend_on_the_batches(llama):
    one, many = (evaluate(LM, llama, examples(), size, 3) for size in (1, 5))
    assert one == pytest.approx(many, rel=bound(1e-5))
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    whole = float(llama(**on_device(LM.collate(examples(), 3))).loss.detach())
    assert one["loss"] == pytest.approx(whole, rel=bound(1e-5))


def test_accuracy_counts_next_tokens(llama):
    data = examples()
    hits = count = 0
    for example in data:
        guesses = llama(input_ids=on_device(torch.tensor([example["input_ids"]]))).logits[0].argmax(-1)
        for position in range(2, len(example["input_ids"])):
            hits += int(guesses[position - 1] == example["input_ids"][position])
            count += 1
    assert evaluate(LM, llama, data, 3, 3)["accuracy"] == pytest.approx(hits / count)


def test_classification_has_accuracy_and_no_perplexity(tiny_bert):
    config = model_config(tiny_bert, task="classification")
    model = load_base(config).model
    data = [Example({"input_ids": [5, 6, 7 + i], "labels": i % 2}) for i in range(6)]
    got = evaluate(Classification(), model, data, 4, 0)
    logits = torch.cat([model(input_ids=on_device(torch.tensor([e["input_ids"]]))).logits.cpu() for e in data])
    assert got.keys() == {"loss", "accuracy", "macro-f1", "calibration-error"}
    assert got["accuracy"] == pytest.approx(float((logits.argmax(-1) == torch.tensor([0, 1] * 3)).float().mean()))


def test_evaluation_leaves_the_mode_as_it_was(llama):
    llama.train()
    evaluate(LM, llama, examples(2), 2, 3)
    assert llama.training
    llama.eval()


def test_predictions_name_each_position_as_a_loop_does(llama):
    data, got = examples(), predict(LM, llama, examples(), 3, 3)
    for row, example in enumerate(data):
        logits = llama(input_ids=on_device(torch.tensor([example["input_ids"]]))).logits[0].detach().cpu()
        chosen = got.rows == row
        shown = logits[1:-1].log_softmax(-1)
        assert got.targets[chosen].tolist() == example["input_ids"][2:]
        assert got.predicted[chosen].tolist() == shown.argmax(-1).tolist()
        assert torch.allclose(got.probabilities[chosen], shown.max(-1).values.exp(), atol=bound(1e-5))
        own = shown.gather(-1, torch.tensor(example["input_ids"][2:])[:, None])[:, 0]
        assert torch.allclose(got.losses[chosen], -own, atol=bound(1e-5))


def test_exact_match_is_greedy_generation_of_the_label(llama):
    """Labels of which some are what the model itself would write."""
    data = []
    for index, example in enumerate(examples(8)):
        prompt = example["input_ids"][:3]
        written = llama.generate(
            on_device(torch.tensor([prompt])), max_new_tokens=3, do_sample=False, pad_token_id=3, eos_token_id=None
        )[0].tolist()
        if index % 2:
            written[-1] = (written[-1] + 1) % 200
        data.append(Example({"input_ids": written, "labels": [-100, -100, -100, *written[3:]]}))
    assert evaluate(LM, llama, data, 3, 3)["exact-match"] == 0.5


def test_a_share_of_the_examples_scores_as_it_does_alone(llama):
    data = examples()
    some = scores(LM, predict(LM, llama, data, 4, 3), torch.tensor([0, 5]))
    assert some == pytest.approx(evaluate(LM, llama, [data[0], data[5]], 2, 3), rel=bound(1e-5))
