"""Training runs from recipe to folder: every quantizer, every teacher, killed and continued, refused where it must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import angelslim
from angelslim.base.errors import ConfigError, DataError, SchemeError, UserError
from angelslim.config.recipe import load as load_recipe
from angelslim.data.builtin import examples, extract_answer
from angelslim.engine import carry_out, prepare_any
from angelslim.evaluate.tasks import chat_prompt
from angelslim.report.record import RunRecord
from angelslim.train import checkpoint
from angelslim.training.follow import Training
from angelslim.work import tokenizer_of
from tiny import Killed, byte_tokenizer, dies_at, fingerprints, save_qwen3

QAT = "compression.QAT"
ARGS = f"{QAT}.hf_args"
SPECIAL = f"{QAT}.plugin_config.quant_config.special"
SHORT = ("dataset.max_seq_length=32", f"{ARGS}.max_steps=6", f"{ARGS}.per_device_train_batch_size=2")


def train(model, recipe, texts, out, *words):
    overrides = [f"dataset.data_path={texts}", "evaluation.enabled=false", *SHORT, *words]
    return carry_out(prepare_any(load_recipe(recipe, overrides), model), out)


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": f"Line {i}: " + "a quick brown fox " * 4}) for i in range(80))
    )
    return file


QUANTIZERS = {
    "seq": ("seq_2bit", (), "angelslim packed (2 bit)"),
    "tequila": ("ternary_tequila", (), "angelslim packed (2 bit)"),
    "absmean": ("ternary_absmean", (), "angelslim packed (2 bit)"),
    "sherry": ("sherry", (), "angelslim packed (1.25 bit)"),
    "twn": ("ternary_absmean", (f"{SPECIAL}.quant_method=twn",), "angelslim packed (2 bit)"),
    "lsq": (
        "ternary_absmean",
        (f"{SPECIAL}.quant_method=lsq", f"{SPECIAL}.w_bits=3"),
        "angelslim packed (3 bit)",
    ),
    "int": ("int4_qat", (), "compressed-tensors (pack-quantized)"),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_run_leaves_a_folder_that_opens_and_says_how_it_was_made(name, tiny_folder, long_texts, tmp_path):
    recipe, words, form = QUANTIZERS[name]
    record = train(tiny_folder, recipe, long_texts, tmp_path / "out", *words)
    assert record.format == form and len(record.layers) == 14
    assert record.training["quantizer"] == name and len(record.training["steps"]) == 6
    assert [look["step"] for look in record.training["looks"]] == [0, 1, 2, 3, 4, 5, 6]
    assert record.seconds > record.training["seconds"] > 0, "the whole run's time"
    taught = {"seq_2bit": "cakld + cross entropy", "int4_qat": "kl"}
    assert record.training["loss"] == taught.get(recipe, "cross entropy")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Cross entropy on rows that were held back" in page and "Weights of model.layers" in page
    assert "running mean" in page and "weight before rounding" in page, "curves and axes say what they are"
    with torch.inference_mode():
        assert angelslim.load(tmp_path / "out")(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()
    assert not (tmp_path / "out.training").exists()
    assert RunRecord.load(tmp_path / "out").training == record.training


def test_the_folder_holds_the_weights_that_were_trained(tiny_folder, long_texts, tmp_path):
    """The packed folder and the one in full precision compute the same, and the second is exact in float32."""
    train(tiny_folder, "seq_2bit", long_texts, tmp_path / "packed")
    record = train(tiny_folder, "seq_2bit", long_texts, tmp_path / "fake", f"{QAT}.save_format=fake")
    assert record.format.startswith("full precision")
    packed, fake = angelslim.load(tmp_path / "packed"), angelslim.load(tmp_path / "fake")
    assert (
        fake.dtype == torch.float32
        and "quantization_config" not in (tmp_path / "fake" / "config.json").read_text()
    )
    weight = fake.model.layers[0].mlp.up_proj.weight
    assert all(len(row.unique()) <= 4 for row in weight)
    assert torch.equal(packed.model.layers[0].mlp.up_proj.weight, weight.to(torch.bfloat16))
    assert len(record.layers) == 14


def test_weights_with_a_shift_are_saved_as_ordinary_numbers(tiny_folder, long_texts, tmp_path):
    words = (f"{SPECIAL}.quant_method=dlt", f"{QAT}.save_format=fake", f"{ARGS}.learning_rate=0.01")
    record = train(tiny_folder, "ternary_absmean", long_texts, tmp_path / "out", *words)
    assert record.format.startswith("full precision") and any("shifts" in text for text in record.warnings)
    weight = angelslim.load(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    assert all(len(row.unique()) <= 3 for row in weight)
    assert (weight.amax(1) + weight.amin(1)).abs().max() > 1e-5, "the levels are shifted"


@pytest.mark.parametrize("recipe", ["seq_2bit", "sherry"])
def test_killed_and_continued_it_ends_with_the_same_bytes(
    recipe, tiny_folder, long_texts, tmp_path, monkeypatch
):
    words = (f"{ARGS}.save_steps=2",)
    train(tiny_folder, recipe, long_texts, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", dies_at(checkpoint.save, 1, True))  # after the fourth step
        with pytest.raises(Killed):
            train(tiny_folder, recipe, long_texts, tmp_path / "out", *words)
    assert (tmp_path / "out.training").exists() and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="unfinished training of another recipe"):
        train(tiny_folder, recipe, long_texts, tmp_path / "out", *words, f"{ARGS}.learning_rate=0.1")
    record = train(tiny_folder, recipe, long_texts, tmp_path / "out", *words)
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "whole")
    whole = RunRecord.load(tmp_path / "whole").training
    assert record.training["looks"] == whole["looks"]
    assert train(tiny_folder, recipe, long_texts, tmp_path / "out", *words).fingerprint == record.fingerprint
    with pytest.raises(UserError, match="already exists"):
        train(tiny_folder, recipe, long_texts, tmp_path / "out", *words, f"{ARGS}.learning_rate=0.1")


def distillation(teacher, **section):
    return {
        "extends": "base",
        "compression": {
            "name": "QAD" if section.pop("quantized", False) else "Distill",
            "quantization": {"ignore_layers": ["lm_head"]},
            "Distill": {"teacher_model_path": str(teacher), "loss_type": "kl", **section},
        },
    }


def test_a_small_student_learns_from_a_larger_teacher(long_texts, tmp_path):
    teacher = save_qwen3(tmp_path / "teacher", blocks=3)
    student = save_qwen3(tmp_path / "student", blocks=2, seed=1)
    args = "compression.Distill.hf_args"
    words = (
        f"dataset.data_path={long_texts}",
        "evaluation.enabled=false",
        "dataset.max_seq_length=32",
        f"{args}.max_steps=30",
        f"{args}.per_device_train_batch_size=4",
        f"{args}.learning_rate=0.003",
        "compression.Distill.hidden_loss_weight=0.1",
    )
    job = prepare_any(load_recipe(distillation(teacher), list(words)), student)
    record = carry_out(job, tmp_path / "out")
    losses = [step["metrics"]["kd"] for step in record.training["steps"]]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert record.layers == [] and record.format == "full precision"
    assert angelslim.load(tmp_path / "out").dtype == torch.float32


def test_a_teacher_with_another_vocabulary_is_one_error(long_texts, tmp_path, tiny_folder):
    teacher = save_qwen3(tmp_path / "teacher")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(teacher)
    job = prepare_any(
        load_recipe(distillation(teacher), [f"dataset.data_path={long_texts}", "dataset.max_seq_length=32"]),
        tiny_folder,
    )
    with pytest.raises(ConfigError, match="vocabular"):
        carry_out(job, tmp_path / "out")


BAD = {
    "odd group": ((f"{SPECIAL}.group_size=48",), SchemeError, "48"),
    "unknown option": ((f"{SPECIAL}.options.lamda=0.1",), ConfigError, "lambda"),
    "unknown schedule": ((f"{ARGS}.lr_scheduler_type=cosin",), ConfigError, "cosine"),
    "unknown quantizer": ((f"{SPECIAL}.quant_method=tequilla",), ConfigError, "tequila"),
    "rows too long": (("dataset.max_seq_length=100000",), DataError, "fewer than two rows"),
    "no learning": ((f"{ARGS}.learning_rate=-1",), ConfigError, "greater than 0"),
    "empty batches": ((f"{ARGS}.per_device_train_batch_size=0",), ConfigError, "greater than or equal to 1"),
    "cold teacher": ((f"{QAT}.kd_temperature=0",), ConfigError, "greater than 0"),
    "all warm-up": ((f"{ARGS}.warmup_ratio=3",), ConfigError, "less than or equal to 1"),
    "no data file": (("dataset.data_path=nowhere.jsonl",), DataError, "nowhere.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_error_each(name, tiny_folder, long_texts, tmp_path):
    words, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        train(tiny_folder, "ternary_tequila", long_texts, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == [], "the corrected command must find nothing in its way"


UNTRAINED = {
    "odd group": ("sherry", f"{SPECIAL}.group_size=48", "multiple of the group size 48"),
    "no file for a shift": ("ternary_absmean", f"{SPECIAL}.quant_method=dlt", "save_format: fake"),
    "no scales to learn": (
        "ternary_absmean",
        f"{QAT}.trainable_parameters=quant",
        "trainable_parameters: all",
    ),
    "no scales in MXFP4": ("int4_qat", "compression.quantization.scheme=mxfp4", "trainable_parameters: all"),
    "no such format": ("int4_qat", "compression.quantization.format=fp8_block", "cannot hold"),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_no_file_could_hold_is_refused_before_training(name, tiny_folder):
    recipe, word, message = UNTRAINED[name]
    with pytest.raises(UserError, match=message):
        prepare_any(load_recipe(recipe, [word]), tiny_folder)


def test_mxfp8_is_not_trained_as_mxfp4(tiny_folder):
    whole = "compression.quantization={name: mxfp8}"
    with pytest.raises(SchemeError, match="MXFP8"):
        prepare_any(load_recipe("seq_2bit", [whole, f"{QAT}.plugin_config=null"]), tiny_folder)


def test_curves_for_tensorboard_stay_with_the_model(tiny_folder, long_texts, tmp_path):
    pytest.importorskip("tensorboard")
    train(tiny_folder, "sherry", long_texts, tmp_path / "out", f"{ARGS}.report_to=tensorboard")
    assert [file.name[:10] for file in (tmp_path / "out" / "tensorboard").iterdir()] == ["events.out"]
    assert not (tmp_path / "out.training").exists()


def test_a_warm_up_below_one_step_is_a_share(tiny_folder):
    job = prepare_any(load_recipe("sherry", [f"{ARGS}.warmup_steps=0.25"]), tiny_folder)
    assert (job.settings.warmup, job.warmup) == (0, 0.25)


def test_empty_documents_are_one_error(tiny_folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 5)
    with pytest.raises(DataError, match="all are empty"):
        train(tiny_folder, "sherry", tmp_path / "empty.jsonl", tmp_path / "out")


def test_arguments_without_effect_are_said(tiny_folder, long_texts, tmp_path):
    words = (f"{ARGS}.neftune_noise_alpha=5", f"{ARGS}.data_seed=3")
    record = train(tiny_folder, "seq_2bit", long_texts, tmp_path / "out", *words)
    for name in ("neftune_noise_alpha", "data_seed"):
        assert any(f"{name} has no effect" in warning for warning in record.warnings)


def test_two_processes_with_spread_weights_equal_one(tiny_folder, long_texts, tmp_path):
    """The command line, started by torchrun with FSDP2: two rows of each process are four rows of one."""
    words = [
        f"dataset.data_path={long_texts}",
        "evaluation.enabled=false",
        "global.device=cpu",
        "dataset.max_seq_length=32",
        f"{ARGS}.max_steps=4",
        f"{ARGS}.fsdp=full_shard",
        f"{ARGS}.per_device_train_batch_size=2",
    ]
    for processes in (1, 2):
        each = f"{ARGS}.gradient_accumulation_steps={2 // processes}"
        out = str(tmp_path / f"by{processes}")
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        start = start if processes == 2 else [sys.executable, "-m"]
        done = subprocess.run(
            [*start, "angelslim", "run", "sherry", str(tiny_folder), *words, each, "--out", out],
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (RunRecord.load(tmp_path / f"by{processes}") for processes in (1, 2))
    losses = [[step["loss"] for step in record.training["steps"]] for record in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    models = [angelslim.load(tmp_path / f"by{processes}") for processes in (1, 2)]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    differing = [(a != b).float().mean().item() for a, b in pairs]
    assert max(differing) < 0.01, "a code at a threshold may differ, no more"


def test_a_bias_without_a_place_is_left_out_and_said(tiny_folder, long_texts, tmp_path):
    record = train(tiny_folder, "ternary_tequila", long_texts, tmp_path / "out")
    notes = {layer.note for layer in record.layers}
    assert len(notes) == 1 and "bias" in notes.pop(), "one text, which is said once"


def test_both_modes_of_thinking_survive(tmp_path):
    """The built-in model answers with and without thinking, as its chat template asks; so must the trained one."""
    words = ("dataset.max_seq_length=256", f"{ARGS}.max_steps=6", f"{ARGS}.per_device_train_batch_size=4")
    job = prepare_any(load_recipe("int4_qat", ["evaluation.enabled=false", *words]), "tiny-lm")
    carry_out(job, tmp_path / "out")
    model, tokenizer = angelslim.load(tmp_path / "out"), tokenizer_of(tmp_path / "out")
    for thinking in (True, False):
        right = 0
        for item in examples("addition", "evaluation", 6, thinking=thinking):
            ids = tokenizer(
                chat_prompt(tokenizer, item), add_special_tokens=False, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                found = model.generate(ids, max_new_tokens=120, do_sample=False)
            text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=False)
            right += extract_answer(text) == item.answer
            assert ("Ones:" in text) == thinking  # it thinks where it was asked to
        assert right >= 5


def test_a_followed_training_hands_over_its_looks_as_it_goes_and_can_be_dropped(
    tiny_folder, long_texts, tmp_path
):
    overrides = [f"dataset.data_path={long_texts}", *SHORT, f"{ARGS}.max_steps=25", f"{ARGS}.save_steps=5"]
    job = prepare_any(load_recipe("seq_2bit", overrides), tiny_folder)
    whole = [(look.step, look.dev_loss) for look in Training(job, tmp_path / "whole").looks()]
    assert [step for step, _ in whole] == [*range(0, 25, 2), 25], "the end is always looked at"
    dropped = Training(job, tmp_path / "dropped").looks()
    first = [next(dropped) for _ in range(5)]
    dropped.close()
    steps = (tmp_path / "dropped" / "looks.json").read_text().count("dev_loss")
    assert len(first) == 5 and steps == 5
    again = [(look.step, look.dev_loss) for look in Training(job, tmp_path / "dropped").looks()]
    assert again == whole, "continued from step 5, with what was seen before"
