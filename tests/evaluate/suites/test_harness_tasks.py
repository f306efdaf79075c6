"""lm-eval scores the exported files as the package does."""

import json
from pathlib import Path
from typing import Any

from angelslim.evaluate.harness import run_harness
from angelslim.evaluate.suites.base import tokens_of
from angelslim.evaluate.suites.harness_tasks import export, process_results
from angelslim.evaluate.suites.suite import Suite, samples_of

SUITE = Suite("ruler", (1000,), ["niah_single_1", "fwe"], count=2)


def test_the_official_harness_reads_the_folder(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    names = export(SUITE, tokenizer, tmp_path)
    assert names == ["angelslim_ruler_niah_single_1_1000", "angelslim_ruler_fwe_1000"]
    rows = [json.loads(line) for line in (tmp_path / f"{names[0]}.jsonl").read_text().splitlines()]
    seen = []

    def oracle(input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        import torch

        out = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = tokenizer.decode(ids[mask.bool()])
            seen.append(ids[mask.bool()].tolist())
            right = next((row["outputs"][0] for row in rows if row["input"] == text), "nothing")
            out.append((tokenizer(right)["input_ids"] + [2] * 40)[:40])
        return torch.cat([input_ids, torch.tensor(out)], dim=1)

    monkeypatch.setattr(model, "generate", oracle)
    scores = {
        score.metric: score.value
        for score in run_harness(model, tokenizer, names, include_path=tmp_path, chat=False)
    }
    assert scores == {f"{names[0]}/score": 1.0, f"{names[1]}/score": 0.0}
    ours = [
        tokens_of(tokenizer, sample) for _, found in samples_of(SUITE, tokenizer, 1000) for sample in found
    ]
    assert sorted(seen) == sorted(ours)  # the same tokens, chat format and answer's beginning included


def test_scores_are_found_by_the_metric() -> None:
    def scored(metric: str, reply: str) -> float:
        doc = {"input": "", "outputs": ["a b", "c"], "classes": [], "metric": metric}
        return process_results(doc, [reply])["score"]

    assert scored("vt", "c") == 0.5
    assert scored("facts_1", "c") == 1
    assert scored("small", "a b END") == 1
    assert scored("hotpotqa", "b") == 2 / 3 or scored("hotpotqa", "b") > 0.6
