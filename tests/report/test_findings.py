from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

from angelslim.numerics.error import Histogram
from angelslim.report.findings import Analysis, Flag, LayerFinding, places, strict_json

LAYER = LayerFinding(
    name="model.layers.0.mlp.up_proj", block=0, role="mlp.up_proj", scheme="W int4", shape=(8, 4),
    amax=0.5, p999=0.4, p9999=0.45, kurtosis=3.1, zeros=0.1, sqnr_db=math.inf, kl=0.25,
    flags=(Flag("kurtosis", 3.1, 7.0), Flag("scale", 2.0, None)), histogram=Histogram(-1.0, 1.0, [1], [1]),
)  # fmt: skip


def test_json_is_strict_and_complete():
    found = Analysis("c", "o", "gptq", True, [LAYER], {"scale": 1.5, "spread": 6.0}, ["note"])
    raw = json.loads(found.to_json(), parse_constant=lambda name: 1 / 0)
    (layer,) = raw["layers"]
    assert layer["sqnr_db"] is None and layer["kl"] == 0.25 and layer["shape"] == [8, 4]
    assert layer["flags"][0] == {"column": "kurtosis", "value": 3.1, "score": 7.0}
    assert layer["histogram"]["before"] == [1] and raw["limits"] == {"scale": 1.5, "spread": 6.0}
    assert json.loads(strict_json({"a": [math.nan, (1.0, -math.inf)]})) == {"a": [None, [1.0, None]]}


def test_csv_has_a_line_a_layer():
    other = replace(LAYER, name='odd,"name', flags=(), histogram=None, kl=None)
    text = Analysis("c", None, "", False, [LAYER, other]).to_csv()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == [LAYER.name, 'odd,"name']
    assert rows[0]["flags"] == "kurtosis;scale" and rows[1]["flags"] == ""
    assert rows[0]["shape"] == "8x4" and float(rows[0]["kl"]) == 0.25 and rows[1]["kl"] == ""
    assert "histogram" not in rows[0]
    assert Analysis("c", None, "", False).to_csv() == ""


def test_blocks_and_roles_come_from_the_names():
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.mlp.experts.7.up_proj",
        "visual.blocks.1.attn.qkv", "lm_head", "visual.merger.mlp.0.proj",
    ]  # fmt: skip
    assert places(names) == {
        "model.layers.0.self_attn.q_proj": (0, "self_attn.q_proj"),
        "model.layers.11.self_attn.q_proj": (11, "self_attn.q_proj"),
        "model.layers.1.mlp.experts.7.up_proj": (1, "mlp.experts.up_proj"),
        "visual.blocks.1.attn.qkv": (1, "visual.blocks.attn.qkv"),
        "lm_head": (None, "lm_head"),
        "visual.merger.mlp.0.proj": (0, "visual.merger.mlp.proj"),
    }
    assert places([]) == {}
