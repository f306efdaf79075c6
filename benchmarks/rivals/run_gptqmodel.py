"""GPTQModel (https://github.com/ModelCloud/GPTQModel): GPTQ and GPTAQ on the CPU, with its defaults (ranges as they are)
and with its own search of ranges (`mse`, whose value is the norm of the error: 2.4 in GPTQ's published code).

Its pool wants two workers for loading, which machines with few cores are refused unless told otherwise.
"""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from runner import Task, main

NORM = 2.4


def gptq(task: Task, *, follow_original: bool, mse: float = 0.0) -> None:
    """Quantize and save; GPTAQ is GPTQ with its own configuration, strength 0.25 by default."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import GPTAQConfig

    task.ready()
    config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False, mse=mse)
    if follow_original:
        config.gptaq = GPTAQConfig()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in task.samples().tolist()]
    model = GPTQModel.load(task.model, config, device="cpu")
    with task.clock():
        model.quantize(rows, batch_size=1)
    model.save(task.out)


RECIPES = {
    "gptq_w4": lambda task: gptq(task, follow_original=False),
    "gptq_w4_mse": lambda task: gptq(task, follow_original=False, mse=NORM),
    "gptaq_w4": lambda task: gptq(task, follow_original=True),
    "gptaq_w4_mse": lambda task: gptq(task, follow_original=True, mse=NORM),
}

if __name__ == "__main__":
    main(RECIPES, ("gptqmodel", "torch", "transformers"))
