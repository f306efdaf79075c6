"""The environments of the other tools: one virtual environment each, for they pin versions that exclude each other.

`requirements-TOOL.txt` beside this file says what goes in. Its first line is PyTorch, installed first and alone, so that
nothing later picks another build of it; a line that begins with ``--no-deps`` is installed last, without what it asks for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("llmcompressor", "gptqmodel", "published")


def requirements(tool: str) -> list[str]:
    """Return what a tool's environment holds, PyTorch first."""
    lines = (HERE / f"requirements-{tool}.txt").read_text("utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def python_of(folder: Path, tool: str) -> Path:
    """Return the interpreter that runs a tool: its environment's, or this one for ours."""
    return Path(sys.executable) if tool == "angelslim" else folder / tool / "bin" / "python"


def make(folder: Path) -> None:
    """Make the environments that are not there yet; one that fails is reported and does not stop the others."""
    for tool in TOOLS:
        python = python_of(folder, tool)
        ready = folder / tool / ".ready"
        if ready.is_file() and ready.read_text("utf-8").splitlines() == requirements(tool):
            print(f"{tool}: ready")
            continue
        torch, *others = requirements(tool)
        bare = [line.split() for line in others if line.startswith("--no-deps")]
        together = [line for line in others if not line.startswith("--no-deps")]
        print(f"{tool}: installing {torch}, then {', '.join(others)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder / tool)], check=True)
        pip = [str(python), "-m", "pip", "install", "--no-input", "--quiet"]
        # PyTorch is named again, so that the others keep it
        if any(
            subprocess.run([*pip, *wanted], check=False).returncode
            for wanted in ([torch], [torch, *together], *bare)
        ):
            print(f"{tool}: did not install")
        else:
            ready.write_text("\n".join(requirements(tool)) + "\n", "utf-8")
