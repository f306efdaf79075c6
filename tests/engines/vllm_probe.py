"""Runs inside the vLLM environment: score windows of tokens and continue prompts greedily.

    python vllm_probe.py MODEL REQUEST.json ANSWER.json

The request holds ``windows`` (lists of token ids), ``prompts`` (lists of token ids) and ``new_tokens``; the
answer holds one list of negative log-likelihoods per window (all but the first token) and the new tokens of each
prompt.
"""

import json
import os
import sys

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)


def main(model: str, request_file: str, answer_file: str) -> None:
    from vllm import LLM, SamplingParams

    with open(request_file) as stream:
        request = json.load(stream)
    engine = LLM(
        model=model, max_model_len=1024, enforce_eager=True, dtype="bfloat16", disable_log_stats=True
    )
    scored = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["windows"]],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    continued = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(max_tokens=request["new_tokens"], temperature=0),
        use_tqdm=False,
    )
    nll = [
        [
            -step[token].logprob
            for token, step in zip(item.prompt_token_ids[1:], item.prompt_logprobs[1:], strict=True)
        ]
        for item in scored
    ]
    with open(answer_file, "w") as stream:
        json.dump({"nll": nll, "tokens": [list(item.outputs[0].token_ids) for item in continued]}, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
