"""Compiled chains compute what they compute one operation after another, and where nothing compiles it is said."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

from angelslim.methods.qat import _fused
from angelslim.methods.qat.base import master_weight, set_progress

from .helpers import NAMES, OUT, VARIANTS, inputs, quantized, quantizer_of, traced


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(_fused, "_ready", {})
    monkeypatch.setattr(_fused, "_broken", set())


def results(name, options, choice):
    """Outputs and gradients of a layer in the middle of a run."""
    layer = quantized(name, {**options, "compile": choice}, bias=True)
    set_progress(layer, 30, 100)
    layer(inputs()).square().sum().backward()
    found = {key: p.grad for key, p in layer.named_parameters()}
    return {**found, "output": layer(inputs()).detach()}


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_traced_functions_are_whole_graphs_and_compute_the_same(name, options, monkeypatch):
    monkeypatch.setattr(_fused, "compile_graph", traced)
    plain, found = results(name, options, "false"), results(name, options, "true")
    assert plain.keys() == found.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8)
    assert bool(_fused._ready) == (name != "fp" or options.get("format", "fp8") == "fp8")
    assert not _fused._broken


def test_the_compiler_of_this_machine_computes_the_same():
    options = {"group_size": 16, "anneal": "linear"}
    plain, compiled = results("sherry", options, "false"), results("sherry", options, True)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)
    assert _fused._ready


def test_layers_of_one_shape_share_what_is_compiled(monkeypatch):
    monkeypatch.setattr(_fused, "compile_graph", traced)
    for seed in range(12):  # more than torch compiles of one code object
        quantized("twn", {"compile": "true"}, seed=seed)(inputs())
    assert len(_fused._ready) == 1
    for size in range(2, 14):
        weight = torch.randn(size, 16)
        _fused.run(torch.neg, True, weight)
    assert len(_fused._ready) == 13


def test_without_a_compiler_it_is_said_once_and_computed_anyway(monkeypatch, caplog):
    def broken(*_args):
        raise RuntimeError("No working C++ compiler was found.\nmore")

    monkeypatch.setattr(_fused, "compile_graph", broken)
    plain = results("seq", {}, "false")
    with caplog.at_level(logging.WARNING, logger="angelslim"):
        found = results("seq", {}, "true")
    assert torch.equal(found["output"], plain["output"])
    assert [r.message for r in caplog.records if "No working C++ compiler" in r.message] == [
        "Nothing compiles on this cpu (No working C++ compiler was found.); quantizers run uncompiled."
    ]


def test_by_itself_it_leaves_processors_alone():
    layer = quantized("twn", {})
    layer(inputs())
    assert not _fused._ready and not _fused.wanted("auto", master_weight(layer))


def test_evaluation_and_merging_are_not_compiled(monkeypatch):
    monkeypatch.setattr(_fused, "compile_graph", traced)
    layer = quantized("twn", {"compile": "true"}).eval()
    layer(inputs())
    quantizer_of(layer).merged(master_weight(layer))
    assert not _fused._ready and len(layer.weight) == OUT


@pytest.mark.parametrize("activations", [{}, {"activations": "int8"}], ids=["weights", "inputs"])
def test_a_whole_model_is_one_graph_with_its_quantizers(activations, monkeypatch, caplog):
    """Nothing is compiled within, nothing breaks the graph, and what looks for Triton is not traced."""
    monkeypatch.setattr(_fused, "AUTOMATIC", ("cuda", "cpu"))
    layer = quantized("absmean", {**activations}, bias=True)
    twin = quantized("absmean", {**activations, "compile": "false"}, bias=True)
    set_progress(layer, 30, 100)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(inputs()).square().sum().backward()
    twin(inputs()).square().sum().backward()
    torch.testing.assert_close(master_weight(layer).grad, master_weight(twin).grad)
    assert not _fused._ready and not quantizer_of(layer).calls


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=NAMES)
def test_every_quantizer_traces_without_a_break(name, options):
    layer = quantized(name, {**options, "compile": "true"}, bias=True)
    set_progress(layer, 30, 100)
    torch._dynamo.reset()
    found = torch.compile(layer, fullgraph=True, backend="eager")(inputs())
    torch.testing.assert_close(found, quantized_twin(name, options)(inputs()))
    assert not _fused._ready


def quantized_twin(name, options):
    twin = quantized(name, {**options, "compile": "false"}, bias=True)
    set_progress(twin, 30, 100)
    return twin
