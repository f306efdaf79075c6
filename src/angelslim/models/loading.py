"""Open a model folder without loading it: configuration, lazy weights, an empty model to fill block by block.

`open_model` builds the network with parameters on the meta device (no memory) but real buffers (rotary
tables), maps every checkpoint tensor to the parameter it feeds, and hands out a `Source` from which single
modules are materialised and freed again. transformers' own conversion rules do the mapping, so renamed and
fused layouts (per-expert matrices stacked into one parameter) need no code here.
"""

from __future__ import annotations

import json
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import ModelError, did_you_mean
from .builtin import BUILTIN, builtin_model
from .checkpoint import Checkpoint
from .families import shipped
from .outline import Outline, Target, behind, file_of, remember, remembered, shortcut_of, shorten
from .rules import with_experts
from .structure import PROBE, Structure, discover, find_blocks, register_probe


@dataclass
class Source:
    """An opened model: nothing is in memory until a module is materialised.

    The network is built when it is first asked for. What an earlier run found out about it (`outline`) may make that
    unnecessary.
    """

    name: str  # as the user named it
    folder: Path
    given: Any  # the configuration; None where it is read when it is first asked for
    checkpoint: Checkpoint
    edits: dict[str, Any] = field(default_factory=dict)  # what a rewrite changed in config.json
    outline: Outline | None = None
    shortcut: Path | None = None  # where the next `open_model` looks for the outline

    @cached_property
    def config(self) -> Any:
        """The configuration as transformers reads it."""
        if self.given is not None:
            return self.given
        found = load_config(self.folder)
        if getattr(found, "quantization_config", None) is not None:
            del found.quantization_config  # the checkpoint is decoded as it is read
        return found

    @cached_property
    def model(self) -> Any:
        """The transformers model, parameters on the meta device."""
        return meta_model(self.config)

    @cached_property
    def structure(self) -> Structure:
        """The model's blocks, groups, experts and towers."""
        return self.outline.structure if self.outline else discover(probe_model(self.config))

    @cached_property
    def targets(self) -> dict[str, Target]:
        """Checkpoint tensor -> the parameter that it feeds, in the checkpoint's order."""
        if self.outline is None:
            return self._mapping[0]
        known = self.outline.targets
        return {tensor: known[tensor] for tensor in self.checkpoint.tensors if tensor in known}

    @property
    def rules(self) -> dict[str, Any]:
        """Conversion pattern -> transformers' rule."""
        return self._mapping[1]

    @cached_property
    def _mapping(self) -> tuple[dict[str, Target], dict[str, Any]]:
        return map_tensors(self.model, self.checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in."""
        if self.given is None:
            return raw_dtype(raw_config(self.folder))
        return torch_dtype(self.config)

    @cached_property
    def tensors_of(self) -> dict[str, list[str]]:
        """Parameter -> the checkpoint tensors that feed it, in natural order."""
        from transformers.core_model_loading import dot_natural_key

        feeds: dict[str, list[str]] = {}
        for tensor in sorted(self.targets, key=dot_natural_key):
            feeds.setdefault(self.targets[tensor].parameter, []).append(tensor)
        return feeds

    def check(self) -> None:
        """Refuse a checkpoint that does not fit config.json: other shapes, or blocks without weights.

        One that passed is remembered.
        """
        if self.outline is not None:
            return
        file = file_of(self.config, self.checkpoint)
        self.outline = remembered(file)
        if self.outline is not None:
            shorten(self.shortcut, file)
            return
        for tensor, target in self.targets.items():
            if target.pattern is None:
                self._check_shape(target.parameter, self.checkpoint.tensors[tensor].shape)
        for block in find_blocks(self.model)[1]:
            for name, _ in self.model.get_submodule(block).named_parameters(prefix=block):
                if name not in self.tensors_of and self._tied(name) == name:
                    raise self._absent(name)
        remember(file, Outline(self.structure, self.targets))
        shorten(self.shortcut, file)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        path, _, leaf = name.rpartition(".")
        expected = getattr(self.model.get_submodule(path), leaf).shape
        if tuple(shape) != tuple(expected):
            raise ModelError(
                f"{self.folder}: {name!r} has shape {list(shape)}, config.json asks for {list(expected)}.",
                fix="Use the config.json that belongs to these weights.",
            )

    def _absent(self, name: str) -> ModelError:
        return ModelError(
            f"{self.folder} holds no weights for {name!r}.",
            fix="The checkpoint and config.json do not belong together, or a shard is missing.",
        )

    def parameter(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read what a parameter needs; a conversion may fill several parameters at once."""
        tensors = self.tensors_of.get(name)
        if not tensors:
            raise self._absent(name)
        pattern = self.targets[tensors[0]].pattern
        if pattern is None:
            return {name: self.checkpoint.read(tensors[0], device)}
        rule = deepcopy(self.rules[pattern])
        for tensor in tensors:
            source_pattern = self.targets[tensor].pattern
            rule.add_tensor(name, tensor, source_pattern, self.checkpoint.read(tensor))
        filled = rule.convert(name, model=self.model, config=self.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in filled.items()}

    def materialize(self, path: str, device: torch.device, leave: frozenset[str] = frozenset()) -> nn.Module:
        """Fill the parameters and the stored buffers of the module at `path` from disk; returns the module.

        Modules whose paths are in `leave` stay empty.
        """
        module: nn.Module = self.model.get_submodule(path)
        prefix = f"{path}." if path else ""
        pending = {prefix + name for name, value in module.named_parameters() if value.is_meta}
        pending |= {prefix + name for name, _ in module.named_buffers()} & self.tensors_of.keys()
        pending = {name for name in pending if name.rpartition(".")[0] not in leave}
        while pending:
            name = min(pending)
            filled = self.parameter(self._tied(name), device)
            if self._tied(name) != name:
                filled = {name: next(iter(filled.values()))}
            for key, value in filled.items():
                self._fill(key, value.to(device))
                pending.discard(key)
        for child in module.modules():
            for leaf, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    child._buffers[leaf] = buffer.to(device)
        return module

    def _tied(self, name: str) -> str:
        if name in self.tensors_of or not getattr(self.config, "tie_word_embeddings", False):
            return name
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        return tied.get(name, name)

    def _fill(self, name: str, value: Tensor) -> None:
        self._check_shape(name, value.shape)
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value  # small, and stored in the type that routing needs
        else:  # families that keep routers in float32 declare it
            kept = value.to(getattr(module, leaf).dtype)
            module._parameters[leaf] = nn.Parameter(kept, requires_grad=False)

    def free(self, path: str) -> None:
        """Return the parameters below `path` to the meta device."""
        module = self.model.get_submodule(path)
        for child in module.modules():
            for leaf, value in child._parameters.items():
                if value is not None and not value.is_meta:
                    empty = torch.empty_like(value, device="meta")
                    child._parameters[leaf] = nn.Parameter(empty, requires_grad=False)


def torch_dtype(config: Any) -> torch.dtype:
    """The type that config.json declares for the weights; float32 when it declares none."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def resolve(reference: str | Path) -> Path:
    """Return the folder of a built-in name, a path, or a hub id that is already in the local cache."""
    name = str(reference)
    if name in BUILTIN:
        return builtin_model(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{folder} has no config.json.", fix="Point to a complete Hugging Face model folder."
            )
        return folder
    if folder.is_file():
        fix = "Give the folder that holds config.json and the weights."
        if folder.suffix == ".gguf":
            fix = f"Make a folder of it: angelslim export {name} --format compressed_tensors --out FOLDER"
        raise ModelError(f"{folder} is a file.", fix=fix)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    raise ModelError(
        f"No model {name!r}: neither a folder nor a built-in name.", fix=did_you_mean(name, BUILTIN)
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # hub errors derive from these: offline, unknown id, bad name
        raise ModelError(
            f"No folder {name!r} here, and the hub could not provide a model of that name ({type(error).__name__}).",
            fix="Check the path, or download the model first.",
        ) from error


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Read config.json through transformers; an unknown architecture is a `ModelError`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        if not raw_config(folder):
            text, fix = "it is no JSON mapping", "Copy it again."
        elif "trust_remote_code" in text:
            fix = "It brings its own code. If you trust it, set model.trust_remote_code=true."
        else:
            model_type = str(raw_config(folder).get("model_type", ""))
            fix = did_you_mean(model_type, CONFIG_MAPPING_NAMES) if len(model_type) > 3 else ""
            fix = fix if fix.startswith("Did") else "Update transformers, or check config.json."
            text = f"model_type {model_type!r}" if model_type not in CONFIG_MAPPING_NAMES else text
        raise ModelError(f"{folder / 'config.json'} cannot be used: {text[:200]}.", fix=fix) from error


def raw_config(folder: Path) -> dict[str, Any]:
    """Return config.json as it is; nothing where it cannot be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "config.json").read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def raw_dtype(settings: dict[str, Any]) -> torch.dtype:
    """Return what `torch_dtype` returns."""
    for each in (settings, settings.get("text_config") or {}):
        named = getattr(torch, str(each.get("dtype") or each.get("torch_dtype")), None)
        if isinstance(named, torch.dtype):
            return named
    return torch.float32


