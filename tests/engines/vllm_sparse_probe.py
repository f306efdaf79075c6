"""Runs inside the vLLM environment: continue prompts with the stock attention, or with sparse prefill in its place.

    python vllm_sparse_probe.py MODEL REQUEST.json ANSWER.json

The request holds ``prompts`` (token ids), ``new_tokens``, and ``stages``: a list of (selector, options) that are attached one after
another; an empty list leaves vLLM as it is. The answer holds the tokens, density and fallbacks of each stage.
"""

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs here, where its figures can be read
)


def main(model: str, request_file: str, answer_file: str) -> None:
    with open(request_file) as stream:
        request = json.load(stream)
    stages = request["stages"]
    if stages:
        os.environ["ANGELSLIM_SPARSE_ATTENTION"] = stages[0][0]
        from angelslim import vllm_attention

        vllm_attention.register()  # as vLLM does for an installed plug-in
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model, max_model_len=1024, enforce_eager=True, dtype="bfloat16", disable_log_stats=True,
        enable_prefix_caching=False, max_num_batched_tokens=4096,
    )  # fmt: skip
    config = engine.llm_engine.model_config.hf_text_config

    def tokens() -> list[list[int]]:
        continued = engine.generate(
            [{"prompt_token_ids": ids} for ids in request["prompts"]],
            SamplingParams(max_tokens=request["new_tokens"], temperature=0),
            use_tqdm=False,
        )
        return [list(item.outputs[0].token_ids) for item in continued]

    answers = []
    for name, options in stages:
        prefill = vllm_attention.use(name, config, options=options, block=32, crossover=64, kernel="dense")
        object.__setattr__(prefill.settings, "measure", True)
        vllm_attention.STATS.clear()
        found = tokens()
        rows = [stats.row() for stats in vllm_attention.STATS.values()]
        answers.append(
            {
                "tokens": found,
                "densities": [row["density"] for row in rows],
                "calls": sum(row["calls"] for row in rows),
                "fallbacks": dict(vllm_attention.total_fallbacks()),
            }
        )
    with open(answer_file, "w") as stream:
        json.dump(answers or [{"tokens": tokens()}], stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
