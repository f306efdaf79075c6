"""The built-in tiny-long finds facts with dense attention, and where a selector keeps the right blocks."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from angelslim.data import builtin
from angelslim.lab.long.score import rows_of, score
from angelslim.lab.long.tokens import Tokens, encode
from angelslim.methods.sparse.attach import Settings, attach
from angelslim.methods.sparse.selectors.base import SELECTORS
from angelslim.models.builtin import builtin_model


@pytest.fixture(scope="module")
def answered():
    """Score eight texts of 512 tokens with one kind of attention."""
    folder = builtin_model("tiny-long")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    corpus = encode(AutoTokenizer.from_pretrained(folder), builtin.text("evaluation", 10**6))
    tokens = Tokens(**json.loads((folder / "training.json").read_text("utf-8"))["language"])
    rows = rows_of("key-value", tokens, corpus, 512, 8, 5)

    def share(selector: str) -> float:
        context = nullcontext()
        if selector != "dense":
            select = SELECTORS.get(selector)({"density": 0.25}).select
            context = attach(model, select, Settings(block=16, crossover=0))
        with context, torch.no_grad():
            return score(model, "key-value", *rows).value

    return share


def test_dense_attention_answers_everything(answered):
    assert answered("dense") >= 95


def test_union_finds_what_uniform_loses(answered):
    assert answered("union") >= 80 > 60 >= answered("uniform")
