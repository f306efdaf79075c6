"""Time to the first token of a random model of Qwen3-8B's shape: sparse prefill against the fastest dense attention.

    python benchmarks/sparse_ttft.py                      32k and 128k tokens; a GPU with 80 GB; twelve minutes, --limit ends it earlier

The protocol of `sparse_speed`: runs alternate with the dense baseline, ratios are medians of pairs, failures are
recorded, the results file is written after every measurement. Weights are random, so nothing here speaks of quality, and only
budgets of a fixed density are timed. Selectors and kernels are compiled on tensors of the length before it is measured.

Everything is measured on two kinds of layers, dense and sparse alike. `eager` is transformers as it comes, whose norms, rotary
positions and activations are dozens of passes over memory; `compiled` has these three under torch.compile, as an
engine would fuse them. Attention is a larger part of such a model, and its dense run is the fastest of the process, so the goals are
set for it. The other kind's bars are an addition, against a slower baseline: printed and recorded with the same goals, whether
they hold or not. `nothing` is attention that costs nothing (it hands the queries on): no sparse attention can be
faster, so its ratio bounds what there is to win.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import RESULTS, bar
from sparse_speed import TOGETHER_GOALS, Book, Late, context, inputs, milliseconds

TTFT_GOALS = {32768: 1.5, 131072: 2.8}
METHODS = ("union", "stem")
DENSITY = 0.1
SHAPE = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
ADDED = "in addition, on layers whose dense attention is not the fastest: "
LONG = 100_000  # tokens, from which no run is spared for warming up but the one of `nothing`
WAYS = (("sdpa", "cudnn"), ("repeated", "cudnn"), ("sdpa", "flash"))


def random_qwen3(lengths: list[int], device: torch.device) -> Any:
    """Qwen3-8B's shape with random weights, in bfloat16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**SHAPE, max_position_embeddings=max(lengths), attn_implementation="sdpa")
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


def nothing(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, **more: Any) -> tuple[Tensor, None]:
    """Attention for free: the queries."""
    return q.transpose(1, 2), None


@contextmanager
def compiled_layers() -> Iterator[None]:
    """Compile what lies around attention and the products, in every layer of every Qwen3: norms, rotary positions, activations."""
    from transformers.models.qwen3 import modeling_qwen3 as code

    torch._dynamo.config.recompile_limit = 64  # one a shape
    places: list[tuple[Any, str]] = [
        (code.Qwen3RMSNorm, "forward"), (code.Qwen3MLP, "forward"), (code, "apply_rotary_pos_emb"),
    ]  # fmt: skip
    before = [getattr(owner, name) for owner, name in places]
    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, torch.compile(function, dynamic=False))
    try:
        yield
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


class Prefill:
    """A model's way from a prompt to its first token, with any attention, in milliseconds."""

    def __init__(self, model: Any, length: int, device: torch.device) -> None:
        from torch.nn.attention import SDPBackend

        torch.manual_seed(1)
        self.model, self.device = model, device
        self.ids = torch.randint(0, model.config.vocab_size, (1, length), device=device)
        self.logits = torch.empty(0)
        self.backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def run(self) -> float:
        """With the attention that the model has."""

        def once() -> None:
            with torch.no_grad():
                self.logits = self.model(self.ids, use_cache=True, logits_to_keep=1).logits
            self.logits.argmax(-1)

        return milliseconds(once, self.device)

    def last(self) -> Tensor:
        """The logits of the last run, float32."""
        return self.logits.float()

    def dense(self, way: tuple[str, str]) -> float:
        """With one of transformers' attentions over one of PyTorch's backends."""
        from torch.nn.attention import sdpa_kernel

        self.model.set_attn_implementation(way[0])
        with sdpa_kernel(self.backends[way[1]]):
            return self.run()

    def free(self) -> float:
        """With attention that costs nothing."""
        self.model.set_attn_implementation("nothing")
        return self.run()

    def sparse(self, select: Callable[..., Any], measure: bool) -> tuple[float, dict[str, Any]]:
        """With a selector; also what the hook counted."""
        from angelslim.methods.sparse.attach import Settings, attach

        with attach(self.model, select, Settings(measure=measure)) as attached:
            found = self.run()
            return found, attached.total()


