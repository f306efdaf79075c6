"""What llama.cpp has to know of a model beside its weights: its shape, its rotary table, its names for tensors.

An *architecture* is a graph that llama.cpp has by name; these are the ones whose tensors map one to one. Its Llama
graph rotates neighbouring channels where transformers rotates the two halves of a head, so rows of q and k change
places; each row keeps its codes and scales.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.errors import ModelError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
ROPE = {
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
}
USUAL = {
    "beta_fast": 32,
    "beta_slow": 1,
    "partial_rotary_factor": 1.0,
    "truncate": True,
}  # llama.cpp's own values
BIASED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
)  # in every graph; the rest only in Llama's
TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def architecture(config: Any) -> str:
    """Return llama.cpp's name of the model's graph; what the graph does not compute is a `ModelError`."""
    name, problem = ARCHITECTURES.get(config.model_type, ""), ""
    if not name:
        problem = f"no mapping for model_type {config.model_type!r} (known: {', '.join(ARCHITECTURES)})"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        problem = "no sliding windows in this graph"
    elif rope_of(config)["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        problem = f"no rotary table of type {rope_of(config)['rope_type']!r}"
    elif told := {
        key for key, value in rope_of(config).items() if key not in ROPE and value != USUAL.get(key)
    }:
        problem = f"no place for the rotary settings {sorted(told)}"
    elif config.hidden_act != "silu":
        problem = f"no activation {config.hidden_act!r}"
    if problem:
        raise ModelError(f"GGUF: {problem}.", fix="Serve the folder with vLLM or SGLang.")
    return name


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary settings with their type and base filled in."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def head_size(config: Any) -> int:
    """Return the channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def add_shape(writer: Any, config: Any) -> None:
    """Write the sizes and constants of the network."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = rope_of(config)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: Any) -> Tensor | None:
    """Return what Llama 3.1 divides each frequency by, F32 ``[head / 2]``; None for other rotary tables.

    Waves shorter than `original / high` turn as before, longer than `original / low` are stretched by the factor,
    between the two the reciprocal moves linearly.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - share) / rope["factor"] + share)
    return factors.float()


def has_place(tensor: str, graph: str) -> bool:
    """Say whether a graph loads a tensor of a layer, given transformers' name: some add no bias."""
    stem, _, leaf = tensor.rpartition(".")
    return leaf == "weight" or (leaf == "bias" and (graph == "llama" or stem.endswith(BIASED)))


def turned_rows(name: str, rows: int, config: Any, graph: str) -> Tensor | None:
    """Return the order in which the graph wants a layer's rows, or None to leave them."""
    if graph != "llama" or not name.endswith(TURNED):
        return None
    size = head_size(config)
    return torch.arange(rows).reshape(-1, 2, size // 2).transpose(1, 2).reshape(-1)


def layer_names(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return transformers' names of the modules by llama.cpp's."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for block in range(fields[f"{fields['general.architecture']}.block_count"]):
        for theirs, ours in PLACES.items():
            names[f"blk.{block}.{theirs}"] = f"model.layers.{block}.{ours}"
    return names


def config_from(fields: Mapping[str, Any], tensors: Collection[str], file: Path) -> Any:
    """Return the transformers configuration that a file's fields, and the names of its tensors, describe.

    A Mistral comes back as the Llama that it computes like.
    """
    from transformers import AutoConfig

    graph = fields.get("general.architecture")
    if graph not in ARCHITECTURES.values():
        raise ModelError(
            f"{file}: models of type {graph!r} are not read.", fix="Serve the file with llama.cpp."
        )
    known = {key.removeprefix(f"{graph}."): value for key, value in fields.items()}
    biased = {name.split(".")[-2] for name in tensors if name.endswith(".bias")}
    try:
        heads, width = known["attention.head_count"], known["embedding_length"]
        rope = {"rope_type": "default", "rope_theta": known.get("rope.freq_base", 10000.0)}
        if known.get("rope.scaling.type", "none") != "none":
            rope |= {"rope_type": known["rope.scaling.type"], "factor": known["rope.scaling.factor"]}
        if "rope.scaling.original_context_length" in known:
            rope["original_max_position_embeddings"] = known["rope.scaling.original_context_length"]
        settings = {
            "vocab_size": len(known["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": known["feed_forward_length"],
            "num_hidden_layers": known["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": known.get("attention.head_count_kv", heads),
            "head_dim": known.get("attention.key_length", width // heads),
            "max_position_embeddings": known["context_length"],
            "rms_norm_eps": float(f"{known['attention.layer_norm_rms_epsilon']:.7g}"),  # stored in float32
            "rope_parameters": rope,
            "tie_word_embeddings": "output.weight" not in tensors,
        }
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"{file} lacks a field, or has one of another kind ({error}).", fix="Write the file again."
        ) from error
    if graph == "llama":
        settings |= {"attention_bias": "attn_q" in biased, "mlp_bias": "ffn_up" in biased}
    for name in ("bos", "eos"):
        settings[f"{name}_token_id"] = known.get(f"tokenizer.ggml.{name}_token_id")
    settings["pad_token_id"] = known.get("tokenizer.ggml.padding_token_id")
    return AutoConfig.for_model(graph, **settings)
