"""The training sections ``QAT``, ``QAD``, ``Distill`` and ``MCoreQAD`` of ``compression``.

`hf_args` are arguments of the training loop. Their names are those of the transformers library's
``TrainingArguments``; the list is written out so that reading a file never imports that library, and a test
compares it with the installed one.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from .fields import Amount, Count, GrainName, Int, Number, Positive, Section, Share, Word

TRAINING_ARGUMENTS = frozenset(
    [
        "accelerator_config",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "auto_find_batch_size",
        "average_tokens_across_devices",
        "batch_eval_metrics",
        "bf16",
        "bf16_full_eval",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "ddp_backend",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "debug",
        "deepspeed",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "enable_jit_checkpoint",
        "eval_accumulation_steps",
        "eval_delay",
        "eval_do_concat_batches",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "eval_use_gather_object",
        "evaluation_strategy",
        "fp16",
        "fp16_full_eval",
        "fsdp",
        "fsdp_config",
        "full_determinism",
        "generation_config",
        "generation_max_length",
        "generation_num_beams",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "group_by_length",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "ignore_data_skip",
        "include_for_metrics",
        "include_num_input_tokens_seen",
        "include_tokens_per_second",
        "label_names",
        "label_smoothing_factor",
        "learning_rate",
        "length_column_name",
        "liger_kernel_config",
        "load_best_model_at_end",
        "local_rank",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "logging_dir",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_steps",
        "logging_strategy",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "metric_for_best_model",
        "neftune_noise_alpha",
        "num_train_epochs",
        "optim",
        "optim_args",
        "optim_target_modules",
        "output_dir",
        "overwrite_output_dir",
        "parallelism_config",
        "per_device_eval_batch_size",
        "per_device_train_batch_size",
        "predict_with_generate",
        "prediction_loss_only",
        "project",
        "push_to_hub",
        "ray_scope",
        "remove_unused_columns",
        "report_to",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        "run_name",
        "save_on_each_node",
        "save_only_model",
        "save_safetensors",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "seed",
        "skip_memory_metrics",
        "sortish_sampler",
        "tf32",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "torchdynamo",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
        "train_sampling_strategy",
        "use_cache",
        "use_cpu",
        "use_legacy_prediction_loop",
        "use_liger_kernel",
        "use_mps_device",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
    ]
)

LossType = Literal["origin", "lm", "kl", "rkl", "kl_top", "rkl_top", "cakld", "mse", "kd"]
SaveFormat = Literal["fake", "real", "hf", "save_kvcache_only", "real_and_kvcache", ""]
Dtype = Literal["auto", "fp8", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]


class GradientCheckpointing(Section):
    """How activations are recomputed."""

    use_reentrant: bool | None = None
    preserve_rng_state: bool | None = None
    determinism_check: Word | None = None


class TrainerArguments(Section):
    """Arguments of the training loop; any name in `TRAINING_ARGUMENTS` is accepted."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]
    extra_keys: ClassVar[frozenset[str]] = TRAINING_ARGUMENTS

    learning_rate: Positive | None = None
    lr_scheduler_type: str | None = None
    warmup_ratio: Share | None = None
    warmup_steps: Amount | None = None
    weight_decay: Amount | None = None
    max_grad_norm: Amount | None = None
    max_steps: Int | None = None
    num_train_epochs: Positive | None = None
    per_device_train_batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    gradient_checkpointing: bool | None = None
    gradient_checkpointing_kwargs: GradientCheckpointing | None = None
    bf16: bool | None = None
    seed: Int | None = None
    data_seed: Int | None = None
    logging_steps: Number | None = None
    logging_first_step: bool | None = None
    save_strategy: Word | None = None
    save_steps: Positive | None = None
    save_total_limit: Int | None = None
    dataloader_num_workers: Int | None = None
    report_to: Word | list[str] | None = None
    deepspeed: str | dict[str, Any] | None = None


class TensorQuant(Section):
    """Fake quantization of one tensor: a weight, an activation, or the output of q, k or v."""

    qtype: str | None = None
    granularity: GrainName | None = None
    group_size: Int | None = None
    is_sym: bool | None = None
    dynamic: bool | None = None
    mantissa_rounding: Literal["even", "nearest"] | None = None
    num_sub: Int | None = None
    use_subgroup_scale: bool | None = None


class Learnable(Section):
    """Which parameters the training moves."""

    act_scale: bool | None = None
    weight_scale: bool | None = None
    kv_scale: bool | None = None
    norm: bool | None = None
    lwc: bool | None = None
    quant_max_scale_lr: Number | None = None


class WeightClipping(Section):
    """Learnable weight clipping."""

    enable_lwc: bool | None = None
    lwc_init_value: Number | None = None
    lwc_lr: Number | None = None


