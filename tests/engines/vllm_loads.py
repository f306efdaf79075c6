"""Run by vLLM's own Python: load folders into its models as it would before it starts, and compute nothing.

    python vllm_loads.py FOLDERS.json ANSWERS

FOLDERS is a list of paths; ANSWERS/0.safetensors, 1.safetensors, ... hold every parameter of the model that vLLM built
for each, under its own names, and ANSWERS/loaded.json lists, for each folder, the parameters that got nothing. A CPU
has no kernels for quantized experts: the choice of one is replaced by the one for CPUs, which decides nothing
before weights are loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")

import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

METHODS = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"


def choose_any_kernel() -> None:
    """Let the experts' methods be made where no kernel runs."""
    for name in ("compressed_tensors_moe_wna16", "compressed_tensors_moe_w8a8_int8"):
        module = importlib.import_module(f"{METHODS}.{name}")
        for attribute, value in list(vars(module).items()):
            if attribute.startswith("select_") and attribute.endswith("_moe_backend"):
                setattr(module, attribute, _first_of(value))


def _first_of(select: Any) -> Any:
    kinds = select.__globals__
    backends = next(value for name, value in kinds.items() if name in ("WNA16MoEBackend", "Int8MoeBackend"))
    return lambda *_args, **_options: (backends["CPU"], None)


def loaded(folder: str, out: Path) -> list[str]:
    """Load one folder; write what the model holds, return the names of what got nothing."""
    config = EngineArgs(
        model=folder, max_model_len=256, enforce_eager=True, dtype="bfloat16"
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(
                1, 0, f"file://{out.with_suffix('.rendezvous').absolute()}", 0, "gloo"
            )
            initialize_model_parallel(1, 1)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        loader = get_model_loader(config.load_config)
        names = model.load_weights(loader.get_all_weights(config.model_config, model))
    held = dict(model.named_parameters())
    save_file({name: value.detach().contiguous().clone() for name, value in held.items()}, out)
    return sorted(set(held) - set(names))


if __name__ == "__main__":
    choose_any_kernel()
    folders, answers = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    missing = [loaded(folder, answers / f"{index}.safetensors") for index, folder in enumerate(folders)]
    (answers / "loaded.json").write_text(json.dumps(missing))
