"""Run by vLLM's own Python: which of its schemes does it choose for our configs? Starts no engine.

    python vllm_configs.py CONFIGS.json ANSWERS.json

CONFIGS maps names to {"config": quantization_config, "layers": {layer path: vLLM's class}}; ANSWERS maps them to
{layer path: name of the scheme's class}. Kernels are not chosen: this machine has none of the GPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as theirs
from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
KEPT = {"CompressedTensorsConfig", "CompressedTensorsScheme"}


def named(name: str) -> type:
    """A class that remembers only its name."""
    members = {
        "__init__": lambda self, *_args, **_options: None,
        "get_min_capability": staticmethod(lambda: 0),
    }
    return type(name, (), members)


for attribute, value in list(vars(theirs).items()):
    if attribute.startswith("CompressedTensors") and isinstance(value, type) and attribute not in KEPT:
        setattr(theirs, attribute, named(attribute))
theirs.CompressedTensorsConfig._check_scheme_supported = staticmethod(lambda *_args, **_options: True)


def chosen(config: dict, layers: dict[str, str]) -> dict[str, str]:
    """Return the scheme of each layer."""
    parsed = theirs.CompressedTensorsConfig.from_config(config)
    parsed._add_fused_moe_to_target_scheme_map()
    found = {}
    for path, kind in layers.items():
        module = type(kind, (torch.nn.Module,), {})()
        target = find_matched_target(path, module, parsed.target_scheme_map.keys(), FUSED)
        parts = parsed.target_scheme_map[target]
        arguments = (
            parts["weights"],
            parts["input_activations"],
            parts["output_activations"],
            parts["format"],
        )
        found[path] = type(parsed._get_scheme_from_parts(*arguments, path)).__name__
    return found


asked = json.loads(Path(sys.argv[1]).read_text())
answers = {name: chosen(entry["config"], entry["layers"]) for name, entry in asked.items()}
Path(sys.argv[2]).write_text(json.dumps(answers))
