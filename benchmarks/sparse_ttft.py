"""Time to the first token of a random model of Qwen3-8B's shape: sparse prefill against the fastest dense attention.

    python benchmarks/sparse_ttft.py                      32k and 128k tokens; a GPU with 80 GB; under six minutes

The protocol of `sparse_speed`: runs alternate with the dense baseline, ratios are medians of pairs, failures are
recorded, the results file is written after every measurement. Weights are random, so nothing here speaks of quality, and only
budgets of a fixed density are timed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import RESULTS, bar
from sparse_speed import Book, milliseconds

TTFT_GOALS = {32768: 1.5, 131072: 2.8}


def random_qwen3(lengths: list[int], device: torch.device) -> Any:
    """Qwen3-8B's shape with random weights, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=max(lengths), attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(std=0.02)
    rotary = model.model.rotary_emb  # its frequencies are no parameters
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    return model


def repeated(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **more: Any) -> tuple[Tensor, None]:
    """Causal SDPA with repeated keys, for backends that do not group them; the batch is not padded."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=more["scaling"])
    return out.transpose(1, 2).contiguous(), None


def ttft(book: Book, device: torch.device, lengths: list[int], repeats: int) -> None:
    """A random model of Qwen3-8B's shape, from the prompt to the first token."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface

    from angelslim.methods.sparse.attach import Settings, attach
    from angelslim.methods.sparse.selectors.base import SELECTORS as REGISTRY

    model = random_qwen3(lengths, device)
    AttentionInterface.register("repeated", repeated)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def prefill(ids: Tensor) -> Tensor:
        with torch.no_grad():
            tokens: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return tokens

    def dense(ids: Tensor, way: tuple[str, str]) -> float:
        model.set_attn_implementation(way[0])
        with sdpa_kernel(backends[way[1]]):
            return milliseconds(lambda: prefill(ids), device)

    for length in lengths:
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        times: dict[tuple[str, str], float] = {}
        for way in (("repeated", "cudnn"), ("sdpa", "cudnn"), ("sdpa", "flash")):
            with book.entry(length=length, kind="ttft dense", name=" ".join(way)) as found:
                dense(ids, way)
                found["ms"] = times[way] = dense(ids, way)
        for method in ("union", "stem") if times else ():
            with book.entry(length=length, kind="ttft", name=method, density=0.1) as found:
                best, pairs = min(times, key=times.__getitem__), []
                select = REGISTRY.get(method)({"density": 0.1}).select
                for turn in range(repeats + 1):
                    plain = dense(ids, best)
                    with attach(model, select, Settings(measure=turn == 0)) as attached:
                        pairs.append((plain, milliseconds(lambda ids=ids: prefill(ids), device)))
                    if turn == 0:
                        found["hook"] = attached.total()
                pairs = pairs[1:]
                found["ms"] = statistics.median(pair[1] for pair in pairs)
                found["dense_ms"] = statistics.median(pair[0] for pair in pairs)
                found["speedup"] = statistics.median(pair[0] / pair[1] for pair in pairs)
                found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                if length in TTFT_GOALS:
                    name = f"TTFT of {method} at density 0.1, {length} tokens: times dense"
                    book.bars.append(bar(name, found["speedup"], TTFT_GOALS[length], at_most=False))


def main() -> None:
    """Measure the given lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,131072", help="tokens, with commas between")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=420, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    book = Book("sparse_ttft", given.out, given.limit)
    ttft(book, torch.device("cuda"), [int(word) for word in given.lengths.split(",")], given.repeats)
    book.save(quietly=False)


if __name__ == "__main__":
    main()
