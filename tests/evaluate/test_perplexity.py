from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from angelslim.base.errors import ConfigError, DataError
from angelslim.evaluate.perplexity import nll_per_token, perplexity, plan_windows, read_text

TEXT = "The quick brown fox jumps over the lazy dog, then rests under an old oak. " * 2


def one_at_a_time(model, ids, begin, target):
    """-log p(ids[target] | ids[begin:target]) from one forward that ends right before the target, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[begin:target])[None]).logits[0, -1].double()
    return -torch.log_softmax(logits, -1)[ids[target]].item()


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_windows_score_every_target_once_with_enough_context(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = plan_windows(tokens, window, stride)
    targets = [index for part in windows for index in range(part.targets.start, part.targets.stop)]
    assert targets == list(range(1, tokens))
    for part in windows:
        assert part.end - part.begin <= window
        context = part.targets.start - part.begin
        assert context > window - stride or part.begin == 0


def test_sliding_window_equals_the_slow_reference(model, tokenizer):
    window, stride = 24, 7
    result = nll_per_token(model, tokenizer, TEXT, window=window, stride=stride)
    ids = result.ids.tolist()
    expected = []
    for part in result.windows:
        expected += [
            one_at_a_time(model, ids, part.begin, target) for target in range(*part.targets.indices(len(ids)))
        ]
    torch.testing.assert_close(
        result.nll.double(), torch.tensor(expected, dtype=torch.double), rtol=1e-4, atol=1e-5
    )
    score = perplexity(model, tokenizer, TEXT, window=window, stride=stride)
    assert score.value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert (score.metric, score.better, score.samples) == ("perplexity", "lower", len(ids) - 1)


def test_stride_equal_to_the_window_gives_plain_chunks(model, tokenizer):
    result = nll_per_token(model, tokenizer, TEXT, window=32, stride=32)
    ids = result.ids
    chunks = []
    with torch.no_grad():
        for begin in range(0, len(ids) - 1, 32):
            chunk, target = ids[begin : begin + 32][: len(ids) - 1 - begin], ids[begin + 1 : begin + 33]
            logits = model(input_ids=chunk[None]).logits[0].float()
            chunks.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(result.nll, torch.cat(chunks))


def test_more_context_changes_the_figure(model, tokenizer):
    narrow = perplexity(model, tokenizer, TEXT, window=4, stride=4)
    wide = perplexity(model, tokenizer, TEXT, window=128, stride=1)
    assert narrow.value != pytest.approx(wide.value, rel=1e-3)


def test_stderr_is_that_of_independent_windows(model, tokenizer):
    result = nll_per_token(model, tokenizer, TEXT[:129], window=32, stride=32)
    means = result.nll.view(4, 32).double().mean(1)
    assert result.stderr == pytest.approx((means.std() / 2).item())
    assert nll_per_token(model, tokenizer, "short", window=32).stderr is None


def test_bos_opens_every_window(model, bos_tokenizer):
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    result = nll_per_token(model, bos_tokenizer, TEXT, window=16, stride=8)
    handle.remove()
    assert {row[0] for row in seen} == {1}
    assert all(len(row) <= 16 for row in seen)
    assert len(result.nll) == len(result.ids) - 1


def test_max_tokens_and_training_flag(model, tokenizer):
    model.train()
    assert perplexity(model, tokenizer, TEXT, max_tokens=20).samples == 19
    assert model.training
    model.eval()


def test_rows_in_pieces_give_the_same(model, tokenizer, monkeypatch):
    whole = nll_per_token(model, tokenizer, TEXT, window=64).nll
    monkeypatch.setattr("angelslim.evaluate.perplexity.ROWS", 5)
    torch.testing.assert_close(nll_per_token(model, tokenizer, TEXT, window=64).nll, whole)


@pytest.mark.parametrize("window, stride", [(1, None), (5000, None), (16, 17), (16, 0)])
def test_impossible_windows_are_refused(model, tokenizer, window, stride):
    with pytest.raises(ConfigError, match="tokens is outside"):
        perplexity(model, tokenizer, TEXT, window=window, stride=stride)


def test_loader_errors(tmp_path: Path, model, tokenizer):
    with pytest.raises(DataError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 \(byte 3"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(DataError, match=r"too short: 1 token"):
        perplexity(model, tokenizer, "a")
