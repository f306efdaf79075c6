"""What a run leaves behind for the report: plain records that survive a trip through JSON.

`run.json` holds one `RunRecord`; the terminal table, the HTML page and the model card are all drawn from it,
so a report can be drawn again long after the run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..base.errors import ModelError
from ..evaluate.base import Score
from ..models.experts import ExpertUse
from ..numerics.error import Histogram, LayerRecord

RECORD_FILE = "run.json"


@dataclass
class RunRecord:
    """One compression run: what was asked, what was done, what it cost and what it gained."""

    method: str  # "fp8_static"
    model: str  # as the user named it
    model_type: str  # "qwen3"
    scheme: str  # one line: "W fp8_e4m3 per-tensor, A fp8_e4m3 per-tensor static"
    format: str  # checkpoint format: "compressed-tensors (float-quantized)"
    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float  # over the quantized layers, scales included
    seconds: float
    peak_memory_bytes: int
    layers: list[LayerRecord] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer -> reason
    before: list[Score] = field(default_factory=list)
    after: list[Score] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)  # dotted key -> "default" | file | "override"
    command: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""  # equal fingerprints: same model, recipe and versions, hence the same weights
    hashes: dict[str, str] = field(default_factory=dict)  # output file -> sha256
    warnings: list[str] = field(default_factory=list)
    training: dict[str, Any] | None = None  # how the weights were trained, where they were (`training.run`)
    trial: dict[str, Any] | None = None  # what searched scales had to prove: both divergences, and which won
    experts: list[ExpertUse] = field(default_factory=list)  # what calibration showed the experts of a mixture

    def to_json(self) -> str:
        """Serialise with sorted keys, so that equal records give equal text."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Read a record that `to_json` wrote."""
        raw = json.loads(text)
        raw["layers"] = [LayerRecord.from_dict(layer) for layer in raw["layers"]]
        raw["before"] = [Score(**score) for score in raw["before"]]
        raw["after"] = [Score(**score) for score in raw["after"]]
        raw["experts"] = [ExpertUse(**use) for use in raw.get("experts", [])]
        return cls(**raw)

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read the record of the output in `folder`; a missing or damaged one is a `ModelError`."""
        path = folder / RECORD_FILE if folder.is_dir() else folder
        if not path.is_file():
            raise ModelError(
                f"There is no {RECORD_FILE} in {str(folder)!r}.",
                fix="Give the output folder of a finished run.",
            )
        try:
            return cls.from_json(path.read_text("utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The run's record cannot be read ({error}).",
                where=str(path),
                fix="Run the compression again.",
            ) from error


__all__ = ["ExpertUse", "Histogram", "LayerRecord", "RunRecord", "Score"]
