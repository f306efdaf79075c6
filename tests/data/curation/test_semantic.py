from __future__ import annotations

import numpy as np
import pytest
import torch

from angelslim.base.errors import ModelError
from angelslim.data.curation.stages.semantic import buckets, near_ones

from .planted import Pile, babble, counts, made, run

PARAPHRASES = [
    "The old lighthouse keeper climbed the narrow stairs every evening to light the great lamp for passing ships.",
    "Every evening the old keeper of the lighthouse climbed the narrow stairs to light the great lamp for passing ships.",
    "To light the great lamp for the passing ships, the old lighthouse keeper climbed the narrow stairs every evening.",
]
OTHERS = [
    "Photosynthesis turns carbon dioxide and water into sugar, and the energy for it comes from sunlight in the leaves.",
    "The committee voted on the new budget after a long debate about schools, roads and the price of housing in town.",
    "A prime number has exactly two divisors; there are infinitely many of them, as Euclid showed by contradiction.",
]


def test_a_cluster_of_paraphrases_leaves_one_and_topics_stay() -> None:
    texts = [PARAPHRASES[0], OTHERS[0], PARAPHRASES[1], OTHERS[1], PARAPHRASES[2], OTHERS[2]]
    ledger, left = run("semantic", {"threshold": 0.85}, texts)
    assert left == [PARAPHRASES[0], *OTHERS]
    assert counts(ledger) == {"semantic duplicate": 2}


def test_decisions_are_those_of_a_slow_greedy_search() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 16))
    vectors = np.repeat(centres, 6, axis=0) + 0.35 * rng.normal(size=(180, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rng.shuffle(vectors)
    kept: list[int] = []
    for place, vector in enumerate(vectors.astype(np.float64)):
        if all(float(vector @ vectors[other]) < 0.9 for other in kept):
            kept.append(place)
    gone = near_ones(vectors, 0.9)
    assert sorted(set(range(180)) - set(gone)) == kept
    assert 20 < len(gone) < 170
    for place, (other, cosine) in gone.items():
        assert (
            other < place
            and other in kept
            and cosine == pytest.approx(float(vectors[place] @ vectors[other]))
        )


def test_buckets_keep_near_vectors_together() -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(4, 8)) * 10
    vectors = np.repeat(centres, 25, axis=0) + 0.01 * rng.normal(size=(100, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels = buckets(vectors, 25, 0)
    assert all(len(set(labels[start : start + 25].tolist())) == 1 for start in range(0, 100, 25))
    assert buckets(vectors, 100, 0).tolist() == [0] * 100
    assert labels.tolist() == buckets(vectors, 25, 0).tolist()


def test_pooled_states_do_not_feel_the_padding(tiny_folder) -> None:
    texts = [babble(1, 5), babble(2, 40), "x", babble(3, 17)]
    together = made("semantic", {"model": str(tiny_folder), "batch_size": 4})
    alone = made("semantic", {"model": str(tiny_folder), "batch_size": 1})
    a, b = (stage.embed(Pile(texts))[1] for stage in (together, alone))
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)


def test_pooled_states_are_the_mean_of_the_last_layer(tiny_folder) -> None:
    from transformers import AutoModel, AutoTokenizer

    text = babble(4, 9)
    model = AutoModel.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].double().mean(0).numpy()
    vector = made("semantic", {"model": str(tiny_folder)}).embed(Pile([text]))[1][0]
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_model_finds_equal_documents(tiny_folder) -> None:
    texts = [babble(1, 12), babble(2, 12), babble(1, 12)]
    _, left = run("semantic", {"model": str(tiny_folder), "threshold": 1.0}, texts)
    assert left == texts[:2]


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        made("semantic", {"model": str(tmp_path)})


def test_one_document_stays() -> None:
    _, left = run("semantic", {}, ["alone"])
    assert left == ["alone"]
