"""Ours: an ordinary run, by recipe; its call includes reading the model and writing the result, not the imports."""

from __future__ import annotations

import os

from runner import Task, main

RECIPES = {
    "rtn_w4": "int4_rtn",
    "gptq_w4": "int4_gptq",
    "gptq_w4_plain": "int4_gptq",  # ranges as they are
    "gptaq_w4": "int4_gptaq",
    "gptaq_w4_plain": "int4_gptaq",
    "awq_w4": "int4_awq",
    "autoround_w4": "int4_autoround",
    "best_w4": "int4_best",
    "best_asym_w4": "int4_best_asym",
    "smooth_gptq_w8a8": "int8_smooth_gptq",
    "fp8_static": "fp8_static",
    "fp8_lepto": "fp8_lepto",
    "fp8_lepto_extended": "fp8_lepto_extended",
    "fp8_dynamic": "fp8_dynamic",
    "fp8_dynamic_first": "fp8_dynamic",  # nothing remembered of the model by an earlier run
    "int8_dynamic": "int8_dynamic",
    "int8_smooth": "int8_smooth",
}
METHOD = "compression__quantization__quant_method__"
EXTRA = {
    "autoround_w4": {f"{METHOD}iterations": 50},  # as the other tool's
    "gptq_w4_plain": {f"{METHOD}mse_range": False},
    "gptaq_w4_plain": {f"{METHOD}mse_range": False},
}


def compress(task: Task, name: str) -> None:
    """Compress with one of our recipes, all samples in their own order."""
    if name.endswith("_first"):
        os.environ["ANGELSLIM_CACHE"] = ""
    if not name.startswith("fp8_dynamic"):  # only their whole processes are compared
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401  the others import it before their call, too
    from safetensors import safe_open

    from angelslim.engine import compress as run

    with safe_open(task.ids, framework="pt") as file:
        samples, tokens = file.get_slice("input_ids").get_shape()
    task.ready()
    with task.clock():
        run(
            task.model,
            RECIPES[name],
            out=task.out,
            dataset__data_path=task.ids,
            dataset__num_samples=samples,
            dataset__max_seq_length=tokens,
            evaluation__enabled=False,
            **EXTRA.get(name, {}),
        )


if __name__ == "__main__":
    main(
        {name: lambda task, name=name: compress(task, name) for name in RECIPES},
        ("angelslim", "torch", "transformers"),
    )