class SpecialQuantizer(Section):
    """One- and two-bit weight quantizers."""

    quant_method: str | None = None
    granularity: GrainName | None = None
    group_size: Int | None = None
    w_bits: Number | None = None
    M: Int | None = None  # sparse N:M patterns
    N: Int | None = None
    max_eps: Number | None = None
    seq_init: str | None = None  # ours: SEQ's option init, which no other quantizer reads
    options: dict[str, str | float | int | bool] | None = (
        None  # ours: any option of the quantizer, by its own name
    )


class TrainedQuant(Section):
    """What is quantized while training, and what of it is learned."""

    use_weight_quant: bool | None = None
    use_activation_quant: bool | None = None
    use_qkv_quant: bool | None = None
    fp8_attn: bool | None = None
    lazy_init_samples: Int | None = None
    group_size: Int | None = None
    weight_scale_init_value: Number | None = None
    activation_scale_init_value: Number | None = None
    weight_quantizer: str | None = None
    special: SpecialQuantizer | None = None
    learnable: Learnable | None = None
    lwc: WeightClipping | None = None
    weight: TensorQuant | None = None
    activation: TensorQuant | None = None
    q: TensorQuant | None = None
    k: TensorQuant | None = None
    v: TensorQuant | None = None


class Plugin(Section):
    """The quantization that training simulates."""

    enable_scale: bool | None = None
    enable_rotation: bool | None = None  # accepted; `transform` is what rotates here
    quant_config: TrainedQuant | None = None


class BlockWise(Section):
    """Training one decoder block at a time against the original block's output."""

    epochs: Int | None = None
    batch_size: Int | None = None
    train_size: Count | None = None  # calibration samples: decides dataset.num_samples
    val_size: Int | None = None
    training_seqlen: Count | None = None  # decides dataset.max_seq_length
    quant_lr: Number | None = None
    weight_lr: Number | None = None
    min_lr_factor: Number | None = None
    wd: Number | None = None


class Training(Section):
    """Keys common to quantization-aware training and distillation."""

    do_train: bool | None = None
    save_format: SaveFormat | None = None
    hf_args: TrainerArguments | None = None
    hf_dataset: str | None = None  # "owner/name" or "owner/name,configuration"
    hf_cache_dir: str | None = None
    loss_type: LossType | None = None
    loss_topk: Count | None = None
    kd_temperature: Positive | None = None
    kd_loss_weight: Amount | None = None
    lm_loss_weight: Amount | None = None
    hidden_loss_weight: Amount | None = None  # ours: of the squared error of hidden states
    teacher_logits: str | None = None  # ours: a folder of stored logits
    trainable_parameters: Literal["all", "quant", "scale", "norm"] | None = None
    resume_ckpt_dir: str | None = None


class Teacher(Training):
    """Keys of a run with a separate teacher model."""

    teacher_model_path: str | None = None
    teacher_torch_dtype: Dtype | None = None
    teacher_device_map: Word | dict[str, Any] | None = None
    teacher_low_cpu_mem_usage: bool | None = None
    teacher_trust_remote_code: bool | None = None
    teacher_use_cache: bool | None = None
    student_type: Literal["fp", "quantized"] | None = None


class QAT(Training):
    """Quantization-aware training; the original weights are the teacher."""

    training_mode: Literal["end2end", "blockwise"] | None = None
    dist_mode: Word | None = None
    from_ptq_ckpt: str | None = None
    kd_alpha: Number | None = None
    plugin_config: Plugin | None = None
    block_wise_config: BlockWise | None = None


class QAD(Teacher):
    """Quantization-aware distillation."""

    from_ptq_ckpt: str | None = None
    plugin_config: Plugin | None = None


class Distill(Teacher):
    """Distillation into a full-precision student."""


class Optimizer(Section):
    """The optimizer of a Megatron run."""

    lr: Number | None = None
    betas: list[Number] | None = None
    weight_decay: Number | None = None
    grad_clip: Number | None = None


class Parallel(Section):
    """How a Megatron run is spread over devices."""

    tensor_parallel: Int | None = None
    pipeline_parallel: Int | None = None
    context_parallel: Int | None = None
    expert_parallel: Int | None = None
    sequence_parallel: bool | None = None


class MCoreQAD(Section):
    """Quantization-aware distillation on Megatron checkpoints."""

    format: str | None = None
    checkpoint_path: str | None = None
    checkpoint_conversion_cpu: bool | None = None
    init_scales_path: str | None = None
    experts_only: bool | None = None
    distill_type: LossType | None = None
    distill_temperature: Number | None = None
    distill_topk: Int | None = None
    distill_weight: Number | None = None
    lm_weight: Number | None = None
    micro_batch_size: Int | None = None
    seq_len: Int | None = None
    train_iters: Int | None = None
    save_every: Int | None = None
    recompute: bool | None = None
    optim: Optimizer = Field(default_factory=Optimizer)
    parallel: Parallel = Field(default_factory=Parallel)