def model_class(config: Any) -> Any:
    """Return the transformers class of a configuration: the one it names, else its auto class."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for table in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ):
        if type(config) in table:
            return table[type(config)]
    raise ModelError(
        f"The architecture {config.model_type!r} has no generative class in this transformers.",
        fix="Update transformers, or check `architectures` in config.json.",
    )


def meta_model(config: Any, *, buffers: bool = True) -> Any:
    """Build the network with parameters on the meta device; `buffers` are real when asked for."""
    from accelerate import init_empty_weights

    config = deepcopy(config)
    build = model_class(config)
    try:
        with init_empty_weights(include_buffers=not buffers):
            return build._from_config(config, dtype=torch_dtype(config)).eval()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"No {build.__name__} can be built from config.json ({type(error).__name__}: {error}).",
            fix="Use the config.json that belongs to these weights.",
        ) from error


def probe_model(config: Any) -> Any:
    """Build the network wholly on the meta device, with the attention that only knows shapes."""
    register_probe()
    config = deepcopy(config)
    options = {"attn_implementation": PROBE, "experts_implementation": "batched_mm"}
    with torch.device("meta"):
        try:
            return model_class(config)._from_config(config, **options).eval()
        except ValueError:  # a family without switchable experts
            return model_class(config)._from_config(config, attn_implementation=PROBE).eval()


def open_model(reference: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Open a model by folder, hub id or built-in name; reads headers only."""
    folder = resolve(reference)
    settings = raw_config(folder)
    checkpoint = None
    if settings and not settings.get("quantization_config") and list(folder.glob("*.safetensors")):
        checkpoint = Checkpoint(folder)
        known = open_remembered(str(reference), folder, settings, checkpoint)
        if known is not None:
            return known
    config = load_config(folder, trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ModelError(
            f"{folder} is already quantized ({method}).", fix="Start from the full-precision model instead."
        )
    return open_plain(str(reference), folder, config, checkpoint or Checkpoint(folder))


def open_remembered(
    name: str, folder: Path, settings: dict[str, Any], checkpoint: Checkpoint
) -> Source | None:
    """Open a model without transformers: it was opened before, or its family is known; None if neither.

    `settings` are config.json as it is, without what it says of quantization.
    """
    outline = shipped(settings, checkpoint) or remembered(behind(shortcut_of(settings, checkpoint)))
    return None if outline is None else Source(name, folder, None, checkpoint, outline=outline)


def open_plain(name: str, folder: Path, config: Any, checkpoint: Checkpoint) -> Source:
    """Open a model in full precision; once it is checked, `open_remembered` will know it."""
    return Source(name, folder, config, checkpoint, shortcut=shortcut_of(raw_config(folder), checkpoint))


def open_with(name: str, folder: Path, config: Any, checkpoint: Checkpoint) -> Source:
    """Open a model from a configuration and a checkpoint that is already open."""
    return Source(name, folder, config, checkpoint)


def map_tensors(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, Target], dict[str, Any]]:
    """Return each checkpoint tensor's parameter, and transformers' conversion rules by pattern."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = with_experts(model, get_model_conversion_mapping(model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    targets: dict[str, Target] = {}
    parameters = model.state_dict()
    for tensor in checkpoint.tensors:
        renamed, pattern = rename_source_key(
            tensor, renamings, converters, model.base_model_prefix, parameters
        )
        if renamed not in parameters and tensor in parameters:
            renamed, pattern = tensor, None
        if renamed in parameters:
            targets[tensor] = Target(renamed, pattern)
    return targets, {pattern: rule for rule in converters for pattern in rule.source_patterns}
