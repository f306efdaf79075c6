from __future__ import annotations

import pytest
import torch

from angelslim.base.errors import DataError
from angelslim.data.builtin import Example, examples
from angelslim.evaluate import tasks
from angelslim.evaluate.tasks import chat_prompt, exact_match, generate, still_thinking


def slow_greedy(model, ids, steps, stops):
    """No cache, no padding, no generate(): one whole forward per token."""
    new = []
    for _ in range(steps):
        with torch.no_grad():
            token = model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in stops:
            break
        new.append(token)
    return new


def test_batched_equals_one_by_one_equals_slow_reference(model, tokenizer):
    items = examples("addition", "evaluation", 4) + examples("recall", "evaluation", 1)
    prompts = [chat_prompt(tokenizer, item) for item in items]
    batched = generate(model, tokenizer, prompts, batch_size=5, max_new_tokens=12)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    slow = [
        tokenizer.decode(slow_greedy(model, tokenizer(prompt)["input_ids"], 12, [2])) for prompt in prompts
    ]
    assert batched == alone == slow
    assert len(set(batched)) > 1


def test_generation_stops_at_any_stop_token(model, tokenizer, monkeypatch):
    prompts = ["stop here", "another, much longer prompt"]
    ids = slow_greedy(model, tokenizer(prompts[0])["input_ids"], 8, [2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, ids[3]])
    cut = generate(model, tokenizer, prompts, max_new_tokens=8)[0]
    assert cut == tokenizer.decode(ids[: ids.index(ids[3])])
    assert len(ids) > 4


def test_exact_match_counts_right_answers(model, tokenizer, monkeypatch):
    items = examples("addition", "evaluation", 8, thinking=True)
    replies = [item.completion for item in items]
    replies[0] = "<think>\nendless"
    replies[1] = replies[1] + "0"
    monkeypatch.setattr(tasks, "generate", lambda *_, **__: replies)
    score = exact_match(model, tokenizer, items)
    assert (score.metric, score.unit, score.better, score.samples) == ("addition", "%", "higher", 8)
    assert score.value == 75.0
    assert score.stderr == pytest.approx(100 * (0.75 * 0.25 / 8) ** 0.5)


def test_prompt_that_opens_the_thought_needs_its_end(model, tokenizer, monkeypatch):
    assert still_thinking("a <think>\n") == "<think>"
    assert still_thinking("<think>\n\n</think>\n\n") == ""
    item = Example("addition", [{"role": "user", "content": "1+1? <think>"}], True, "2", "")
    monkeypatch.setattr(tasks, "generate", lambda *_, **__: ["2"])
    assert exact_match(model, tokenizer, [item]).value == 0.0
    monkeypatch.setattr(tasks, "generate", lambda *_, **__: ["1+1</think>\n\n2"])
    assert exact_match(model, tokenizer, [item]).value == 100.0


def test_the_thinking_mode_reaches_the_template(tokenizer):
    on, off = (
        chat_prompt(tokenizer, examples("recall", "evaluation", 1, thinking=mode)[0])
        for mode in (True, False)
    )
    assert "</think>" in off
    assert "<think>" not in on
    assert on.endswith("assistant\n")


def test_missing_template_and_no_examples(model, tokenizer, monkeypatch):
    with pytest.raises(DataError, match="no example"):
        exact_match(model, tokenizer, [])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="chat template"):
        exact_match(model, tokenizer, examples("addition", "evaluation", 1))
