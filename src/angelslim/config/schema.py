"""The main dialect: the sections ``global``, ``model``, ``compression``, ``dataset``, ``transform``, ``evaluation``.

Files of the public AngelSlim repository are accepted as they are. The other two dialects live in `pruning.py`
and `flat.py`; `CONFIGS` names all three and `dialect_of` recognises a file by its top-level keys. Optional
additions to the public keys are marked "ours".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .fields import Count, Int, Section, Share, Size, Word, Words
from .flat import FlatConfig
from .pruning import Compressor, ModelMapping
from .quantization import Quantization
from .sparsity import Sparsity
from .training import QAD, QAT, Distill, Dtype, MCoreQAD

Dialect = Literal["sections", "pruning", "flat"]
StageName = Literal["PTQ", "PTQWeightOnly", "QAT", "QAD", "Distill", "MCoreQAD", "Sparsity"]


class Global(Section):
    """Settings of the whole run."""

    save_path: str = "./output"
    deploy_backend: Literal["vllm", "sglang", "trtllm", "huggingface", "llamacpp", "edge"] | None = None
    # Ours.
    seed: Int = 0
    device: str | None = None  # None: the accelerator when there is one
    max_shard_size: Size = 5 * 10**9  # bytes of one output file
    activation_budget: Size = 8 * 10**9  # bytes of calibration activations in host memory before they spill


class Model(Section):
    """The model to compress. `model_path` may come from the command line."""

    name: str | None = None
    model_path: str | None = None
    trust_remote_code: bool = False
    torch_dtype: Dtype = "auto"
    device_map: Word | dict[str, Any] | None = None
    attn_implementation: str | None = None
    low_cpu_mem_usage: bool = True
    use_cache: bool = False
    cache_dir: str | None = None
    enable_expert_parallel: bool = False
    zero3: bool | None = None
    use_audio_in_video: bool | None = None


class Calibrate(Section):
    """Calibration that runs on a serving engine instead of in this process."""

    backend: Word | None = None
    distributed_executor_backend: Word | None = None
    max_num_seqs: Int | None = None
    skip_weight_loading: bool | None = None
    tp_size: Int | None = None
    verbose: bool | None = None


def _only_one(value: object) -> object:
    # The public tool also takes a list of names, and its older pages write ["PTQ"].
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class Compression(Section):
    """One stage of the run. `name` is inferred from the sections present when it is absent."""

    name: Annotated[StageName | None, BeforeValidator(_only_one)] = None
    quantization: Quantization | None = None
    sparsity: Sparsity | None = None
    calibrate: Calibrate | None = None
    qat: QAT | None = Field(default=None, alias="QAT")
    qad: QAD | None = Field(default=None, alias="QAD")
    distill: Distill | None = Field(default=None, alias="Distill")
    mcore_qad: MCoreQAD | None = Field(default=None, alias="MCoreQAD")

    @property
    def trains(self) -> bool:
        """Whether the stage trains the whole model at once."""
        trained = self.name == "QAT" or any(each is not None for each in (self.qat, self.qad, self.distill))
        return trained and not self.blockwise

    @property
    def blockwise(self) -> bool:
        """Whether the stage trains one block after another, which is a kind of post-training quantization."""
        section = self.qat if self.name in (None, "QAT") else None
        return section is not None and section.training_mode == "blockwise"


class Dataset(Section):
    """Calibration or training data; without `data_path` the built-in texts are used."""

    name: Literal["TextDataset", "MultiModalDataset", "AudioDataset", "OmniDataset"] = "TextDataset"
    data_path: str | None = None
    num_samples: Count = 128
    max_seq_length: Count = 2048
    batch_size: Count = 1
    is_sft_data: bool = False
    shuffle: bool = False
    share: Annotated[Share, Field(gt=0)] = (
        1.0  # ours: of the training rows; the same ones for every run of one seed
    )


class SpinConfig(Section):
    """Which rotations are applied, and of what kind."""

    rotation: Words = Field(default_factory=lambda: ["R1", "R2"])
    rotation_mode: Literal["Hadamard", "Orthogonal", "Random", "Identity"] = "Hadamard"
    had_dim: Int = -1  # channels of the residual stream that R1 mixes; -1: all of them
    seed: Int = 0  # ours: of random rotations
    ignore_layers: Words = Field(default_factory=list)


class Transform(Section):
    """A rewriting of the weights, exact in full precision, before they are quantized."""

    name: str | None = None
    output_log: bool = False
    spin_config: SpinConfig | None = None


class Evaluation(Section):
    """Ours: what is measured before and after. `perplexity` is true, false, or a text file."""

    enabled: bool = True
    perplexity: bool | str = True
    tasks: Words = Field(default_factory=list)
    samples: Count = 64


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list) else [value]


class Config(Section):
    """A file of the main dialect; `compression` is always a list, one entry a stage."""

    global_: Global = Field(default_factory=Global, alias="global")
    model: Model = Field(default_factory=Model)
    compression: Annotated[list[Compression], BeforeValidator(_one_or_many)] = Field(default_factory=list)
    dataset: Dataset = Field(default_factory=Dataset)
    transform: Transform | None = None
    evaluation: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _samples_of_blocks(self) -> Config:
        """Training by blocks says in its own section how many samples it reads, and of what length."""
        for stage in self.compression:
            words = stage.qat.block_wise_config if stage.blockwise and stage.qat else None
            if words is not None:
                asked = {"num_samples": words.train_size, "max_seq_length": words.training_seqlen}
                update = {key: value for key, value in asked.items() if value is not None}
                self.dataset = self.dataset.model_copy(update=update)
        return self


class PruningConfig(Section):
    """A file of the token pruning dialect. All but the first two sections are ours."""

    model_mapping: list[ModelMapping] = Field(default_factory=list)
    compressor: Compressor = Field(default_factory=Compressor)
    global_: Global = Field(default_factory=Global, alias="global")
    model: Model = Field(default_factory=Model)
    dataset: Dataset = Field(default_factory=Dataset)
    evaluation: Evaluation = Field(default_factory=Evaluation)


AnyConfig = Config | PruningConfig | FlatConfig
CONFIGS: dict[Dialect, type[Section]] = {"sections": Config, "pruning": PruningConfig, "flat": FlatConfig}


def names_of(section: type[Section]) -> dict[str, str]:
    """The keys of a section as files write them, each with its attribute's name."""
    return {field.alias or name: name for name, field in section.model_fields.items()}


def dialect_of(keys: Iterable[str]) -> Dialect | None:
    """Recognise a dialect by a file's top-level keys; None when no key is known."""
    given = set(keys)
    if given & {"model_mapping", "compressor"}:
        return "pruning"
    if given & set(names_of(Config)):
        return "sections"
    if given & set(names_of(FlatConfig)):
        return "flat"
    return None
