"""The README and the docs are programs: every command, snippet, configuration and shown output is tried here.

On each page the ``bash`` and ``python`` blocks run in order in one empty folder. A ``text`` block right after one
shows its output: each line must occur in it (``...`` stands for lines left out). A ``yaml`` block must be a
configuration that loads. ``<!-- no-run: reason -->`` above a block leaves it out; only what starts servers, makes
environments or takes minutes may say so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from angelslim.cli import app
from angelslim.config.recipe import load

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NO_RUN = re.compile(r"<!-- no-run: (?P<reason>\S.*?) -->")
MAY_STAY_UNRUN = re.compile(
    r"make [a-z]+( .*)?|pip install .+|angelslim serve (?!.*--dry-run).+|angelslim (lab train|quickstart).*"
    r"|(python -m )?(vllm serve|sglang\.launch_server) .+|curl .+|\.venv/bin/pre-commit install"
)
RUNS = ("bash", "python")
KNOWN = {*RUNS, "text", "yaml"}
COMMANDS = set(getattr(get_command(app), "commands", {}))


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page."""

    language: str
    code: str
    line: int
    no_run: str  # the reason, or empty


def fences(page: Path) -> list[Fence]:
    """The blocks of a page in order."""
    found: list[Fence] = []
    lines = page.read_text("utf-8").splitlines()
    start, language, indent, reason = 0, "", "", ""
    for number, line in enumerate(lines, 1):
        mark = re.match(r"(\s*)```(.*)$", line)
        if mark and not start:
            start, language, indent = number, mark[2].strip(), mark[1]
            above = NO_RUN.fullmatch(lines[number - 2].strip()) if number > 1 else None
            reason = above["reason"] if above else ""
        elif mark:
            body = [text.removeprefix(indent) for text in lines[start : number - 1]]
            found.append(Fence(language, "\n".join(body) + "\n", start, reason))
            start = 0
    assert not start, f"{page.name}:{start}: the block does not end"
    return found


def commands(code: str) -> list[str]:
    """The lines of a shell block without comments and blank lines, continuations joined."""
    joined = code.replace("\\\n", " ")
    return [
        line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]


def environment() -> dict[str, str]:
    """No network, one thread, this installation first, and a terminal of fixed width."""
    here = str(Path(sys.executable).parent)
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    return {**os.environ, **settings, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}


def execute(fence: Fence, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one block in `folder`."""
    if fence.language == "bash":
        words = ["bash", "-euo", "pipefail", "-c", fence.code]
    else:
        words = [sys.executable, "-c", "import torch\ntorch.set_num_threads(1)\n" + fence.code]
    return subprocess.run(
        words,
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def squeezed(text: str) -> str:
    return " ".join(text.split())


def trouble(page: Path, folder: Path) -> str:
    """Run a page in `folder`; return what went wrong first, or an empty string."""
    said: list[str] | None = None
    for fence in fences(page):
        where = f"{page.name}:{fence.line}"
        shown, said = said, None
        if fence.language in RUNS and not fence.no_run:
            done = execute(fence, folder)
            if done.returncode:
                return f"{where} ended with {done.returncode}:\n{done.stdout}"
            said = [squeezed(line) for line in done.stdout.splitlines()]
        elif fence.language == "text" and shown is not None:
            lines = [squeezed(line) for line in fence.code.splitlines() if line.strip() not in ("", "...")]
            missing = [line for line in lines if not any(line in spoken for spoken in shown)]
            if missing:
                return f"{where} shows {missing}, which is not in:\n" + "\n".join(shown)
    return ""


@pytest.fixture(scope="module")
def troubles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The outcome of every selected page; two pages run at a time, each on one thread."""
    calls = [
        getattr(item, "callspec", None) for item in request.session.items if "troubles" in item.fixturenames
    ]
    pages = [call.params["page"] for call in calls if call]
    folders = [tmp_path_factory.mktemp(page.stem) for page in pages]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(pages, pool.map(trouble, pages, folders), strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, troubles: dict[Path, str]) -> None:
    assert not troubles[page], troubles[page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_well_formed(page: Path) -> None:
    for fence in fences(page):
        where = f"{page.name}:{fence.line}"
        assert fence.language in KNOWN, f"{where}: a block of kind {fence.language!r}"
        if fence.language == "yaml":
            load(yaml.safe_load(fence.code))
        if fence.no_run:
            assert fence.language == "bash", where
            wrong = [line for line in commands(fence.code) if not MAY_STAY_UNRUN.fullmatch(line)]
            assert wrong == [], f"{where}: these can be run"
    marks = len(NO_RUN.findall(page.read_text("utf-8")))
    assert marks == sum(bool(fence.no_run) for fence in fences(page)), "a no-run mark that touches no block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_prose_exist(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    named = set(re.findall(r"`angelslim ([a-z]\w*)", prose))
    assert named - COMMANDS == set()


def test_every_command_has_an_executed_example() -> None:
    page = ROOT / "docs" / "commands.md"
    run = " ".join(
        line for fence in fences(page) if fence.language == "bash" for line in commands(fence.code)
    )
    assert {name for name in COMMANDS if f"angelslim {name} " not in f"{run} "} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_site_builds(tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    html = (tmp_path / "site" / "index.html").read_text("utf-8")
    outside = re.findall(r"(?:src|href)=[\"']?(https?://[^\"'> ]+\.(?:js|css|woff2?))", html)
    outside += re.findall(r"https?://fonts\.[^\"'> ]+", html)
    assert outside == [], "the site must not need the network"


def test_a_wrong_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for body, complaint in (
        ("```bash\nfalse\n```\n", "ended with 1"),
        ("```python\nraise SystemExit(3)\n```\n", "ended with 3"),
        ("```bash\necho one\n```\n\n```text\ntwo\n```\n", "shows ['two']"),
    ):
        page.write_text(body)
        assert complaint in trouble(page, tmp_path)
    page.write_text("```bash\necho  one   two\n```\n\n```text\none two\n```\n")
    assert trouble(page, tmp_path) == ""
