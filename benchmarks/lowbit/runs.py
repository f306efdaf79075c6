"""Carry out one run of the study and return its row."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from angelslim.base.errors import ConfigError
from angelslim.methods.base import QAT
from angelslim.methods.qat.base import attach, merge, quantizers, round_inputs
from angelslim.numerics.lowbit.record import LowBit
from angelslim.numerics.quantize import Quantized
from angelslim.teacher.live import frozen_copy
from angelslim.teacher.objective import objective
from angelslim.train import StepRecord, TrainSettings, train

from .board import Board
from .corpus import Batches, Corpus
from .mechanisms import Watch, bias_sizes
from .model import bits_per_byte, build, nats, open_base, save
from .study import CE, DENSE, METHODS, Method, Run, Study, best_rate, final_name

BASE_RATE = 1e-3
BASE_SEED = 1000  # of the order of the batches before any quantization
WARMUP = 0.05  # share of the steps
CODE_BITS = {"minmax": 1.585, "absmean": 1.585, "twn": 1.585, "tequila": 1.585, "sherry": 1.25}
ROOM = 8e9  # bytes of a memory disk that are worth using
CALIBRATION = 128  # rows for GPTQ, from the train split


@dataclass
class Bench:
    """What every run of a process shares."""

    study: Study
    corpus: Corpus
    board: Board
    device: str
    compile: bool = False

    @property
    def base(self) -> Path:
        """The model that all quantized ones start from, in bfloat16."""
        return self.board.folder / "base"

    @property
    def bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16; a processor is slower with it."""
        return self.device == "cuda"


def perform(bench: Bench, run: Run) -> dict[str, Any]:
    """Carry out one run; a loss that diverges is a row without scores."""
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work = {"base": _base, "plain": _plain, "ptq": _post_training}.get(run.kind, _trained)
    row = {"name": run.name, "kind": run.kind, "method": run.method, "seed": run.seed, "steps": run.steps}
    row |= {"corpus": bench.corpus.hash, **work(bench, run)}
    row.setdefault("base", base_name(bench))
    row["seconds"] = round(time.perf_counter() - started, 2)
    if bench.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def base_name(bench: Bench) -> str | None:
    """Name the base that is there by a hash of its weights."""
    path = bench.base / "model.safetensors"
    return hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest() if path.is_file() else None


def _scores(bench: Bench, model: Any, test: bool = True) -> dict[str, float]:
    """Return the losses of dev and test; one that is not finite is left out."""
    found = {"dev": nats(model, bench.corpus.dev)}
    if test:
        found["test"] = nats(model, bench.corpus.test)
        found["bits_per_byte"] = bits_per_byte(found["test"], bench.corpus.bytes_per_token)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _settings(bench: Bench, steps: int, rate: float, seed: int, checkpoint_every: int) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        lr=rate,
        warmup=round(steps * WARMUP),
        schedule="cosine",
        bf16=bench.bf16,
        seed=seed,
        checkpoint_every=checkpoint_every,
        compile=bench.compile,
    )


