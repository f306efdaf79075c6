from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import yaml

from angelslim.report.card import fence, render_card, write_card


def head(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter(record):
    assert head(render_card(record, license="apache-2.0")) == {
        "base_model": "lab/tiny-lm",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["angelslim", "quantized", "fp8_static", "compressed-tensors", "qwen3"],
    }


@pytest.mark.parametrize("model", ["tiny-lm", "/models/qwen", "./a/b", "a/b/c", "x: [y"])
def test_a_local_path_is_no_base_model(record, model):
    card = render_card(replace(record, model=model))
    assert "base_model" not in head(card) and "license" not in head(card)


def test_the_card_tells_the_run(record):
    card = render_card(record)
    for words in (
        "| fp8_static | 9.871 | 99.0 ±1.1 | 97.0 ±1.2 | 7.39 | 8.00 | 1.58x | 219 |",
        "perplexity on 16,383 tokens, addition on 200 examples",
        "42 linear layers were quantized to 8.00 bits a weight",
        "`lm_head` (shares its weight with the embedding)",
        "model.layers.2.mlp.down_proj",
        "2 of 64 samples were shorter",
        "```bash\nangelslim run fp8_static lab/tiny-lm dataset.num_samples=64\n```",
        "torch 2.13.0",
    ):
        assert words in card, words


def test_missing_evaluation(record, make_record):
    card = render_card(make_record(evaluated=False))
    assert "Quality: not evaluated." in card
    assert "| original | not evaluated |" in card
    assert "was not evaluated: measure it" in card
    assert "±" not in card


@pytest.mark.parametrize(
    "format, engines",
    [
        ("compressed-tensors (pack-quantized)", ["transformers", "vLLM", "SGLang"]),
        ("fp8 (block 128x128)", ["transformers", "vLLM", "SGLang"]),
        ("gguf (Q4_0)", ["llama.cpp"]),
        ("something new", ["transformers"]),
    ],
)
def test_usage_follows_the_format(record, format, engines):
    card = render_card(replace(record, format=format))
    assert re.findall(r"^### (.*)$", card, re.MULTILINE) == engines
    assert ("pip install compressed-tensors" in card) == format.startswith("compressed")
    assert head(card)["library_name"] == ("gguf" if engines == ["llama.cpp"] else "transformers")
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(snippet)


def test_names_with_markup_are_escaped(record):
    evil = "<script>x</script>`|\n# [a](javascript:b)"
    for name in ("method", "model", "model_type", "scheme", "format"):
        setattr(record, name, evil)
    record.skipped, record.warnings, record.versions = {evil: evil}, [evil], {evil: evil}
    record.layers = [replace(record.layers[0], name=evil, sqnr_db=-1.0)]
    record.command = "run\n```\n<script>"
    card = render_card(record)
    body = card.split("---\n", 2)[2]
    assert head(card)["tags"][2] == evil
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)  # blocks of code are shown as they are
    outside = re.sub(r"`[^`\n]*`", "", outside)  # and so is code in a line
    assert "<script" not in outside and not re.search(r"(?<!\\)\]\(", outside)
    assert len(re.findall("^# ", outside, re.MULTILINE)) == 1
    assert fence(record.command, "bash") in card and fence("```").startswith("````\n")


def test_the_card_is_deterministic_and_goes_to_the_folder(record, tmp_path):
    first = write_card(record, tmp_path).read_bytes()
    assert (tmp_path / "README.md").read_bytes() == first
    assert write_card(record, tmp_path / "card.md").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "card.md"]
