import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from angelslim.data.builtin import TASKS, examples, split_of
from angelslim.lab.curriculum import KINDS, Curriculum, pairs_at, shares_at, text_share, weighted_loss
from angelslim.lab.rows import PROMPT, Rows, conversation, encode_corpus, recall_parts
from angelslim.models.builtin import builtin_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(builtin_model("tiny-lm"))


@pytest.fixture(scope="module")
def corpus(tokenizer: Any) -> torch.Tensor:
    documents = [f"def function_{i}():\n    return {i}\n" * 20 for i in range(40)]
    return torch.from_numpy(encode_corpus(tokenizer.backend_tokenizer, documents))


@pytest.fixture(scope="module")
def curriculum(tokenizer: Any, corpus: torch.Tensor) -> Curriculum:
    return Curriculum(
        tokenizer.backend_tokenizer, corpus, batches=100, rows=16, length=96, seed=0, long_every=4
    )


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_written_as_the_chat_template_writes_them(task: str, tokenizer: Any) -> None:
    make = Rows(tokenizer.backend_tokenizer, torch.empty(0))
    for example in examples(task, "train", 30):
        parts = conversation([(example.messages[0]["content"], example.completion)])
        turns = [*example.messages, {"role": "assistant", "content": example.completion}]
        ids = [token for one in make.encode([text for text, _ in parts]) for token in one]
        assert ids == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]


def test_weights_are_full_on_what_the_assistant_writes() -> None:
    direct = conversation([("Q", "<think>\n\n</think>\n\n42")])
    assert direct[1:] == [("<think>\n\n</think>\n\n", 0.0), ("42<|im_end|>", 1.0), ("\n", PROMPT)]
    thought = conversation([("Q", "<think>\na\n</think>\n\n42")])
    assert thought[1:] == [("<think>\na\n</think>\n\n42<|im_end|>", 1.0), ("\n", PROMPT)]
    assert direct[0] == thought[0] == ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", PROMPT)


def test_recall_rows_ask_for_what_they_list() -> None:
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(piece for piece, _ in recall_parts(rng, 4))
        listed = dict(line[2:].split("=") for line in text.splitlines() if line.startswith("- "))
        assert 2 <= len(listed) <= 4
        assert all(split_of(f"key {key}") == "train" for key in listed)
        answers = [line.removesuffix("<|im_end|>") for line in text.splitlines() if line[:1].isdigit()]
        assert answers and set(answers) <= set(listed.values())


def test_copy_rows_repeat(tokenizer: Any) -> None:
    tokens, weights = Rows(tokenizer.backend_tokenizer, torch.empty(0)).copy(random.Random(1), 64)
    period = int((weights == 0).sum())
    assert 8 <= period <= 32
    assert (tokens[period:] == tokens[:-period]).all()


def test_lines_count_fully_once_they_have_been_seen(tokenizer: Any) -> None:
    tokens, weights = Rows(tokenizer.backend_tokenizer, torch.empty(0)).lines(random.Random(1), 120, 3)
    text = tokenizer.decode(tokens[weights == 1])
    lines = tokenizer.decode(tokens).splitlines()
    first = {line for line in lines[:3] if line.startswith("- ")}
    assert set(lines[:-1]) == first and text.isdigit()
    assert set(np.unique(weights)) == {np.float32(PROMPT), np.float32(1)}


def test_a_batch_is_a_function_of_its_index(curriculum: Curriculum) -> None:
    again = Curriculum(curriculum.core, curriculum.corpus, 100, 16, 96, 0, 4)
    for name, value in curriculum(7).items():
        assert torch.equal(value, again(7)[name])
    assert not torch.equal(curriculum(7)["inputs"], curriculum(11)["inputs"])


def test_shapes_kinds_and_noise(curriculum: Curriculum) -> None:
    short, long = curriculum(50), curriculum(51)
    assert short["inputs"].shape == short["weights"].shape == (16, 96)
    assert long["targets"].shape == (4, 384)
    wrong = (short["inputs"] != short["targets"]).any(1)
    assert set(short["kinds"][wrong].tolist()) <= {KINDS.index("text")}, "only text is read with errors"
    many = [curriculum(index) for index in range(20, 40, 4)]
    assert any((b["inputs"] != b["targets"]).any() for b in many)


def test_the_ladder_and_the_mixture() -> None:
    assert [pairs_at(progress) for progress in (0.0, 0.34, 0.36, 0.5, 1.0)] == [2, 2, 4, 8, 8]
    assert all(0 < sum(shares_at(progress)) < 1 for progress in (0.0, 1.0))
    assert text_share() == pytest.approx(0.45 * 0.1 + 0.55 * 0.12)


def test_the_loss_counts_weights_and_shifts_targets() -> None:
    class Knows(torch.nn.Module):
        """Predicts token + 1 with near certainty."""

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            logits = 50.0 * torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float()
            return type("Output", (), {"logits": logits})

    tokens = torch.tensor([[0, 1, 2, 9], [0, 1, 2, 3]])
    batch = {
        "inputs": tokens,
        "targets": tokens,
        "weights": torch.tensor([[1.0, 1, 1, 0.5], [1, 1, 1, 1]]),
        "kinds": torch.tensor([KINDS.index("recall"), KINDS.index("text")]),
    }
    losses = weighted_loss(Knows(), batch)
    assert losses["loss"].item() == pytest.approx(50 * 0.5 / 5.5)
    assert losses["recall"].item() == pytest.approx(50 * 0.5 / 2.5)
    assert losses["text"].item() == pytest.approx(0, abs=1e-6) and losses["copy"].item() == 0
