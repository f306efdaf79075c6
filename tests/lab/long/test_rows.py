"""Rows say what they ask: a slow reader of the tokens finds every answer that a weight of 1 stands on."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from angelslim.data.statements import COMMON, END, LINK, LIST, MARKERS, RECALL, REMEMBER, TRACE
from angelslim.lab.long.rows import TEXT, Maker, Rows
from angelslim.lab.long.tokens import Tokens

TOKENS = Tokens(256, 64, 64)


def maker(seed: int = 0) -> Maker:
    words = torch.randint(TOKENS.first_word, TOKENS.size, (5000,), generator=torch.Generator().manual_seed(9))
    return Maker(TOKENS, words.int(), torch.Generator().manual_seed(seed))


def told(row: list[int]) -> list[tuple[int, str, list[int]]]:
    """Every statement of a row: its place, its marker, its words."""
    found, markers = [], {TOKENS.marker(word): word for word in MARKERS}
    for place, token in enumerate(row):
        if markers.get(token, END) not in (END, LIST):
            end = row.index(TOKENS.marker(END), place)
            found.append((place, markers[token], row[place + 1 : end]))
    return found


def answers(row: list[int]) -> dict[int, int]:
    """Place -> token of every answer that follows from what stands before it."""
    facts: dict[int, list[int]] = {}
    links: dict[int, int] = {}
    found = {}
    for place, marker, words in told(row):
        if marker == REMEMBER:
            facts[words[0]] = words[1:]
        elif marker == LINK:
            links[words[0]] = words[1]
        elif marker == RECALL:
            found |= {place + 2 + index: token for index, token in enumerate(facts[words[0]])}
        elif marker == TRACE:
            at, name = place + 2, words[0]
            while name in links:
                name = links[name]
                found[at] = name
                at += 1
            found[at] = facts[name][0]
        elif marker == COMMON:
            counts = Counter(row[1:place])
            found[place + 1] = max(counts, key=lambda token: counts[token])
    return found


def check(made: Rows, least: int = 1) -> None:
    tokens, weights = made
    assert tokens.shape == weights.shape
    for row, weight in zip(tokens.tolist(), weights, strict=True):
        wanted = {place: row[place] for place in (weight == 1).nonzero().flatten().tolist()}
        assert len(wanted) >= least and wanted == answers(row)


def test_every_question_of_a_row_has_its_answer_before_it() -> None:
    check(maker().middle(16, 200, 7, 2), least=14)
    check(maker().ending(16, 200, 9, 3, 4), least=12)
    check(maker().chains(16, 200, 5, 3), least=4)
    check(maker().common(16, 200, 6, 5))


def test_repeats_weigh_what_has_been_seen() -> None:
    tokens, weights = maker().repeats(4, 40, 9)
    assert torch.equal(tokens[:, 9:], tokens[:, :-9])
    assert weights[:, :10].eq(0).all() and weights[:, 10:].eq(1).all()


def test_text_is_a_piece_of_the_corpus() -> None:
    made = maker()
    tokens, weights = made.text(3, 50)
    pieces = made.corpus.unfold(0, 50, 1).long()
    assert all((pieces == row).all(1).any() for row in tokens)
    assert torch.equal(weights, torch.full_like(weights, TEXT))


def test_a_full_row_still_holds_every_statement() -> None:
    tokens, _ = maker().ending(4, 4 * 8 + 4 * 2, 8, 1, 2)
    assert all(len(told(row)) == 10 for row in tokens.tolist())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AssertionError, match="do not fit"):
        maker().ending(1, 40, 10, 1, 1)


def test_the_generator_decides() -> None:
    def tokens(seed: int) -> Tensor:
        return maker(seed).middle(4, 100, 5, 1)[0]

    assert torch.equal(tokens(3), tokens(3)) and not torch.equal(tokens(3), tokens(4))
