"""The models of the study: built from nothing, saved and opened as ordinary folders, and their scores."""

from __future__ import annotations

import math
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .study import VOCABULARY, Shape

HEAD = 64


def build(shape: Shape, length: int, seed: int) -> Any:
    """Return an untrained Llama in float32 with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = shape.hidden // HEAD
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD,
        intermediate_size=shape.inner,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        dtype="float32",
    )
    return fuse_norms(LlamaForCausalLM(config))


def fuse_norms(model: Any) -> Any:
    """Let the norms be one kernel instead of eight, forward and backward; a fifth of a small model's step."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(_norm, module)
    return model


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def save(model: Any, folder: Path, tokenizer_folder: Path) -> None:
    """Save in bfloat16 with the tokenizer's files; whole or not at all."""
    import copy
    import shutil

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half = copy.deepcopy(model).to("cpu", torch.bfloat16)
    half.config.dtype = "bfloat16"
    half.save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def open_base(folder: Path, device: str) -> Any:
    """Open a saved model with float32 weights, which training needs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return fuse_norms(model.to(device))


@torch.inference_mode()
def nats(model: Any, rows: Tensor, batch: int = 32) -> float:
    """Return the mean negative log-likelihood of a token of ``rows [rows, length]``, computed in float32."""
    modes = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for piece in rows.split(batch):
        ids = piece.long()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="sum"
        )
    model.train(modes)
    return total.item() / (rows.shape[0] * (rows.shape[1] - 1))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Turn nats a token into bits a byte, which no tokenizer flatters."""
    return nats_per_token / math.log(2) / bytes_per_token