def warmed(length: int, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The selectors, after they and the kernel have been compiled for this length."""
    from angelslim.kernels.attention.base import Case
    from angelslim.kernels.attention.choose import choose
    from angelslim.methods.sparse.selectors.base import SELECTORS

    q, k, v = inputs(length, device)
    kernel, ctx = choose(Case.of(q, v, 128))[0], context(length, q.shape[3])
    found = {name: SELECTORS.get(name)({"density": DENSITY}).select for name in METHODS}
    for select in found.values():
        kernel.run(q, k, v, select(q, k, v, ctx), scaling=ctx.scaling)
    return found


def fastest(book: Book, prefill: Prefill, layers: str, length: int) -> Any:
    """The fastest dense attention."""
    times = {}
    for way in WAYS:
        with book.entry(length=length, layers=layers, kind="ttft dense", name=" ".join(way)) as found:
            prefill.dense(way)
            found["ms"] = times[way] = prefill.dense(way)
    return min(times, key=times.__getitem__) if times else None


def attention(pairs: list[tuple[float, float]], free: list[tuple[float, float]]) -> float:
    """How much faster attention is, selection included: of each whole round's times, what attention for nothing takes is taken off."""
    return statistics.median(
        (dense - rest) / (spent - rest) for (dense, spent), (_, rest) in zip(pairs, free, strict=False)
    )


def rounds(
    book: Book, prefill: Prefill, way: Any, layers: str, length: int, repeats: int, seconds: float
) -> None:
    """Dense, every selector and nothing in turn, until there are enough rounds or their time is up."""
    selectors, hooks = warmed(length, prefill.device), {}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in (*METHODS, "nothing")}
    with book.entry(length=length, layers=layers, kind="rounds", dense=" ".join(way)) as found:
        prefill.free()
        if length < LONG:
            prefill.dense(way)
            for select in selectors.values():
                prefill.sparse(select, measure=False)
        begun = time.monotonic()
        while len(pairs["nothing"]) < repeats and (
            not hooks or time.monotonic() < min(begun + seconds, book.end)
        ):
            dense = prefill.dense(way)
            for name, select in selectors.items():
                spent, hook = prefill.sparse(select, measure=name not in hooks)
                pairs[name].append((dense, spent))
                hooks.setdefault(name, hook)
            pairs["nothing"].append((dense, prefill.free()))
        found["rounds"] = len(pairs["nothing"])
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    for name, kept in pairs.items():
        if not kept:
            continue
        found = {"length": length, "layers": layers, "kind": "ttft", "name": name}
        if name in hooks:
            found |= {"density": DENSITY, "hook": hooks[name]}
        found["ms"] = statistics.median(pair[1] for pair in kept)
        found["dense_ms"] = statistics.median(pair[0] for pair in kept)
        found["speedup"] = statistics.median(pair[0] / pair[1] for pair in kept)
        found["samples"] = kept
        if name in METHODS and pairs["nothing"]:
            found["attention_speedup"] = attention(kept, pairs["nothing"])
        book.add(found)


def bars(raw: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What has to hold: against the fastest dense attention of the process. Slower layers are held to the same goals, in addition."""
    rows = [row for row in raw if row["kind"] == "ttft" and "attention_speedup" in row]
    found = []
    for row in rows:
        length, layers = row["length"], row["layers"]
        if length not in TTFT_GOALS:
            continue
        fastest = min(
            (other for other in rows if other["length"] == length), key=lambda x: float(x["dense_ms"])
        )
        what = f"{row['name']} at density {row['density']}, {length} tokens, {layers} layers"
        added, base = ("", "the fastest dense") if layers == fastest["layers"] else (ADDED, "their own dense")
        for kind, value, goal in (
            ("TTFT", row["speedup"], TTFT_GOALS[length]),
            ("attention", row["attention_speedup"], TOGETHER_GOALS[length]),
        ):
            found.append(bar(f"{added}{kind} of {what}: times {base}", value, goal, at_most=False))
    return found


def ttft(
    book: Book, device: torch.device, lengths: list[int], kinds: list[str], repeats: int, seconds: float
) -> None:
    """Each kind of layers at each length."""
    from transformers import AttentionInterface

    model = random_qwen3(lengths, device)
    AttentionInterface.register("repeated", repeated)
    AttentionInterface.register("nothing", nothing)
    way = fastest(book, Prefill(model, lengths[0], device), "eager", lengths[0])
    if way is None:
        return
    logits: dict[str, Tensor] = {}
    for layers in kinds:
        with compiled_layers() if layers == "compiled" else nullcontext():
            for length in lengths:
                prefill = Prefill(model, length, device)
                rounds(book, prefill, way, layers, length, repeats, seconds)
                book.bars = bars(book.raw)
                if length == lengths[0]:
                    prefill.dense(way)
                    logits[layers] = prefill.last()
    if len(logits) < 2:
        return
    with book.entry(length=lengths[0], kind="compiled against eager", name="dense logits") as found:
        difference = (logits["eager"] - logits["compiled"]).norm() / logits["eager"].norm()
        found["relative_difference"] = float(difference)


def main() -> None:
    """Measure the given lengths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,131072", help="tokens, with commas between")
    parser.add_argument("--layers", default="compiled,eager")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=240, help="after which no further round of a length begins"
    )
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds after which nothing new is begun, rounds included"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    book = Book("sparse_ttft", given.out, given.limit)
    try:
        lengths = [int(word) for word in given.lengths.split(",")]
        ttft(book, torch.device("cuda"), lengths, given.layers.split(","), given.repeats, given.seconds)
    except Late:
        book.raw.append({"kind": "limit", "name": "the time limit ended the run", "seconds": given.limit})
    book.save(quietly=False)


if __name__ == "__main__":
    main()
