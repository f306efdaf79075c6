"""Random checkpoints of large shapes, written shard by shard: an 8-billion Qwen3, and a slice of DeepSeek-V3.

Only shapes, types and names matter to time and memory. Values are drawn on the device and written as they are made, so
that a checkpoint takes the memory of one shard and about the time of writing it. Weights are normal with a standard
deviation of 0.02; the DeepSeek slice stores its matrices as FP8 with a scale for each 128 x 128 tile, as the published
checkpoint does.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3Config

import angelslim

STD, TILE = 0.02, 128
EXPERTS_A_SHARD = 64


def qwen3_8b(layers: int, *, small: bool = False) -> Qwen3Config:
    """Return the shape of Qwen3-8B with a number of layers; `small` is for trying the script."""
    return Qwen3Config(
        vocab_size=4096 if small else 151_936,
        hidden_size=256 if small else 4096,
        intermediate_size=512 if small else 12_288,
        num_hidden_layers=layers,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=2 if small else 8,
        head_dim=64 if small else 128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
        eos_token_id=1,
    )


def deepseek_v3(layers: int, dense: int, *, small: bool = False) -> DeepseekV3Config:
    """Return the shape of DeepSeek-V3 with a number of layers, `dense` of them first; the vocabulary is cut."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 16,
             "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128}  # fmt: skip
    config = DeepseekV3Config(
        vocab_size=4096 if small else 32_768,
        num_hidden_layers=layers,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=0,
        max_position_embeddings=16_384,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["DeepseekV3ForCausalLM"],
        **(sizes if small else {}),
    )
    config.quantization_config = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE],
    }  # fmt: skip
    return config


class _Random:
    """Draws tensors on the device and hands them over on the host."""

    def __init__(self, seed: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return made.normal_(0, STD, generator=self.generator).cpu()

    def tiles(self, name: str, rows: int, columns: int) -> dict[str, Tensor]:
        """Return an FP8 matrix and the scale of each tile."""
        made = torch.empty(rows, columns, dtype=torch.bfloat16, device=self.device)
        codes = made.normal_(0, 64.0, generator=self.generator).to(torch.float8_e4m3fn).cpu()
        scale = torch.full((math.ceil(rows / TILE), math.ceil(columns / TILE)), STD / 64.0)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}


def write_checkpoint(config: PreTrainedConfig, folder: Path, seed: int = 0) -> int:
    """Write a random checkpoint of a config's shape into a new folder; return its bytes."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # any will do: the samples are token ids
        shutil.copyfile(angelslim.builtin_model("tiny-lm") / name, folder / name)
    shards = _deepseek(config, seed) if config.model_type == "deepseek_v3" else _qwen3(config, seed)
    where, total = {}, 0
    for number, tensors in enumerate(shards):
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return total


def _outside(config: PreTrainedConfig, random: _Random) -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": random.normal(config.vocab_size, config.hidden_size),
        "lm_head.weight": random.normal(config.vocab_size, config.hidden_size),
        "model.norm.weight": _ones(config.hidden_size),
    }


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _qwen3(config: PreTrainedConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    random = _Random(seed)
    yield _outside(config, random)
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden,
             "self_attn.q_norm": head, "self_attn.k_norm": head}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        block = {f"{path}.{name}.weight": random.normal(*shape) for name, shape in shapes.items()}
        yield block | {f"{path}.{name}.weight": _ones(size) for name, size in norms.items()}


def _deepseek(config: PreTrainedConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    random = _Random(seed)
    yield _outside(config, random)
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = {
        "q_a_proj": (config.q_lora_rank, hidden),
        "q_b_proj": (heads * query, config.q_lora_rank),
        "kv_a_proj_with_mqa": (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden,
             "self_attn.q_a_layernorm": config.q_lora_rank,
             "self_attn.kv_a_layernorm": config.kv_lora_rank}  # fmt: skip
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        block = {f"{path}.{name}.weight": _ones(size) for name, size in norms.items()}
        for name, shape in attention.items():
            block |= random.tiles(f"{path}.self_attn.{name}", *shape)
        if layer < config.first_k_dense_replace:
            yield block | _mlp(random, f"{path}.mlp", hidden, config.intermediate_size)
            continue
        block[f"{path}.mlp.gate.weight"] = random.normal(config.n_routed_experts, hidden)
        block[f"{path}.mlp.gate.e_score_correction_bias"] = torch.zeros(config.n_routed_experts)
        shared = config.moe_intermediate_size * config.n_shared_experts
        yield block | _mlp(random, f"{path}.mlp.shared_experts", hidden, shared)
        for first in range(0, config.n_routed_experts, EXPERTS_A_SHARD):
            shard: dict[str, Tensor] = {}
            for expert in range(first, min(first + EXPERTS_A_SHARD, config.n_routed_experts)):
                shard |= _mlp(random, f"{path}.mlp.experts.{expert}", hidden, config.moe_intermediate_size)
            yield shard


def _mlp(random: _Random, path: str, hidden: int, inner: int) -> dict[str, Tensor]:
    return {
        **random.tiles(f"{path}.gate_proj", inner, hidden),
        **random.tiles(f"{path}.up_proj", inner, hidden),
        **random.tiles(f"{path}.down_proj", hidden, inner),
    }
