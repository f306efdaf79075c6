"""Runs inside the llama.cpp environment: score windows of tokens, continue prompts greedily, tokenize a text.

    python llama_cpp_probe.py MODEL.gguf REQUEST.json ANSWER.json

The request holds ``windows`` (lists of token ids), ``prompts`` (lists of token ids), ``new_tokens``, ``end`` (the
token that ends a continuation) and ``text``; the answer holds one list of negative log-likelihoods per window (all
but the first token), the new tokens of each prompt, and the token ids of the text.
"""

import json
import sys

import llama_cpp
import numpy as np


def scored(engine: llama_cpp.Llama, ids: list[int]) -> list[float]:
    """Negative log-likelihood of each token after the first, the log-softmax in float64."""
    engine.reset()
    engine.eval(ids)
    logits = np.asarray(engine.scores[: len(ids) - 1], dtype=np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return (np.log(np.exp(logits).sum(axis=1)) - chosen).tolist()


def continued(engine: llama_cpp.Llama, prompt: list[int], count: int, end: int) -> list[int]:
    """The most likely tokens, one after the other, the end token included."""
    engine.reset()
    engine.eval(prompt)
    found: list[int] = []
    while len(found) < count and end not in found:
        found.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
        engine.eval(found[-1:])
    return found


def main(model: str, request_file: str, answer_file: str) -> None:
    with open(request_file) as stream:
        request = json.load(stream)
    engine = llama_cpp.Llama(
        model, n_ctx=1024, n_batch=1024, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    answer = {
        "nll": [scored(engine, ids) for ids in request["windows"]],
        "tokens": [
            continued(engine, ids, request["new_tokens"], request["end"]) for ids in request["prompts"]
        ],
        "text": engine.tokenize(request["text"].encode(), add_bos=False, special=True),
    }
    with open(answer_file, "w") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
