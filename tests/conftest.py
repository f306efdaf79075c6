"""Shared by all tests: one thread, no network, and tiny random models that are made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it
os.environ["ANGELSLIM_CACHE"] = ""  # nothing is remembered between tests

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import Outcome, call, save_qwen3

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # before anything loads Triton, where it is installed: kernels run as Python
    )

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two blocks in bfloat16 with a byte tokenizer; read it, never write into it."""
    return save_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with six blocks."""
    return save_qwen3(tmp_path_factory.mktemp("models") / "deep", blocks=6)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file of forty short records of different lengths."""
    import json

    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    lines = [json.dumps({"text": f"Record {i}: " + "the quick brown fox " * (1 + i % 7)}) for i in range(40)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in this process: ``cli("plan", "fp8_dynamic", folder)``."""
    return lambda *words: call(capsys, monkeypatch, *words)
