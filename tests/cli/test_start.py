"""What starts fast stays light: neither torch nor transformers is loaded for help and names."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "safetensors", "matplotlib", "accelerate", "compressed_tensors")
LIGHT = "import sys; {code}; print(','.join(m for m in {heavy!r} if m in sys.modules))"
COMMANDS = (
    "run",
    "plan",
    "quickstart",
    "inspect",
    "validate",
    "ls",
    "cp",
    "env",
    "eval",
    "export",
    "serve",
    "lab",
    "analyze",
    "sensitivity",
)


def loaded(code: str) -> str:
    text = LIGHT.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


HELP = (
    "from typer.testing import CliRunner; from angelslim.cli import app; "
    "result = CliRunner().invoke(app, {words!r}); assert result.exit_code == {code}, result.output"
)


@pytest.mark.parametrize(
    "code",
    [
        "import angelslim; angelslim.__version__; dir(angelslim)",
        HELP.format(words=["--help"], code=0),
        HELP.format(words=["run", "--help"], code=0),
        HELP.format(words=["validate", "fp8_static", "int4_rtn"], code=0),
        HELP.format(words=["cp", "nothing"], code=1),  # the runner turns a UserError into 1, main into 2
    ],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded(code) == ""


def test_names_of_the_package_are_loaded_when_used():
    import angelslim

    assert callable(angelslim.compress) and callable(angelslim.load) and angelslim.Engine
    assert angelslim.builtin_model("tiny-lm").name == "tiny-lm"
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        angelslim.compres  # noqa: B018
    assert set(angelslim.__all__) == set(dir(angelslim))


def test_the_installed_commands_agree():
    from importlib.metadata import entry_points

    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "angelslim"]
    assert script.value == "angelslim.cli:main"
    done = subprocess.run([sys.executable, "-m", "angelslim", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, cli):
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert "Usage:" in outcome.out


@pytest.mark.parametrize(
    "command",
    ["run", "plan", "inspect", "validate", "analyze", "sensitivity", "cp", "eval", "export", "serve"],
)
def test_help_has_examples(command, cli):
    assert f"angelslim {command} " in cli(command, "--help").out.partition("Usage:")[2].partition("\n")[2]


def test_no_command_shows_the_help(cli):
    assert "quickstart" in cli().out
