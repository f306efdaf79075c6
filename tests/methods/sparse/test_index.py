"""A selector on top of a model's own index: nothing changes at density 1, less is read below it, no row is empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from angelslim.methods.sparse._index import is_causal, narrowed, picked, share_read
from angelslim.methods.sparse.assign import full
from angelslim.methods.sparse.attach import Settings, attach
from angelslim.methods.sparse.plan import BlockPlan
from angelslim.methods.sparse.using import attention_context
from angelslim.models.loading import model_class
from families import LATENT, ROUTED, TEXT

PROMPT = torch.randint(3, 80, (1, 96), generator=torch.Generator().manual_seed(1))
INDEX = {"index_topk": 24, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 4}


@pytest.fixture(scope="module", params=["deepseek_v32", "glm_moe_dsa"])
def model(request: pytest.FixtureRequest) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = AutoConfig.for_model(request.param, **text | LATENT | ROUTED | INDEX)
    found = model_class(config)._from_config(config, dtype=torch.float32).eval()
    for parameter in found.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return found


def generate(model: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(PROMPT, max_new_tokens=5, do_sample=False, eos_token_id=None)
    return tokens


def test_density_one_is_the_models_own_attention(model: Any) -> None:
    expected = generate(model)
    with attach(model, full, Settings(block=16, crossover=0)) as attached:
        assert torch.equal(generate(model), expected)
    whole = attached.total()
    assert whole["calls"] == 2 and whole["fallbacks"] == {"decode": 8}
    assert whole["density"] == pytest.approx((24 * 25 / 2 + 24 * 72) / (96 * 97 / 2)), (
        "what the index itself reads"
    )


def test_stem_takes_away_more(model: Any) -> None:
    with torch.no_grad():
        expected = model(PROMPT).logits
        with attention_context(model, "stem", 0.4, block=16) as stats:
            found = model(PROMPT).logits
        with attach(model, full, Settings(block=16)) as dense:
            torch.testing.assert_close(model(PROMPT).logits, expected)
    assert stats.density is not None and 0.1 < stats.density < 0.38 and not torch.allclose(found, expected)
    assert dense.total()["fallbacks"] == {"below the crossover length": 2}


def test_padding_stays_with_the_model(model: Any) -> None:
    batch = torch.cat([PROMPT, PROMPT])
    real = torch.ones_like(batch)
    real[1, :40] = 0
    with torch.no_grad():
        expected = model(batch, attention_mask=real).logits
        with attach(model, full, Settings(block=16, crossover=0)) as attached:
            found = model(batch, attention_mask=real).logits
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, 40:], expected[1, 40:])
    assert attached.total()["fallbacks"] == {"padding beside an index": 2}


def test_no_query_is_left_without_keys() -> None:
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    indices = torch.tensor([[[0, 0], [0, 1], [1, 2], [0, 3], [4, 0], [1, 0], [6, 5], [0, 1]]])
    read = picked(causal, indices)
    assert read[0, 0].nonzero().tolist() == [
        [0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 0], [3, 3], [4, 0], [4, 4], [5, 0], [5, 1], [6, 5], [6, 6],
        [7, 0], [7, 1],
    ]  # fmt: skip
    plan = BlockPlan.from_mask(
        torch.eye(2, dtype=torch.bool)[None, None], block_q=4, block_k=4, q_offset=0, kv_len=8
    )
    left = narrowed(read, plan)
    assert left[0, 0, 4].nonzero().flatten().tolist() == [4]
    assert left[0, 0, 5].nonzero().flatten().tolist() == [0, 1], "none of its keys lies in the plan"
    assert float(share_read(left)) == pytest.approx(14 / 36)
    assert is_causal(causal) and is_causal(causal[:, :, 3:]) and not is_causal(read)
