"""The flat dialect: calibration on a serving engine, with the keys of its scripts at the top level.

One file may feed two steps (collect statistics, then write a quantized checkpoint); the keys of both stand
side by side.
"""

from __future__ import annotations

from .fields import Int, Ints, Number, Section, Word
from .training import Dtype


class FlatConfig(Section):
    """A file of the flat dialect."""

    model_path: str | None = None
    ptq_data_path: str | None = None
    output_dir: str | None = None
    save_path: str | None = None
    # Running the model.
    tp_size: Int | None = None
    dp_size: Int | None = None
    batch_size: Int | None = None
    num_samples: Int | None = None
    max_length: Int | None = None
    distributed_executor_backend: Word | None = None
    skip_weight_loading: bool | None = None
    enable_mtp: bool | None = None
    num_speculative_tokens: Int | None = None
    verbose: bool | None = None
    device: str | None = None
    dtype: Dtype | None = None
    # KV cache scales.
    per_head: bool | None = None
    kv_granularity: Word | None = None
    k_scheme: Word | None = None
    v_scheme: Word | None = None
    k_granularity: Word | None = None
    v_granularity: Word | None = None
    quant_k_granularity: Word | None = None
    quant_v_granularity: Word | None = None
    search_kv_scale: bool | None = None
    search_kv_num_samples: Int | None = None
    search_kv_min_multiplier: Number | None = None
    search_kv_max_multiplier: Number | None = None
    search_kv_num_steps: Int | None = None
    # Writing a quantized checkpoint.
    input_bf16_hf_path: str | None = None
    input_vllm_ac_json_path: str | None = None
    output_fp8_hf_path: str | None = None
    output_nvfp4_hf_path: str | None = None
    block_size: Ints | None = None
    fp8_block_size: Int | None = None
    nvfp4_block_size: Int | None = None
    no_quantize_dense_fp8: bool | None = None
    num_workers: Int | None = None
    use_gpu: bool | None = None
    # Smoothing: scope, exponents, and the search for them.
    collect_attn: bool | None = None
    collect_down_proj: bool | None = None
    collect_moe: bool | None = None
    ema_momentum: Number | None = None
    use_ema: bool | None = None
    smooth_qk: bool | None = None
    smooth_vo: bool | None = None
    smooth_down: bool | None = None
    alpha_qk: Number | None = None
    alpha_vo: Number | None = None
    alpha_down: Number | None = None
    enable_alpha_search: bool | None = None
    num_search_samples: Int | None = None
    search_max_length: Int | None = None
    alpha_min: Number | None = None
    alpha_max: Number | None = None
    alpha_steps: Int | None = None
    alpha_max_tokens: Int | None = None
    alpha_use_ema: bool | None = None
    alpha_smooth_search_mode: Word | None = None
    alpha_act_quant_method: Word | None = None
    alpha_act_quant_type: Word | None = None
    alpha_weight_quant_method: Word | None = None
    alpha_weight_quant_type: Word | None = None
    alpha_weight_quant_bits: Int | None = None
    alpha_weight_group_size: Int | None = None
    alpha_act_mul_min: Number | None = None
    alpha_act_mul_max: Number | None = None
    alpha_smooth_min: Number | None = None
    alpha_smooth_max: Number | None = None
