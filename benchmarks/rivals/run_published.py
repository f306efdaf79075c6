"""AngelSlim's published package, what of it runs on a CPU: FP8 with static and with dynamic scales, by its engine.

Version 0.5.0 installs and cannot be imported (its wheel lacks `angelslim.compressor.qat`), so this is 0.3.0, the newest
one that can. Its GPTQ and what builds on it name a CUDA device; FP8 is what is left to compare.
"""

from __future__ import annotations

from typing import Any

from runner import Task, main


def fp8(task: Task, name: str) -> None:
    """Calibrate with the samples as they are (no padding) and save; the call is the engine's run."""
    from angelslim.utils.config_parser import CompressionConfig, GlobalConfig, QuantizationConfig

    from angelslim.engine import Engine

    task.ready()
    engine = Engine()
    engine.prepare_model(model_name="Qwen", model_path=task.model, device_map="cpu", torch_dtype="auto")
    dynamic = name == "fp8_dynamic"
    if not dynamic:
        engine.prepare_data(custom_dataloader=batches(task))
    quantization = QuantizationConfig(
        name=name,
        bits=8,
        quant_method={"weight": "per-tensor", "activation": "per-tensor"},
        ignore_layers=["lm_head"],
    )
    with task.clock():
        engine.prepare_compressor(
            "PTQ",
            global_config=GlobalConfig(),
            compress_config=CompressionConfig(name=["PTQ"], quantization=quantization),
        )
        engine.run()
    engine.save(task.out)


def batches(task: Task) -> list[dict[str, Any]]:
    """Return the samples as its loader would, one a batch."""
    return [
        {"input_ids": row[None], "attention_mask": row[None] * 0 + 1, "labels": row[None]}
        for row in task.samples()
    ]


RECIPES = {
    "fp8_static": lambda task: fp8(task, "fp8_static"),
    "fp8_dynamic": lambda task: fp8(task, "fp8_dynamic"),
}

if __name__ == "__main__":
    main(RECIPES, ("angelslim", "torch", "transformers"))
