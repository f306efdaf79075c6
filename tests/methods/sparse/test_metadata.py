"""The file beside a model: what is written is read, and what is wrong is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from angelslim.base.errors import ConfigError
from angelslim.methods.sparse._patterns import HeadPattern, write_patterns
from angelslim.methods.sparse.metadata import FILE, HeadRule, Metadata, fingerprint, read
from families import config_of

RULES = (
    HeadRule("dense", layers=(0,)),
    HeadRule("a_shape", {"n_local": 64}, layers=(1,), heads=(0, 2)),
    HeadRule("stem", {"density": 0.25}),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    config = config_of("qwen3")
    found = Metadata(RULES, 64, 2048, "dense", fingerprint(config))
    again = read(found.write(tmp_path).parent)
    assert again.rules == RULES and again.folder == tmp_path
    assert (again.block, again.crossover, again.kernel, again.model) == (64, 2048, "dense", found.model)
    assert again.settings(measure=False).block == 64
    again.check(config)
    made = again.make_rules()
    assert [rule.selector is None for rule in made] == [True, False, False]
    assert made[0].layers == {0} and made[1].heads == {0, 2} and made[2].layers is None
    assert read(Metadata((), crossover="auto").write(tmp_path)).crossover == "auto"


def test_another_model_is_refused(tmp_path: Path) -> None:
    Metadata(RULES, model=fingerprint(config_of("qwen3"))).write(tmp_path)
    with pytest.raises(ConfigError, match="num_hidden_layers 2, this one has 3"):
        read(tmp_path).check(config_of("qwen3", num_hidden_layers=3))
    with pytest.raises(ConfigError, match="model_type 'qwen3', this one has 'llama'"):
        read(tmp_path).check(config_of("llama"))


def test_files_of_options_lie_beside_it(tmp_path: Path) -> None:
    write_patterns(tmp_path / "heads.json", [[HeadPattern("stream_llm", 8, 16)]])
    Metadata((HeadRule("minference", {"patterns": "heads.json"}),)).write(tmp_path)
    assert len(read(tmp_path).make_rules()) == 1
    (tmp_path / "heads.json").unlink()
    with pytest.raises(ConfigError, match="no pattern file"):
        read(tmp_path).make_rules()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 9}, "is of version 9"),
        ({"rules": [{"options": {}}]}, "no description of sparse attention"),
        ({"rules": 3}, "no description of sparse attention"),
        ({"crossover": "soon"}, "no description of sparse attention"),
    ],
)
def test_damaged_files(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = Metadata(RULES).write(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        read(tmp_path)


def test_missing_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=FILE):
        read(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match="no description"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'stem'"):
        Metadata((HeadRule("sten"),)).make_rules()
    with pytest.raises(ConfigError, match="no option 'densty'"):
        Metadata((HeadRule("stem", {"densty": 0.1}),)).make_rules()
