"""Layer 9: the Python face: `compress` for one call, `Engine` for scripts written step by step.

Both lead to the same pipeline as the command line: a recipe is resolved, a job prepared and run.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import pipeline
from .base import parallel
from .base.errors import ConfigError, UserError
from .config.recipe import Resolved
from .config.recipe import load as load_recipe
from .config.schema import Config
from .job import Job, prepare
from .models.checkpoint import write_atomically
from .reopen import load
from .report.record import RunRecord

if TYPE_CHECKING:
    from .prefill.job import PrefillJob
    from .report.prefill import PrefillRecord
    from .training.job import TrainingJob

AnyJob: TypeAlias = "Job | TrainingJob | PrefillJob"
AnyRecord: TypeAlias = "RunRecord | PrefillRecord"


class Result:
    """A finished compression: its record and its folder."""

    def __init__(self, folder: Path, report: Any) -> None:
        self.folder, self.report = folder, report  # a RunRecord, or the PrefillRecord of sparse attention

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the model folder, report and card included; an existing folder is refused."""
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} already exists and is not empty.", fix="Choose another folder.")
        temporary = target.with_name(target.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.folder, temporary)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
        return target

    def load(self, **options: Any) -> Any:
        """Open the compressed model in transformers (see `angelslim.load`); one with sparse attention has it attached."""
        if isinstance(self.report, RunRecord):
            return load(self.folder, **options)
        from .methods.sparse.using import sparse_attention

        model = load(self.report.model, **options)
        sparse_attention(model, self.folder)
        return model

    def __repr__(self) -> str:
        report = self.report
        if not isinstance(report, RunRecord):
            return f"<{report.method} of {report.model}: sparse from {report.crossover} tokens on, {self.folder}>"
        return f"<{report.method} of {report.model}: {report.bits_per_weight:.2f} bits per weight, {self.folder}>"


def compress(
    model: Any,
    recipe: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    tokenizer: Any = None,
    **overrides: Any,
) -> Result:
    """Compress a model (folder, hub id, built-in name or transformers model) with a recipe or method name.

    Overrides are configuration keys with dots written as double underscores (``dataset__num_samples=64``), or
    dotted keys in a mapping (``**{"dataset.num_samples": 64}``). Without `out` the result lies in a temporary
    folder until `Result.save_pretrained`. A loaded model needs its `tokenizer` when the recipe calibrates.
    """
    settings = [f"{key.replace('__', '.')}={_yaml(value)}" for key, value in overrides.items()]
    resolved = load_recipe(recipe, settings)
    folder = _temporary_folder() / "result" if out is None else Path(out)
    job = prepare_any(resolved, _as_folder(model, tokenizer))
    call = ", ".join(
        [repr(str(model)[:80]), repr(str(recipe)), *(f"{k}={v!r}" for k, v in overrides.items())]
    )
    return Result(folder, carry_out(job, folder, command=f"angelslim.compress({call})"))


def prepare_any(resolved: Resolved, model: str | Path | None = None) -> AnyJob:
    """Make every choice of a run, also of one that trains, or one that makes attention sparse."""
    if isinstance(resolved.config, Config) and any(each.sparsity for each in resolved.config.compression):
        from .prefill.job import prepare_prefill

        return prepare_prefill(resolved, model)
    if isinstance(resolved.config, Config) and any(each.trains for each in resolved.config.compression):
        from .training.job import prepare_training

        return prepare_training(resolved, model)
    return prepare(resolved, model)


def carry_out(job: AnyJob, out: Path, *, command: str = "", overwrite: bool = False) -> AnyRecord:
    """Run a job, and where its recipe says `quant_analyse`, look at every layer of the result afterwards.

    The analysis is that of `angelslim analyze MODEL OUT`, in `out`: ``analysis.json``, ``.csv`` and ``.html``.
    """
    from .prefill.job import PrefillJob

    if isinstance(job, PrefillJob):
        from .prefill.run import run as measure

        return measure(job, out, command=command, overwrite=overwrite)
    if isinstance(job, Job):
        record = pipeline.run(job, out, command=command, overwrite=overwrite)
    else:
        from .training.run import run

        record = run(job, out, command=command, overwrite=overwrite)
    asked = any(each.quantization and each.quantization.quant_analyse for each in job.config.compression)
    if asked and parallel.first() and not (out / "analysis.html").exists():
        from .analyze import weights
        from .analyze.files import analysis_files

        plain = not job.source.checkpoint.decoded
        found = weights.analyze(job.source.name, str(out)) if plain else weights.analyze(str(out))
        for name, text in analysis_files(found).items():
            write_atomically(out / name, text.encode())
    return record


