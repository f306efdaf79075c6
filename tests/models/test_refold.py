"""What was folded in one block is folded in the next after one proof, and after a search where the proof fails."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from angelslim.models import fold
from angelslim.models.fold import Fold
from angelslim.models.refold import Folds
from families import save_random
from models.test_fold import DENSE, resident, streamed


def alike(one, other) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    same = (one.group, one.maker, one.parameters, one.channels, one.offset)
    return same == (other.group, other.maker, other.parameters, other.channels, other.offset) and torch.equal(
        one.rows, other.rows
    )


def groups_of(source, index):
    return list(source.structure.groups[source.structure.blocks[index]])


@pytest.mark.parametrize("family", [name for name in DENSE if name != "deepseek_v3"])  # whose blocks differ
def test_a_guess_finds_what_a_search_finds(family, tmp_path, monkeypatch):
    save_random(family, tmp_path)
    source, stream = streamed(tmp_path)
    folds = Folds()
    with resident(source, stream, 0) as block:
        folds.find_all(block, groups_of(source, 0))
        block.advance()
    with resident(source, stream, 1) as block:
        searched = fold.find_all(block, groups_of(source, 1))
        before = {name: value.clone() for name, value in block.module.state_dict().items()}
        monkeypatch.setattr(fold, "find_all", None)  # the guess has to do
        guessed = folds.find_all(block, groups_of(source, 1))
        assert guessed.keys() == searched.keys()
        assert all(alike(guessed[group], searched[group]) for group in searched)
        assert any(isinstance(found, Fold) for found in guessed.values())
        assert all(torch.equal(value, before[name]) for name, value in block.module.state_dict().items())


@pytest.mark.parametrize("wrong", ["rows", "offset", "maker"])
def test_a_wrong_guess_is_searched_again(wrong, tmp_path):
    save_random("qwen3", tmp_path)
    source, stream = streamed(tmp_path)
    folds = Folds()
    with resident(source, stream, 0) as block:
        folds.find_all(block, groups_of(source, 0))
        block.advance()
    for group, found in folds._known.items():
        if isinstance(found, Fold) and wrong == "rows" and found.maker.endswith("v_proj"):
            folds._known[group] = replace(found, rows=found.rows.flip(0))
        if isinstance(found, Fold) and wrong == "offset" and found.maker.endswith("norm"):
            folds._known[group] = replace(found, offset=1.0)
        if isinstance(found, Fold) and wrong == "maker" and found.maker.endswith("up_proj"):
            gate = found.maker.replace("up_proj", "gate_proj")
            folds._known[group] = replace(found, maker=gate, parameters=(f"{gate}.weight",))
    with resident(source, stream, 1) as block:
        searched = fold.find_all(block, groups_of(source, 1))
        found = folds.find_all(block, groups_of(source, 1))
        assert all(alike(found[group], searched[group]) for group in searched)
