"""Every word of the language is one token, at the place that `Tokens` says."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from angelslim.data.statements import END, MARKERS, key_words, value_words
from angelslim.lab.long.tokens import Tokens, encode, save_tokenizer

TOKENS = Tokens(128, 32, 32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokens")
    save_tokenizer(TOKENS.words(["the dog saw the cat. the end"]), folder, 64)
    return AutoTokenizer.from_pretrained(folder)


def test_the_ranges_hold_what_they_say(tokenizer: AutoTokenizer) -> None:
    assert len(tokenizer) == TOKENS.size
    ids = tokenizer.convert_tokens_to_ids
    assert [ids(word) for word in MARKERS] == [TOKENS.marker(word) for word in MARKERS]
    assert ids(key_words(32)[0]) == TOKENS.first_key and ids(value_words(32)[-1]) == TOKENS.first_word - 1
    assert ids("the") == TOKENS.first_word  # the most frequent word of the text
    assert tokenizer.eos_token == END


def test_text_is_cut_at_blanks_and_signs(tokenizer: AutoTokenizer) -> None:
    found = tokenizer.convert_ids_to_tokens(encode(tokenizer, ["the cat.\nthe wolf"]).tolist())
    assert found == ["the", "cat", ".", "the", "<unk>"]
