"""Small configurations of the families that are tested: the shapes are tiny, the modules are all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
PATCHES = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 64,
}  # fmt: skip
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 90
VISION_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TEXT,
    "qwen2": TEXT,
    "qwen3": TEXT,
    "qwen3_moe": TEXT | EXPERTS,
    # These store their experts as stacks, turned around.
    "qwen3_vl_moe": dict(
        text_config=TEXT | ROPE | EXPERTS,
        vision_config=PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **VISION_IDS,
    ),
    "llama4_text": TEXT | {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 48, "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "attention_chunk_size": 8,
    },
    "gpt_oss": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "hunyuan_v1_dense": TEXT,
    "hunyuan_v1_moe": TEXT | {"num_experts": 4, "moe_topk": 2},
    "hy_v3": TEXT | EXPERTS | {"first_k_dense_replace": 1, "num_shared_experts": 1},
    # Its head_dim is that of the rotary part, so it stays at the family's own default.
    "deepseek_v3": {key: value for key, value in TEXT.items() if key != "head_dim"}
    | LATENT | ROUTED | {"num_key_value_heads": 4},
    "glm4": TEXT,
    "glm4_moe": TEXT | ROUTED,
    "gemma3_text": TEXT | SLIDING | {"query_pre_attn_scalar": 16},
    "phi3": TEXT,
    "seed_oss": TEXT,
    "gemma3": {"text_config": TEXT | SLIDING, "vision_config": ENCODER, "mm_tokens_per_image": 4},
    "qwen2_5_vl": dict(
        text_config=TEXT | ROPE,
        vision_config=PATCHES | {"fullatt_block_indexes": [1], "window_size": 16},
        **VISION_IDS,
    ),
    "qwen3_vl": dict(
        text_config=TEXT | ROPE,
        vision_config=PATCHES | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **VISION_IDS,
    ),
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": ENCODER | {"model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 90,
    },
    "qwen2_audio": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48, "num_mel_bins": 16, "max_source_positions": 32,
        },
        "audio_token_index": 90,
    },
    "glmasr": {
        "text_config": TEXT | {"model_type": "llama"},
        "audio_config": {
            "model_type": "glmasr_encoder", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_mel_bins": 16,
        },
        "audio_token_id": 90,
    },
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    """The family's small configuration."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def random_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of the family, spread out enough that a wrong mask or rotation shows."""
    from angelslim.models.loading import model_class

    torch.manual_seed(0)
    config = config_of(family, **changes)
    model = model_class(config)._from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.startswith(("visual", "model.visual")):
            torch.nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # stored with the weights, and zero until trained
            torch.nn.init.normal_(buffer)
    return model


def save_random(family: str, folder: Path, **changes: Any) -> Any:
    """Save a random model of the family and return it."""
    model = random_model(family, **changes)
    model.save_pretrained(folder)
    return model


def with_image(family: str) -> dict[str, torch.Tensor]:
    """Ids with one picture of 16 patches, and its pixels, as the family wants them."""
    generator = torch.Generator().manual_seed(2)
    if family == "llava":
        ids = torch.tensor([[5, *[IMAGE] * 16, 7, 8]])
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    if family == "qwen2_audio":
        ids = torch.tensor([[5, *[IMAGE] * 16, 7, 8]])
        features = torch.randn(1, 16, 64, generator=generator)
        return {
            "input_ids": ids,
            "input_features": features,
            "feature_attention_mask": torch.ones(1, 64, dtype=torch.long),
        }
    ids = torch.tensor([[5, 92, *[IMAGE] * 4, 93, 7, 8, 9]])
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def _letters(marker: str) -> Any:
    """A tokenizer of one token a letter whose id 90 is `marker`, with a chat template that places it."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ?.,:\n"
    words = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    words += [f"<unused{index}>" for index in range(len(words), 90)] + [marker]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [marker]})
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% else %}"
        + marker
        + "{% endif %}{% endfor %}\n{% endfor %}"
    )
    return tokenizer


def image_processor() -> Any:
    """The processor of the "llava" family: 16 x 16 pixels, patches of 4."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    tokenizer = _letters("<image>")
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    )  # fmt: skip


def audio_processor() -> Any:
    """The processor of the "qwen2_audio" family: 16 mel bins, 64 frames."""
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = _letters("<|AUDIO|>")
    features = WhisperFeatureExtractor(feature_size=16, chunk_length=1, hop_length=250)
    return Qwen2AudioProcessor(features, tokenizer, chat_template=tokenizer.chat_template)