def _as_folder(model: Any, tokenizer: Any) -> str | Path:
    if isinstance(model, (str, Path)):
        return model
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(
            f"A {type(model).__name__} cannot be compressed.", fix="Give a folder or a transformers model."
        )
    folder = _temporary_folder()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="angelslim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


class Engine:
    """The step-by-step interface: prepare a model, data and a compressor, run, save.

    Arguments that only tune memory in other implementations (`device_map`, `low_cpu_mem_usage`, ...) are
    accepted and have no effect: models are always streamed block by block. The model's family is read from its
    config.json, so `model_name` is optional. `trust_remote_code` is false unless given.
    """

    def __init__(self) -> None:
        self._model: str | Path | None = None
        self._sections: dict[str, dict[str, Any]] = {"model": {}, "dataset": {}}
        self._recipe: str | Path | Mapping[str, Any] | None = None
        self._job: AnyJob | None = None
        self.result: Result | None = None

    def prepare_model(
        self,
        model_name: str | None = None,
        model: Any = None,
        tokenizer: Any = None,
        model_path: str | Path | None = None,
        trust_remote_code: bool = False,
        **_memory_options: Any,
    ) -> Engine:
        """Name the model by path, or hand in a loaded one with its tokenizer."""
        given = model if model is not None else model_path
        if given is None:
            raise ConfigError("prepare_model needs model_path or model.")
        self._model = _as_folder(given, tokenizer)
        self._sections["model"] = {"trust_remote_code": trust_remote_code}
        return self

    def prepare_data(
        self,
        data_path: str | Path | None = None,
        data_type: str = "TextDataset",
        max_length: int = 2048,
        batch_size: int = 1,
        num_samples: int = 128,
        shuffle: bool = True,
        **_loader_options: Any,
    ) -> Engine:
        """Name the calibration data; without a path the built-in samples are used."""
        self._sections["dataset"] = {
            "name": data_type,
            "data_path": None if data_path is None else str(data_path),
            "max_seq_length": max_length,
            "num_samples": num_samples,
            "batch_size": batch_size,
        }
        return self

    def prepare_compressor(
        self,
        compress_name: str = "PTQ",
        global_config: Mapping[str, Any] | None = None,
        compress_config: Mapping[str, Any] | None = None,
        default_method: str | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> Engine:
        """Choose a method by name, or give the ``compression`` section as a mapping.

        `evaluation` is the section of that name: ``{"enabled": False}`` measures nothing.
        """
        if self._model is None:
            raise ConfigError("prepare_compressor comes after prepare_model.")
        if default_method is not None:
            base: dict[str, Any] = {"extends": default_method}
        elif compress_config is not None:
            base = {
                "compression": {"name": compress_name, **compress_config},
                "global": dict(global_config or {}),
            }
        else:
            raise ConfigError("prepare_compressor needs default_method or compress_config.")
        given = {**self._sections, "evaluation": dict(evaluation or {})}
        sections = {name: values for name, values in given.items() if values}
        self._job = prepare_any(load_recipe({**base, **sections}), self._model)
        return self

    def run(self) -> Result:
        """Compress into a temporary folder."""
        if self._job is None:
            raise ConfigError("run comes after prepare_compressor.")
        folder = _temporary_folder() / "result"
        self.result = Result(folder, carry_out(self._job, folder, command="angelslim.Engine"))
        return self.result

    def save(self, save_path: str | Path | None = None, config: Any = None) -> Path:
        """Write the compressed model folder; `config` is accepted for old scripts (run.yaml holds it already)."""
        if self.result is None:
            raise ConfigError("save comes after run.")
        return self.result.save_pretrained(save_path or "./output")
