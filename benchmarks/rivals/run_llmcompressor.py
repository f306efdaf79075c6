"""llm-compressor (https://github.com/vllm-project/llm-compressor) as its examples use it: presets and defaults.

Two things are set for a machine without an accelerator: AWQ pins its caches, which PyTorch refuses there, so pinning
becomes the identity; and nothing else. AutoRound gets 50 iterations instead of 200, as for ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runner import Task, main

ITERATIONS = 50


def calibrated(task: Task, recipe: Callable[[], Any]) -> None:
    """Run `oneshot` over the samples, one sample a batch in their own order, and save."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    modifiers = recipe()
    task.ready()
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    ids = task.samples()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    dataset = Dataset.from_list(rows)
    with task.clock():
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=modifiers,
            dataset=dataset,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(task.out, save_compressed=True)
    tokenizer.save_pretrained(task.out)


def without_data(task: Task, recipe: Callable[[], Any]) -> None:
    """Run `oneshot` with no samples and save."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    modifiers = recipe()
    task.ready()
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype="auto")
    with task.clock():
        oneshot(model=model, recipe=modifiers)
    model.save_pretrained(task.out, save_compressed=True)
    AutoTokenizer.from_pretrained(task.model).save_pretrained(task.out)


def rtn(scheme: str) -> Any:
    """Return round to nearest."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


def gptq(scheme: str) -> Any:
    """Return GPTQ with its defaults: blocks of 128 columns, damping 0.01, static activation order."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])


def awq() -> Any:
    """Return AWQ with its defaults, and the rounding that it prepares."""
    from llmcompressor.modifiers.transform.awq import AWQModifier

    return [AWQModifier(), rtn("W4A16_ASYM")]


def smooth_gptq() -> Any:
    """Return the recipe of its W8A8 example."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=0.8), gptq("W8A8")]


def autoround() -> Any:
    """Return AutoRound; compiling its loop is left on where it is the default."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    return AutoRoundModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], iters=ITERATIONS)


def model_free(task: Task) -> None:
    """Run the entry point that quantizes files without building the model."""
    from llmcompressor import model_free_ptq

    task.ready()
    with task.clock():
        model_free_ptq(
            model_stub=task.model,
            save_directory=task.out,
            scheme="FP8_DYNAMIC",
            ignore=["lm_head", "model.embed_tokens"],
            device="cpu",
        )


RECIPES = {
    "rtn_w4": lambda task: without_data(task, lambda: rtn("W4A16")),
    "gptq_w4": lambda task: calibrated(task, lambda: gptq("W4A16")),
    "awq_w4": lambda task: calibrated(task, awq),
    "autoround_w4": lambda task: calibrated(task, autoround),
    "smooth_gptq_w8a8": lambda task: calibrated(task, smooth_gptq),
    "fp8_static": lambda task: calibrated(task, lambda: rtn("FP8")),
    "fp8_dynamic": lambda task: without_data(task, lambda: rtn("FP8_DYNAMIC")),
    "fp8_dynamic_model_free": model_free,
}

if __name__ == "__main__":
    main(RECIPES, ("llmcompressor", "compressed-tensors", "auto-round", "torch", "transformers"))
