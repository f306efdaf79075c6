"""Layer 5: hand a model folder over to a serving engine: choose it, say why, build its command, run it.

Every engine offers the OpenAI-compatible HTTP interface, so the same request works with all of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .base.console import chose
from .base.errors import ConfigError, ModelError, ResourceError, did_you_mean

SETTINGS, DENSE = "sparse_attention.json", "dense"  # as in `methods.sparse.metadata`, without loading torch
VARIABLE = "ANGELSLIM_SPARSE_ATTENTION"  # what `vllm_attention` reads
ENGINES = ("vllm", "sglang", "llama.cpp")
SGLANG_ONLY = ("w4afp8",)  # values of `quant_method`


@dataclass(frozen=True)
class Launch:
    """A command to run, and why this engine."""

    engine: str
    command: tuple[str, ...]
    because: str
    port: int
    model: str
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*words, shlex.join(self.command)])

    @property
    def request(self) -> str:
        """A curl line that asks the served model something."""
        body = f'{{"model": "{self.model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        return f"curl http://127.0.0.1:{self.port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def plan_launch(folder: Path, engine: str = "auto", port: int = 8000, extra: Sequence[str] = ()) -> Launch:
    """Build the command that serves `folder`; nothing is started."""
    gguf = sorted(folder.glob("*.gguf")) if folder.is_dir() else [folder] if folder.suffix == ".gguf" else []
    if not gguf and not (folder / "config.json").exists():
        raise ModelError(
            f"{folder} is no model folder and no .gguf file.", fix="Give the folder that `run` wrote."
        )
    chosen, because = _choose(engine, bool(gguf), "" if gguf else _quantized_by(folder))
    builders = {
        "vllm": ("vllm", "serve", str(folder), "--port", str(port)),
        "sglang": (
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(folder),
            "--port",
            str(port),
        ),
        "llama.cpp": ("llama-server", "-m", str(gguf[0]) if gguf else "", "--port", str(port)),
    }
    return Launch(chosen, (*builders[chosen], *extra), because, port, str(folder))


def with_attention(plan: Launch, attn: str | None) -> Launch:
    """Let the engine prefill sparsely: as `attn` says (a selector, or a folder of settings), or as the model's folder does.

    vLLM alone has a place for it (`vllm_attention`); a prompt must arrive whole, so chunks and cached prefixes are switched off.
    """
    beside = (Path(plan.model) / SETTINGS).is_file()
    source = attn or (plan.model if beside and plan.engine == "vllm" else DENSE)
    if source == DENSE:
        return plan
    if plan.engine != "vllm":
        raise ConfigError(
            f"{plan.engine} has no place for sparse attention.", fix="Use --engine vllm, or --attn dense."
        )
    from .methods.sparse.using import check_source

    check_source(source)
    if attn is None:
        chose(f"sparse attention as {SETTINGS} says", "the folder holds it; --attn dense leaves it out")
    whole = ("--no-enable-prefix-caching", "--no-enable-chunked-prefill")
    return replace(plan, command=(*plan.command, *whole), environment=((VARIABLE, source),))


def _quantized_by(folder: Path) -> str:
    """Return the ``quant_method`` of a folder's config.json, empty for a plain model."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return str((config.get("quantization_config") or {}).get("quant_method", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'} is damaged ({error}).", fix="Copy it again.") from error


def _choose(engine: str, gguf: bool, method: str) -> tuple[str, str]:
    if engine == "auto":
        if gguf:
            return "llama.cpp", "the folder holds a GGUF file"
        if method in SGLANG_ONLY:
            return "sglang", f"vLLM does not read the format {method}"
        if not installed("vllm") and installed("sglang"):
            return "sglang", "it is installed and vLLM is not"
        return "vllm", "it reads the checkpoint formats written here"
    if engine not in ENGINES:
        raise ConfigError(f"Unknown engine {engine!r}.", fix=did_you_mean(engine, ENGINES))
    if gguf and engine != "llama.cpp":
        raise ModelError(
            f"{engine} serves model folders, and this is a GGUF file.", fix="Use --engine llama.cpp."
        )
    if engine == "llama.cpp" and not gguf:
        raise ModelError(
            "llama.cpp reads GGUF files, and the folder holds none.", fix="Use --engine vllm or sglang."
        )
    return engine, "asked for"


def installed(engine: str) -> bool:
    """Say whether an engine can be started from here."""
    if engine == "sglang":
        return importlib.util.find_spec("sglang") is not None
    return shutil.which("llama-server" if engine == "llama.cpp" else engine) is not None


def launch(plan: Launch) -> int:
    """Run the command until it ends; return its exit status."""
    if not installed(plan.engine):
        install = {
            "vllm": "pip install vllm",
            "sglang": "pip install sglang",
            "llama.cpp": "build llama.cpp's llama-server",
        }
        raise ResourceError(f"{plan.engine} is not installed here.", fix=f"Run: {install[plan.engine]}")
    return subprocess.call(plan.command, env={**os.environ, **dict(plan.environment)})
