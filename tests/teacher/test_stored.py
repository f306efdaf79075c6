"""Stored logits: the same losses as the live teacher, resumable, and refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from angelslim.base.errors import ConfigError, DataError
from angelslim.numerics.distillation import Distillation
from angelslim.teacher.live import Lesson, ModelTeacher
from angelslim.teacher.objective import objective
from angelslim.teacher.stored import MANIFEST, StoredTeacher, read_manifest, write_teacher
from angelslim.teacher.vocabulary import Vocabulary, vocabulary_of
from angelslim.train import TrainSettings, train
from tiny import byte_tokenizer, qwen3

SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
WORDS = vocabulary_of(byte_tokenizer(), "student")  # 259 of the 272 rows that the models have


def batch_at(index: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(index)
    tokens = torch.randint(WORDS.size, (2, 9), generator=make)
    return {"input_ids": tokens, "labels": torch.where(torch.rand(2, 9, generator=make) < 0.3, -100, tokens)}


def teacher() -> ModelTeacher:
    return ModelTeacher(qwen3(seed=5, initializer_range=0.3, **SMALL), words=WORDS.size)


def write(folder: Path, k: int = 8, batches: int = 7, given: Any = None, **changes: Any) -> StoredTeacher:
    settings = {"model": "big", "vocabulary": WORDS, "data": "abc", "batches_a_shard": 3, **changes}
    write_teacher(folder, given or teacher(), batch_at, batches=batches, k=k, **settings)
    return StoredTeacher(folder, WORDS, seed=1)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_batches_come_back_each_once_a_pass_by_number(tmp_path: Path) -> None:
    stored = write(tmp_path)
    names = {batch_at(i)["input_ids"].sum().item(): i for i in range(7)}
    passes = [
        [names[stored.batch_at(i + 7 * turn)["input_ids"].sum().item()] for i in range(7)] for turn in (0, 1)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(7)) and passes[0] != passes[1]
    for place, number in enumerate(passes[0]):
        batch, expected = stored.batch_at(place), batch_at(number)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["labels"], expected["labels"])


@pytest.mark.parametrize("kind", ["kl", "rkl", "kd", "cakld", "kl_top", "mse"])
def test_the_whole_vocabulary_stored_gives_the_live_loss(kind: Any, tmp_path: Path) -> None:
    live, stored, student = teacher(), write(tmp_path, k=10_000, batches=2), qwen3(**SMALL)
    how = Distillation(kind, lm_weight=0.5, temperature=2.0, top_k=20)
    for index in (0, 1):
        batch = stored.batch_at(index)
        one, two = (objective(source, how)(student, batch) for source in (live, stored))
        assert two["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-3)  # float16
        assert two["ce"].item() == one["ce"].item()


def test_few_words_are_a_lower_bound_that_rises_with_k(tmp_path: Path) -> None:
    student, found = qwen3(**SMALL), []
    for k in (1, 8, 64):
        stored = write(tmp_path / str(k), k=k, batches=1)
        found.append(objective(stored, Distillation("kl"))(student, stored.batch_at(0))["loss"].item())
    live = objective(teacher(), Distillation("kl"))(student, batch_at(0))["loss"].item()
    assert found == sorted(found) and found[-1] < live < 2 * found[-1]


def test_size_is_as_said(tmp_path: Path) -> None:
    stored = write(tmp_path, k=64, batches=3)
    assert stored.manifest.bytes_a_token == 4 * 64 + 15
    shard = (tmp_path / "00000.safetensors").stat().st_size
    assert 0 < shard - 3 * 18 * 271 < 800, "and a header"


def test_a_killed_run_continues_at_the_first_missing_shard(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    calls: list[int] = []
    inner = teacher()

    def dies(batch: Any, states: bool = False) -> Lesson:
        calls.append(1)
        if len(calls) == 5:
            raise InterruptedError
        return inner(batch, states)

    with pytest.raises(InterruptedError):
        write(tmp_path / "cut", given=dies)
    with pytest.raises(DataError, match="2 of 3 shards"):
        StoredTeacher(tmp_path / "cut", WORDS)
    write(tmp_path / "cut", given=dies)
    assert len(calls) == 5 + 4, "batches 3 to 6"
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    write(tmp_path / "cut", given=lambda *_: pytest.fail("nothing is missing"))


def test_a_folder_of_other_logits_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"model big -> bigger; k 8 -> 9"):
        write(tmp_path, k=9, model="bigger")
    with pytest.raises(ConfigError, match="data abc -> abd"):
        write(tmp_path, data="abd")


def test_another_vocabulary_is_one_error_that_names_both(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(
        ConfigError, match=r"teacher student \(259 tokens, .*student mine \(300 tokens, 12345678\)"
    ):
        StoredTeacher(tmp_path, Vocabulary("mine", 300, "1234567890"))
    with pytest.raises(ConfigError, match="272 logits for 300 tokens"):
        write(tmp_path / "other", vocabulary=Vocabulary("mine", 300, "1234567890"))


def test_damaged_folders_are_data_errors(tmp_path: Path) -> None:
    stored = write(tmp_path, batches=1)
    (tmp_path / "00000.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        stored.batch_at(0)
    (tmp_path / MANIFEST).write_text(json.dumps({"k": 3}))
    with pytest.raises(DataError, match="no folder of stored logits"):
        read_manifest(tmp_path)


def test_wide_vocabularies_take_wider_numbers(tmp_path: Path) -> None:
    many = Vocabulary("many", 70_000, "x")
    tokens = torch.tensor([[69_999, 3, 65_537]])

    def fake(batch: Any, states: bool = False) -> Lesson:
        return Lesson(torch.arange(70_000.0).expand(1, 3, -1) / 1000)

    write_teacher(
        tmp_path, fake, lambda _: {"input_ids": tokens, "labels": tokens},
        batches=1, k=4, model="m", vocabulary=many, data="d",
    )  # fmt: skip
    stored = StoredTeacher(tmp_path, many)
    batch = stored.batch_at(0)
    assert torch.equal(batch["input_ids"], tokens) and stored.manifest.bytes_a_token == 6 * 4 + 17
    assert batch["lesson"].indices[0, 0].tolist() == [69_999, 69_998, 69_997, 69_996]


def test_the_training_loop_learns_from_it(tmp_path: Path) -> None:
    stored = write(tmp_path / "teacher", k=64)
    loss_of = objective(stored, Distillation("cakld"))
    settings = TrainSettings(steps=42, lr=1e-2)
    records = train(qwen3(**SMALL), stored.batch_at, loss_of, settings, tmp_path / "run", device="cpu")
    first, last = (sum(record.loss for record in part) / 7 for part in (records[:7], records[-7:]))
    assert last < 0.75 * first and set(records[0].metrics) == {"kd"}


def test_a_share_of_the_batches_is_a_subset_of_the_larger_ones(tmp_path: Path) -> None:
    write(tmp_path, batches=7)

    def seen(share: float, seed: int = 1) -> set[bytes]:
        teacher = StoredTeacher(tmp_path, WORDS, seed=seed, share=share)
        batches = [teacher.batch_at(index)["input_ids"] for index in range(2 * teacher.count)]
        kept = {batch.numpy().tobytes() for batch in batches}
        assert len(kept) == teacher.count, "two passes over the same batches"
        return kept

    assert [len(seen(share)) for share in (0.01, 0.5, 1.0)] == [1, 3, 7]
    assert seen(0.01) < seen(0.5) < seen(1.0) and seen(0.5, seed=2) != seen(0.5)
