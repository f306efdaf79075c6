"""Wrong input of every kind, through the command line: one line that names the thing and the way out.

Each case must exit with status 2, print exactly one ``error:`` line and no traceback, and leave no output behind.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import byte_tokenizer, copy_model, edit_json, save_qwen3

Words = list[object]
Build = Callable[[Path, Path], Words]  # (scratch folder, a good model) -> the command's words after "run"
CASES: dict[str, tuple[Build, tuple[str, ...]]] = {}


def case(*fragments: str) -> Callable[[Build], Build]:
    """Register a builder under its name with the fragments that its error line has to contain."""

    def register(build: Build) -> Build:
        CASES[build.__name__] = (build, fragments)
        return build

    return register


def recipe(folder: Path, text: str | bytes) -> Path:
    file = folder / "recipe.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def broken(folder: Path, model: Path) -> Path:
    return copy_model(model, folder / "model")


def static(model: Path, *overrides: str) -> Words:
    return ["fp8_static", model, "dataset.num_samples=2", "dataset.max_seq_length=16", *overrides]


QUANTIZATION = "compression:\n  quantization:\n    name: fp8_dynamic\n"

# ------------------------------------------------------------------------------------------- recipes, overrides


@case("recipe.yaml", "ignore_layer'", "Did you mean", "ignore_layers")
def mistyped_key(folder, model):
    return [recipe(folder, QUANTIZATION + "    ignore_layer: [lm_head]\n"), model]


@case("'fp8_dynamik'", "Did you mean 'fp8_dynamic'?")
def mistyped_recipe(folder, model):
    return ["fp8_dynamik", model]


@case("Unknown quantization method 'fp8_dynamc'", "Did you mean 'fp8_dynamic'?")
def mistyped_method(folder, model):
    return [recipe(folder, QUANTIZATION.replace("dynamic", "dynamc")), model]


@case("dataset.num_sample", "Did you mean", "num_samples")
def override_of_an_unknown_key(folder, model):
    return ["fp8_static", model, "dataset.num_sample=4"]


@case("'dataset.num_samples'", "Overrides look like dataset.num_samples=64")
def override_without_a_value(folder, model):
    return ["fp8_static", model, "dataset.num_samples"]


@case("is not an override", "dotted.key=value")
def override_without_a_key(folder, model):
    return ["fp8_static", model, "=4"]


@case("recipe.yaml, line 3", "Not valid YAML", "expected ',' or ']'")
def invalid_yaml(folder, model):
    return [recipe(folder, "compression:\n  quantization: [unclosed\n"), model]


@case("recipe.yaml", "empty")
def empty_recipe(folder, model):
    return [recipe(folder, ""), model]


@case("recipe.yaml", "Not UTF-8", "Save the file as UTF-8")
def recipe_in_latin_1(folder, model):
    return [recipe(folder, "# caf\u00e9\n".encode("latin-1")), model]


@case("no-such.yaml", "no such file", "Check the path")
def missing_recipe(folder, model):
    return [folder / "no-such.yaml", model]


@case("dataset.num_samples", "many", "number")
def wrong_type(folder, model):
    return ["fp8_static", model, "dataset.num_samples=many"]


@case("dataset.num_samples", "0")
def no_samples(folder, model):
    return ["fp8_static", model, "dataset.num_samples=0"]


@case("observer", "minmax", "absmax")
def unknown_observer(folder, model):
    return static(model, "compression.quantization.observer=minmax")


@case("re:[", "not a regular expression")
def invalid_pattern(folder, model):
    return ["fp8_dynamic", model, "compression.quantization.ignore_layers=['re:[']"]


@case("No layer is left to quantize", "ignore_layers")
def everything_ignored(folder, model):
    return ["fp8_dynamic", model, "compression.quantization.ignore_layers=['re:.*']"]


@case("format", "gguff", "compressed-tensors")
def unknown_format(folder, model):
    return ["fp8_dynamic", model, "compression.quantization.format=gguff"]


@case("'fp8_block' cannot hold W int4 per-group 128", "Use format: auto")
def format_that_cannot_hold_the_scheme(folder, model):
    return ["int4_rtn", model, "compression.quantization.format=fp8_block"]


@case("understood, but not built yet", "daq", "Built methods: ", "gptq", "rtn")
def method_that_is_not_built(folder, model):
    return [recipe(folder, "compression:\n  quantization:\n    name: daq\n"), model]


@case("key-value caches are static FP8 E4M3", "compressed_tensors")
def kv_cache_that_no_engine_keeps(folder, model):
    scheme = "{weight: {format: int8}, kv: {format: int8}}"
    return [recipe(folder, f"compression:\n  quantization:\n    scheme: {scheme}\n"), model]


@case("understood", "not built yet", "Token pruning")
def pruning_dialect(folder, model):
    text = "compressor:\n  strategies:\n    global:\n      strategy: VisionZip\n"
    return [recipe(folder, text), model]


@case("asks for nothing", "compression section")
def nothing_to_do(folder, model):
    return [recipe(folder, "global:\n  seed: 3\n"), model]


@case("abacus", "Use cpu or cuda")
def unknown_device(folder, model):
    return ["fp8_dynamic", model, "global.device=abacus"]


@case("torch_dtype is float32", "bfloat16", "Use auto")
def another_dtype(folder, model):
    return ["fp8_dynamic", model, "model.torch_dtype=float32"]


# ----------------------------------------------------------------------------------------------------- groups


@case(
    "Input size 256 is not a multiple of the group size 96", "model.layers.0.mlp.down_proj", "ignore_layers"
)
def group_that_does_not_divide(folder, model):
    ignored = "compression.quantization.ignore_layers=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj]"
    return ["int4_rtn", model, "compression.quantization.quant_method.group_size=96", ignored]


@case("is not a multiple of the group size 96", "model.layers.0.", " and ", "more", "ignore_layers")
def group_that_divides_nothing(folder, model):
    return ["int4_rtn", model, "compression.quantization.quant_method.group_size=96"]


@case("group_size 0", "Use 32, 64 or 128")
def group_of_zero(folder, model):
    return ["int4_rtn", model, "compression.quantization.quant_method.group_size=0"]


@case("lm_head", "static", "full precision")
def static_head(folder, model):
    untied = save_qwen3(folder / "model", tie_word_embeddings=False)
    return static(untied, "compression.quantization.quantize_lm_head=true")


# ----------------------------------------------------------------------------------------------------- models


@case("No model is named", "tiny-lm")
def no_model(folder, model):
    return ["fp8_dynamic"]


@case("No model 'tiny-ml'", "Did you mean 'tiny-lm'?")
def mistyped_model(folder, model):
    return ["fp8_dynamic", "tiny-ml"]


@case("hub could not provide", "Check the path")
def model_that_is_nowhere(folder, model):
    return ["fp8_dynamic", "nobody/nothing-of-that-name"]


def poisoned(
    folder: Path, model: Path, value: float, module: str = "layers.1.mlp.up_proj", place: object = (3, 5)
) -> Path:
    model = broken(folder, model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{module}.weight"][place] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@case("'model.layers.1.mlp.up_proj.weight'", "NaN", "ignore_layers")
def nan_weight(folder, model):
    return ["fp8_dynamic", poisoned(folder, model, torch.nan)]


@case("infinity", "Block 1", "'model.layers.1.mlp.up_proj.weight' holds some", "Restore this tensor")
def infinite_weight_while_calibrating(folder, model):
    return static(poisoned(folder, model, torch.inf))


@case("'model.layers.1.input_layernorm.weight', which is not quantized", "NaN", "original is likely damaged")
def nan_in_what_is_kept(folder, model):
    return ["fp8_dynamic", poisoned(folder, model, torch.nan, "layers.1.input_layernorm", 3)]


@case("Block 0", "infinity", "damaged")
def nan_in_the_embedding_while_calibrating(folder, model):
    return static(poisoned(folder, model, torch.nan, "embed_tokens", ...))


@case("model.safetensors", "truncated", "again")
def truncated_shard(folder, model):
    file = broken(folder, model) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return ["fp8_dynamic", file.parent]


@case("do not exist", "-of-", "Copy the missing files")
def missing_shard(folder, model):
    model = save_qwen3(folder / "model", shard="300KB")
    max(model.glob("*.safetensors")).unlink()
    return ["fp8_dynamic", model]


@case("index.json lists tensors that no shard holds", "'ghost.weight'", "Copy the folder again")
def index_that_disagrees(folder, model):
    model = save_qwen3(folder / "model", shard="300KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"].values()))
    edit_json(
        model / "model.safetensors.index.json", weight_map=index["weight_map"] | {"ghost.weight": first}
    )
    return ["fp8_dynamic", model]


@case("pickle", "pytorch_model.bin", "Convert them to safetensors")
def pickled_weights(folder, model):
    model = broken(folder, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return ["fp8_dynamic", model]


@case("no config.json", "complete Hugging Face model folder")
def missing_config(folder, model):
    model = broken(folder, model)
    (model / "config.json").unlink()
    return ["fp8_dynamic", model]


@case("config.json", "cannot be used: it is no JSON mapping", "Copy it again")
def config_that_is_no_json(folder, model):
    model = broken(folder, model)
    (model / "config.json").write_text('{"model_type": "qwen3"')
    return ["fp8_dynamic", model]


@case("'my_network'", "Update transformers")
def unknown_architecture(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", model_type="my_network", architectures=["MyNetwork"])
    return ["fp8_dynamic", model]


@case("'qwenn3'", "Did you mean 'qwen3'?")
def mistyped_architecture(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", model_type="qwenn3")
    return ["fp8_dynamic", model]


@case("declares fp8 weights", "config.json that belongs to these weights")
def declared_fp8_without_scales(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", quantization_config={"quant_method": "fp8"})
    return ["fp8_dynamic", model]


@case("has shape", "config.json asks for", "belongs to these weights")
def config_of_another_width(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", intermediate_size=384)
    return static(model)


@case("has shape", "config.json asks for", "belongs to these weights")
def config_of_another_width_without_data(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", intermediate_size=384)
    return ["fp8_dynamic", model]


@case("no weights for", "do not belong together")
def config_of_another_depth(folder, model):
    model = broken(folder, model)
    edit_json(model / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return ["fp8_dynamic", model]


# ------------------------------------------------------------------------------------------------------- data


@case("no usable tokenizer", "Copy tokenizer.json")
def missing_tokenizer(folder, model):
    model = broken(folder, model)
    for file in model.glob("token*"):
        file.unlink()
    return static(model)


@case("ids beyond the model's vocabulary", "own tokenizer")
def tokenizer_of_another_model(folder, model):
    model = save_qwen3(folder / "model", vocab_size=30)
    byte_tokenizer().save_pretrained(model)
    return static(model)


@case("nothing.jsonl", "no such data file", "builtin")
def missing_data(folder, model):
    return static(model, f"dataset.data_path={folder / 'nothing.jsonl'}")


def data(folder: Path, model: Path, text: str) -> Words:
    (folder / "data.jsonl").write_text(text)
    return static(model, f"dataset.data_path={folder / 'data.jsonl'}")


@case("data.jsonl", "empty")
def empty_data(folder, model):
    return data(folder, model, "")


@case("No usable record", "Name a file with text")
def data_without_text(folder, model):
    return data(folder, model, '{"text": ""}\n{"text": ""}\n')


@case("data.jsonl, line 2", "Not valid JSON", "Correct or remove it")
def broken_line(folder, model):
    return data(folder, model, '{"text": "good enough"}\n{"text": "cut o\n')


@case("data.jsonl, line 1", "unknown shape", "inhalt", "'messages'")
def record_of_unknown_shape(folder, model):
    return data(folder, model, '{"inhalt": "text"}\n')


@case("is a text model", "no processor", "Use dataset.name: TextDataset")
def data_of_another_kind(folder, model):
    return static(model, "dataset.name=MultiModalDataset")


# ------------------------------------------------------------------------------------------- sparse attention


def sparse(model: Path, *overrides: str, recipe: str = "sparse_stem") -> Words:
    return [recipe, model, *(f"compression.sparsity.{override}" for override in overrides)]


@case("Unknown sparse attention method 'stm'", "Did you mean 'stem'?")
def unknown_pattern(folder, model):
    return sparse(model, "name=stm")


@case("compression.sparsity.density is 1.5", "a number above 0, at most 1")
def density_above_one(folder, model):
    return sparse(model, "density=1.5")


@case("stem has no option 'densty'", "Did you mean 'density'?")
def unknown_option_of_a_pattern(folder, model):
    return sparse(model, "options={densty: 0.1}")


@case("layer '7'", "the model has 2, from 0 to 1")
def a_rule_for_a_layer_that_is_not_there(folder, model):
    return sparse(model, "rules=[{name: dense, layers: 7}]")


@case("heads.json", "model_type 'llama', this one has 'qwen3'", "Search the patterns of this model")
def head_patterns_of_another_model(folder, model):
    heads = [{str(head): ["vertical_and_slash", 30, 50, 0.5] for head in range(4)}] * 2
    content = {"schema_version": 1, "model_fingerprint": {"model_type": "llama"}, "best_pattern": heads}
    (folder / "heads.json").write_text(json.dumps(content))
    return sparse(model, f"attn_kwargs.pattern_path={folder / 'heads.json'}", recipe="sparse_minference")


@case("measure.lengths asks for 4096 tokens", "positions for 512")
def prompts_longer_than_the_model(folder, model):
    return sparse(model, "measure.lengths=[4096]")


# ----------------------------------------------------------------------------------------------------- output


@case("already exists", "--overwrite")
def existing_output(folder, model):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    return ["fp8_dynamic", model]


@case("is, or holds, the model itself", "Choose another --out")
def output_over_the_model(folder, model):
    return ["fp8_dynamic", copy_model(model, folder / "out"), "--overwrite"]


@case("out.partial failed", "choose another --out")
def output_below_a_file(folder, model):
    (folder / "file").write_text("")
    return ["fp8_dynamic", model, "--out", folder / "file" / "out"]


# ------------------------------------------------------------------------------------------------------ tests


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong_and_what_to_do(name, cli, tiny_folder, tmp_path):
    build, fragments = CASES[name]
    words = build(tmp_path, tiny_folder)
    words += [] if "--out" in words else ["--out", tmp_path / "out"]
    before = contents(tmp_path)
    outcome = cli("run", *words, "evaluation.enabled=false")
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err + outcome.out
    message = error_line(outcome.err)
    for fragment in fragments:
        assert fragment.lower() in message.lower(), message
    assert contents(tmp_path) == before  # nothing written, nothing lost
    assert not (tmp_path / "out.partial").exists()


def test_there_are_many_kinds():
    assert len(CASES) >= 40


def test_too_little_disk_is_noticed_before_any_work(cli, tiny_folder, tmp_path, monkeypatch):
    free = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    outcome = cli("run", "fp8_dynamic", tiny_folder, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "on the disk of" in error_line(outcome.err) and "--out" in error_line(outcome.err)
    assert not list(tmp_path.iterdir())


def test_an_unbuilt_method_is_told_in_one_line(cli, tiny_folder, tmp_path):
    build, _ = CASES["method_that_is_not_built"]
    outcome = cli("run", *build(tmp_path, tiny_folder))
    assert outcome.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["evaluation.tasks=[adition]"], ["Did you mean 'addition'"]),
        (["evaluation.perplexity=nowhere.txt"], ["'nowhere.txt'", "evaluation.perplexity"]),
    ],
)
def test_measurements_are_checked_before_the_work(words, fragments, cli, tiny_folder, tmp_path):
    outcome = cli("run", "fp8_dynamic", tiny_folder, *words, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert all(fragment in error_line(outcome.err) for fragment in fragments)
    assert not list(tmp_path.iterdir())


def test_several_mistakes_are_told_at_once(cli, tiny_folder, tmp_path):
    file = recipe(
        tmp_path, QUANTIZATION + "    ignore_layer: [lm_head]\n    bitz: 8\ndatset:\n  num_samples: 3\n"
    )
    outcome = cli("run", file, tiny_folder)
    assert outcome.code == 2
    assert all(key in outcome.err for key in ("ignore_layer'", "bitz", "datset"))


@pytest.mark.parametrize("name", ["mistyped_recipe", "truncated_shard", "override_of_an_unknown_key"])
def test_the_same_from_a_shell(name, tiny_folder, tmp_path):
    build, fragments = CASES[name]
    words = [str(word) for word in build(tmp_path, tiny_folder)]
    done = subprocess.run(
        [sys.executable, "-m", "angelslim", "run", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(fragment.lower() in error_line(done.stderr).lower() for fragment in fragments)
    assert not (tmp_path / "output").exists()


def test_debug_shows_where_it_came_from(tiny_folder):
    words = [sys.executable, "-m", "angelslim", "--debug", "run", "fp8_dynamik", str(tiny_folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "Traceback" in done.stderr and "ConfigError" in done.stderr


@pytest.mark.parametrize(
    "words, fragments",
    [
        (["inspect", "tiny-ml"], ["Did you mean 'tiny-lm'"]),
        (["eval", "nowhere-at-all"], ["nowhere-at-all"]),
        (["eval", "tiny-lm", "--tasks", "adition"], ["adition", "Did you mean 'addition'"]),
        (["eval", "tiny-lm", "--text", "nowhere.txt"], ["nowhere.txt", "does not exist"]),
        (["export", "MODEL", "--check"], ["is not quantized", "Compress it first"]),
        (["export", "MODEL"], ["--format and --out"]),
        (["export", "nowhere", "--check"], ["nowhere"]),
        (["serve", "nowhere"], ["nowhere", "no model folder"]),
        (["serve", "MODEL", "--engine", "vlm"], ["Did you mean 'vllm'"]),
        (["cp", "fp8_statik"], ["Did you mean 'fp8_static'"]),
        (["cp", "fp8_static", "MODEL/config.json"], ["already exists"]),
        (["lab", "train", "tiny-lmm"], ["Did you mean 'tiny-lm'"]),
        (["plan", "fp8_dynamic"], ["No model is named"]),
    ],
)
def test_other_commands_too(words, fragments, cli, tiny_folder):
    outcome = cli(*[word.replace("MODEL", str(tiny_folder)) for word in words])
    assert outcome.code == 2, outcome
    assert all(fragment in error_line(outcome.err) for fragment in fragments), outcome.err


@pytest.mark.parametrize(
    "words", [["run"], ["runn"], ["run", "--ouut", "x"], ["plan", "a", "b", "--seed", "one"]]
)
def test_misuse_of_the_command_line_itself_exits_with_2(words, cli):
    assert cli(*words).code == 2
