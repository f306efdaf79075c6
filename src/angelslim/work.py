"""Layer 6: carry out a job's units, block after block, each a checkpoint of the run. Knows no method's name.

A unit is a decoder block or a piece of what lies outside. Its block goes through the job's transforms and its method;
so does, where experts are streamed, one expert after another. What they hand in becomes checkpoint tensors at once,
in host memory, so that the device never holds the results of more than one block or expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .base import parallel
from .base.console import bar, chose
from .base.errors import DataError, ModelError
from .base.memory import trim
from .base.place import open_place
from .data.multimodal import Sample, multimodal_samples, processor_of
from .data.text import calibration_batches
from .export._checkpoint import QuantizedCheckpoint
from .job import Job, Unit
from .models.activations import ActivationStore
from .models.block import Block
from .models.checkpoint import UnitWriter, write_atomically
from .models.contest import ContestedLayer
from .models.experts import ExpertRunner, ExpertUse
from .models.select import Layer, groups_by_linear
from .models.structure import Group
from .models.towers import check_reached, outside_blocks
from .models.walk import BlockStream
from .numerics.error import LayerRecord
from .trial import Verdict, try_scales

TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Workplace:
    """The folders of an unfinished run."""

    root: Path  # OUT.partial

    @property
    def units(self) -> Path:
        """Finished units, one safetensors file each."""
        return self.root / "units"

    @property
    def records(self) -> Path:
        """What was done to the layers of each finished unit, as JSON."""
        return self.root / "records"

    @property
    def plain(self) -> Path:
        """What takes the place of contested results that lose their trial: tensors and records, files by unit."""
        return self.root / "plain"

    @property
    def activations(self) -> Path:
        """Hidden states between blocks, a folder for each process."""
        shared = self.root / "activations"
        return shared if parallel.world() == 1 else shared / f"process-{parallel.rank():03d}"

    @property
    def result(self) -> Path:
        """The folder that becomes the output."""
        return self.root / "result"

    def open(self, fingerprint: str) -> bool:
        """Create the folders, or continue an unfinished run; return whether one was continued."""
        resumed = open_place(
            self.root,
            fingerprint,
            "an unfinished run of another recipe or model",
            fix="Finish it with its own command, or delete that folder.",
        )
        for folder in (self.units, self.records, self.plain, self.activations, self.result):
            folder.mkdir(parents=True, exist_ok=True)
        return resumed


@dataclass
class Done:
    """What was done to the layers of a unit, or of all units."""

    layers: list[LayerRecord] = field(default_factory=list)
    experts: list[ExpertUse] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # not written yet
    plain: Done | None = None  # what would be different with the plain ones of contested results
    trial: Verdict | None = None  # how contested results did

    @classmethod
    def read(cls, file: Path) -> Done:
        """Read the records that `write` left."""
        raw = json.loads(file.read_text("utf-8"))
        layers = [LayerRecord.from_dict(each) for each in raw["layers"]]
        return cls(layers, [ExpertUse(**each) for each in raw["experts"]])

    def write(self, file: Path) -> None:
        """Write the records, not the tensors."""
        raw = {"layers": [asdict(each) for each in self.layers], "experts": [asdict(x) for x in self.experts]}
        write_atomically(file, json.dumps(raw).encode())


def compress_units(job: Job, workplace: Workplace) -> Done:
    """Quantize and write every unit that is not on disk yet; return the records of all."""
    writer = UnitWriter(workplace.units)
    groups = groups_by_linear(job.source)
    blocks = [unit for unit in job.units if unit.block is not None]
    outside = [unit for unit in job.units if unit.block is None]
    stream = _open_stream(job, workplace, writer, blocks) if job.calibrates else None
    with bar("quantizing", len(job.units)) as progress:
        for unit in [*blocks, *outside]:
            records = workplace.records / f"{unit.name}.json"
            # All look before the first process can write: what one skips and another does would never end.
            whole = writer.has(unit.name) and records.exists()
            if parallel.total_count(int(whole)) < parallel.world():
                done = _unit(job, unit, groups, stream)
                if parallel.first():
                    if done.plain is not None:
                        UnitWriter(workplace.plain).write(unit.name, done.plain.tensors)
                        done.plain.write(workplace.plain / records.name)
                    writer.write(unit.name, done.tensors)
                    done.write(records)
                del done
                if stream is not None and unit.block is not None:
                    stream.store.commit(unit.block + 1)
                    parallel.wait()
                    if parallel.first():
                        write_atomically(workplace.root / "next_block", str(unit.block + 1).encode())
                    parallel.wait()
                    stream.store.forget(unit.block)
            parallel.wait()
            trim()
            progress.advance()
    loaded = [Done.read(workplace.records / f"{unit.name}.json") for unit in job.units]
    done = Done([x for done in loaded for x in done.layers], [x for done in loaded for x in done.experts])
    return done if stream is None else _prove(job, workplace, done, stream)


def _prove(job: Job, workplace: Workplace, done: Done, stream: BlockStream) -> Done:
    """Let contested results prove themselves on the calibration samples; the plain ones take the place of losers."""
    files = [workplace.plain / f"{unit.name}.json" for unit in job.units]
    contested = {file.stem: Done.read(file) for file in files if file.exists()}
    if not contested:
        return done
    plain = {layer.name: layer for each in contested.values() for layer in each.layers}
    marker = workplace.root / "trial.json"
    if not marker.exists():  # its result outlives a kill: the units are changed only after it
        found = _try(job, workplace, {name: layer.input_scale for name, layer in plain.items()}, stream)
        if parallel.first():
            write_atomically(marker, json.dumps(asdict(found)).encode())
        parallel.wait()
    verdict = Verdict(**json.loads(marker.read_text("utf-8")))
    ratio = f"calibration KL {verdict.searched:.4g} against {verdict.plain:.4g} with the plain ones"
    chose("the searched input scales" if verdict.accepted else "plain input scales", ratio)
    if verdict.accepted:
        return replace(done, trial=verdict)
    writer = UnitWriter(workplace.units)
    for name in contested if parallel.first() else ():
        writer.write(name, load_file(writer.path(name)) | load_file(workplace.plain / f"{name}.safetensors"))
    return replace(done, layers=[plain.get(layer.name, layer) for layer in done.layers], trial=verdict)


def _try(job: Job, workplace: Workplace, plain: Mapping[str, float | None], stream: BlockStream) -> Verdict:
    settings = job.exporter.config({layer.name: layer.scheme for layer in job.selection.layers}, [])
    return try_scales(
        job.source,
        QuantizedCheckpoint(workplace.units, job.exporter, settings, torch.float32),
        {name: torch.tensor([[scale]]) for name, scale in plain.items() if scale is not None},
        stream.samples,
        workplace.activations / "trial",
        job.config.global_.activation_budget,
        job.device,
    )


def _unit(job: Job, unit: Unit, groups: Mapping[str, Group], stream: BlockStream | None) -> Done:
    """Quantize one unit; return the tensors to write and the records."""
    inside = set(unit.tensors)
    layers = tuple(layer for layer in job.layers if layer.tensor in inside)
    done = Done()
    if stream is None:
        block = Block(job.source, unit.block, layers, groups, job.device)
        job.method.process(block)
        _settle(job, block, _parameters(job), done)
    elif unit.block is None:
        with outside_blocks(job.source, layers, stream.samples, job.device) as parts:
            for part in parts:
                job.method.process(part)
                _settle(job, part, _parameters(job), done)
    else:
        _stream_block(job, unit.block, layers, groups, stream, done)
    written = {record.name for record in done.layers}
    rounded = layers if job.selection.layers else ()
    missing = [layer.name for layer in rounded if layer.name not in written]
    assert not missing, f"{job.stage.method} left out {missing[:3]}"
    quantized = {layer.tensor for layer in rounded}
    for name in unit.tensors:
        if name not in quantized and name not in done.tensors:
            done.tensors[name] = job.source.checkpoint.read(name)
    return done


def _stream_block(
    job: Job,
    index: int,
    layers: tuple[Layer, ...],
    groups: Mapping[str, Group],
    stream: BlockStream,
    done: Done,
) -> None:
    """Run one decoder block with its samples, then each of its streamed experts, then pass the outputs on."""
    with stream.resident(index) as runner:
        owned = {
            name: (tensors, tensors.module(name))
            for experts in stream.experts.values()
            for tensors in experts.tensors
            for name in tensors.names
        }
        own = tuple(layer for layer in layers if layer.tensor not in owned)
        streamed = tuple(layer for layer in layers if layer.tensor in owned)
        keeps = job.method.keeps_function and not stream.experts
        block = Block(
            job.source, index, own, groups, job.device, runner, streamed=streamed, keeps_outputs=keeps
        )
        _steps(job, block)
        _settle(job, block, _parameters(job), done)
        with bar(
            f"experts of block {index}", sum(len(x.tensors) for x in stream.experts.values())
        ) as progress:
            for experts in stream.experts.values():
                for tensors in experts.tensors:
                    names = {tensors.module(name): name for name in tensors.names}
                    chosen = [layer for layer in layers if layer.tensor in names.values()]
                    placed = tuple(replace(layer, module=tensors.module(layer.tensor)) for layer in chosen)
                    part = ExpertRunner(experts, tensors.index)
                    expert = Block(job.source, index, placed, part.groups, job.device, part)
                    if experts.scale is not None:
                        for name in map(tensors.module, tensors.first):
                            expert.changed[f"{name}.weight"] = expert.parameter(f"{name}.weight")
                    _steps(job, expert)
                    _settle(job, expert, {f"{path}.weight": name for path, name in names.items()}, done)
                    done.experts.append(part.use)
                    progress.advance()
        stream.finish(index)


def _steps(job: Job, block: Block) -> None:
    """Take a block through the transforms and the method."""
    for stage in (*job.transforms, job.method):
        block.expect(stage.statistics(block))
    for transform in job.transforms:
        transform.process(block)
    job.method.process(block)
    if not block.advanced:
        block.advance()


def _parameters(job: Job) -> dict[str, str]:
    """Return parameter -> checkpoint tensor, for parameters that are stored as they are."""
    return {
        target.parameter: tensor for tensor, target in job.source.targets.items() if target.pattern is None
    }


def _settle(job: Job, block: Block, stored: Mapping[str, str], done: Done) -> None:
    """Turn what a block handed in into checkpoint tensors in host memory."""
    for result in block.results:
        tensors = job.exporter.tensors(
            result.layer.name, result.weight, result.layer.scheme, result.input_scale
        )
        done.tensors |= {name: tensor.cpu() for name, tensor in tensors.items()}
        done.layers.append(result.record)
        if isinstance(result, ContestedLayer):
            plain = result.plain
            other = job.exporter.tensors(
                plain.layer.name, plain.weight, plain.layer.scheme, plain.input_scale
            )
            done.plain = done.plain or Done()
            done.plain.tensors |= {
                name: tensor.cpu() for name, tensor in other.items() if not _same(tensor, tensors[name])
            }
            done.plain.layers.append(plain.record)
    quantized = {result.layer.tensor for result in block.results}
    for parameter, value in block.changed.items():
        tensor = stored.get(parameter)
        if tensor is None:
            raise ModelError(
                f"{parameter!r} was changed, and the checkpoint stores it in another form.",
                fix="Leave out the transform for this model.",
            )
        if tensor not in quantized:
            done.tensors[tensor] = value.to("cpu", job.source.checkpoint.tensors[tensor].dtype)
    done.tensors |= {name: tensor.cpu() for name, tensor in block.extras.items()}
    block.results.clear()


def _same(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors of one type hold the same bytes; FP8 numbers cannot be compared as numbers."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def calibration_samples(job: Job) -> list[Sample]:
    """Return the calibration samples that the recipe asks for; ids beyond the vocabulary are a `DataError`."""
    data, seed = job.config.dataset, job.config.global_.seed
    if data.name == "TextDataset":
        texts = calibration_batches(
            tokenizer_of(job.source.folder),
            data.data_path,
            samples=data.num_samples,
            max_length=data.max_seq_length,
            seed=seed,
        )
        samples = [{"input_ids": ids} for ids in texts]
    else:
        samples = multimodal_samples(
            processor_of(job.source.folder),
            data.data_path,
            kind="audio" if data.name == "AudioDataset" else "image",
            samples=data.num_samples,
            max_length=data.max_seq_length,
            seed=seed,
        )
    if (
        max(int(sample["input_ids"].max()) for sample in samples)
        >= job.source.config.get_text_config().vocab_size
    ):
        raise DataError(
            "The tokenizer yields ids beyond the model's vocabulary.", fix="Use the model's own tokenizer."
        )
    if len(samples) < parallel.world():
        raise DataError(
            f"{len(samples)} samples cannot be shared among {parallel.world()} processes.",
            fix="Use more samples or fewer processes.",
        )
    return parallel.share(samples)


def _open_stream(job: Job, workplace: Workplace, writer: UnitWriter, blocks: list[Unit]) -> BlockStream:
    samples = calibration_samples(job)
    check_reached(job.source, job.layers, samples, job.device)
    store = ActivationStore(workplace.activations, job.config.global_.activation_budget)
    follow = job.follows_original
    stream = BlockStream(job.source, samples, store, job.device, follow_original=follow, keep_last=False)
    marker = workplace.root / "next_block"
    first = int(marker.read_text()) if marker.exists() else 0
    whole = stream.complete(first)
    if parallel.total_count(int(whole)) < parallel.world():
        first = 0
    parallel.wait()
    for unit in blocks:
        assert unit.block is not None
        if unit.block >= first and parallel.first():  # what lies beyond the last committed generation
            writer.path(unit.name).unlink(missing_ok=True)
    parallel.wait()
    stream.prepare(first)
    return stream


def has_tokenizer(folder: Path) -> bool:
    """Say whether a model folder holds the files of a tokenizer."""
    return any(file for pattern in TOKENIZERS for file in folder.glob(pattern))


def tokenizer_of(folder: Path) -> Any:
    """Load the tokenizer of a model folder; a missing one is a `ModelError`."""
    from transformers import AutoTokenizer

    fix = "Copy tokenizer.json and tokenizer_config.json of the model into the folder."
    if not has_tokenizer(folder):  # transformers would make an empty one up for some families
        raise ModelError(f"{folder} has no usable tokenizer (no file of one).", fix=fix)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ModelError(f"{folder} has no usable tokenizer ({reason}).", fix=fix) from error