def _speed(bench: Bench, records: list[StepRecord]) -> dict[str, Any]:
    """Tokens a second of the whole training and its loss at some steps; other runs may share the machine."""
    seconds = sum(record.seconds for record in records)
    every = max(-(-len(records) // 12), 1)
    tokens = len(records) * bench.study.rows * bench.study.length
    return {
        "tokens_per_second": round(tokens / max(seconds, 1e-9)),
        "losses": [[record.step, round(record.loss, 4)] for record in records[::every]],
    }


def _base(bench: Bench, run: Run) -> dict[str, Any]:
    """Train the full-precision model that all others start from, and round it to bfloat16."""
    study, folder = bench.study, bench.board.folder / "training-base"
    model = build(study.shape, study.length, seed=0).to(bench.device)
    batches = Batches(bench.corpus.train, study.rows, BASE_SEED)
    settings = _settings(bench, run.steps, BASE_RATE, 0, checkpoint_every=500)
    records = train(model, batches, objective(None, CE), settings, folder, device=bench.device, title="base")
    save(model, bench.base, bench.board.folder / "data")
    shutil.rmtree(folder, ignore_errors=True)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    scores = _scores(bench, open_base(bench.base, bench.device))
    return {"rate": BASE_RATE, "parameters": parameters, **_speed(bench, records), **scores}


def quantize(model: Any, method: Method) -> None:
    """Attach the method's quantizer to every linear of the blocks; embeddings and head stay as they are."""
    if method.quantizer is None:
        return
    quantizer = QAT.get(method.quantizer)(method.options)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            attach(module, quantizer, name)


def bits_per_weight(method: Method, model: Any) -> float:
    """Return bits of codes, 16-bit scales and the bias for each quantized weight; 16 where nothing is quantized.

    Ternary codes count their entropy, log2 3; files take 1.67 to 2 bits for them.
    """
    if method.quantizer is None:
        return 16.0
    ternary = method.options.get("bits") == "ternary"
    each = CODE_BITS.get(method.quantizer, 1.585 if ternary else 2.0)
    weights = stored = 0.0
    for _, linear, quantizer in quantizers(model):
        kind = quantizer.granularity.kind
        rows, columns = linear.out_features, linear.in_features
        per_row = columns / quantizer.group(linear.weight)
        scales = 1 if kind == "tensor" else rows * per_row
        bias = 16 * rows if method.family == "tequila" else 0
        weights += rows * columns
        stored += rows * columns * each + 16 * scales + bias
    return stored / weights


def _trained(bench: Bench, run: Run) -> dict[str, Any]:
    """Train one method (or the smaller dense model), merge, and score what would be exported."""
    study, dense = bench.study, run.method == DENSE
    method = METHODS["fp"] if dense else METHODS[run.method]
    rate = run.rate or best_rate(run.method, bench.board.row)
    model = build(study.dense, study.length, run.seed) if dense else open_base(bench.base, bench.device)
    model.to(bench.device)
    teacher = None if method.loss.kind == "lm" else frozen_copy(model)
    quantize(model, method)
    bits = bits_per_weight(method, model)
    watch = Watch(model, bench.corpus.train, bench.bf16, looking=run.kind == "final")
    settings = _settings(bench, run.steps, rate, run.seed, checkpoint_every=run.steps)
    folder = _scratch(bench, run)
    try:
        records = train(
            model,
            Batches(bench.corpus.train, study.rows, run.seed),
            objective(teacher, method.loss),
            settings,
            folder,
            on_step=watch,
            device=bench.device,
            title=run.name,
        )
    except ConfigError as error:
        if "loss is" not in error.what:
            raise
        return {"rate": rate, "diverged": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    looks = watch.finish(run.steps)
    merged = merge(model)
    if method.options.get("activations") == "int8":
        for name in merged:
            round_inputs(model.get_submodule(name))
    row = {"rate": rate, "bits": bits, **_speed(bench, records)}
    row |= _scores(bench, model, test=run.kind != "trial")
    if run.kind == "final":
        row |= {"looks": looks, **_without_bias(bench, model, merged)}
        if run.method == "fp":
            _keep(bench, run, model)
    return row


def _scratch(bench: Bench, run: Run) -> Path:
    """Return a folder for the checkpoint of a run that is too short to resume: in memory where that is possible."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    root = memory if roomy and bench.device == "cuda" else bench.board.folder
    folder = root / f"angelslim-lowbit-{run.name}"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _without_bias(bench: Bench, model: Any, merged: Mapping[str, LowBit | Quantized]) -> dict[str, Any]:
    """Say how large the merged biases are, and what the model scores without them."""
    if not any(isinstance(record, LowBit) and record.bias is not None for record in merged.values()):
        return {}
    sizes = bias_sizes(model, bench.corpus.train)
    for name in merged:
        model.get_submodule(name).bias = None
    return {"bias": sizes, "without_bias": _scores(bench, model)}


def _keep(bench: Bench, run: Run, model: Any) -> None:
    """Keep the weights of a run in bfloat16, for what follows from it."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
    path = bench.board.folder / "weights" / f"{run.name}.safetensors"
    save_file(tensors, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def _plain(bench: Bench, run: Run) -> dict[str, Any]:
    """Round without training."""
    model = open_base(bench.base, bench.device)
    quantize(model, METHODS[run.method])
    bits = bits_per_weight(METHODS[run.method], model)
    merge(model)
    return {"bits": bits, **_scores(bench, model)}


def _post_training(bench: Bench, run: Run) -> dict[str, Any]:
    """Compress with the package's own recipe, in a folder, and score what its files hold.

    Of the base, or of the full-precision model that was trained on for as long as the quantized ones.
    """
    import angelslim

    scratch = bench.board.folder / f"{run.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source = bench.base
    if run.needs != ("base",):
        model = open_base(bench.base, "cpu")
        kept = load_file(bench.board.folder / "weights" / f"{final_name('fp', run.seed)}.safetensors")
        missing = model.load_state_dict({name: t.float() for name, t in kept.items()}, strict=False)
        assert not missing.unexpected_keys, missing
        source = scratch / "model"
        save(model, source, bench.board.folder / "data")
    generator = torch.Generator().manual_seed(run.seed)
    chosen = torch.randperm(len(bench.corpus.train), generator=generator)[:CALIBRATION]
    rows = bench.corpus.train[chosen.to(bench.corpus.train.device)].cpu()
    save_file({"input_ids": rows.long()}, scratch / "ids.safetensors")
    result = angelslim.compress(
        source,
        run.method,
        out=scratch / "out",
        global__device=bench.device,
        global__seed=run.seed,
        dataset__data_path=str(scratch / "ids.safetensors"),
        dataset__num_samples=len(rows),
        dataset__max_seq_length=bench.study.length,
        evaluation__enabled=False,
    )
    model = angelslim.load(scratch / "out", device=bench.device).float()
    row = {"bits": result.report.bits_per_weight, **_scores(bench, model)}
    shutil.rmtree(scratch, ignore_errors=True)
    return row
