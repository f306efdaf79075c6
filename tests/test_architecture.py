"""The rules of the house, as tests: layers, sizes, names, what the package may not contain."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from angelslim.config.recipe import load, recipes
from angelslim.config.upstream import METHODS, stages
from angelslim.data.curation.base import STAGES
from angelslim.export.base import FORMATS
from angelslim.methods.base import PTQ, QAT
from angelslim.methods.sparse.selectors.base import SELECTORS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "angelslim"
LAYERS = {
    "base": 0,
    "numerics": 1,
    "config": 2,
    "kernels": 2,
    "recipes": 2,
    "models": 3,
    "data": 3,
    "methods": 4,
    "export": 4,
    "evaluate": 4,
    "report": 5,
    "job": 5,
    "train": 5,
    "teacher": 5,
    "serve": 5,
    "reopen": 5,
    "trial": 5,
    "vllm_attention": 5,
    "plan": 6,
    "sweep": 6,
    "work": 6,
    "check": 6,
    "pipeline": 7,
    "convert": 7,
    "analyze": 7,
    "training": 8,
    "prefill": 8,
    "lab": 8,
    "engine": 9,
    "cli": 10,
}
ALLOWED_UPWARDS: dict[tuple[str, str], str] = {}  # (module, imported) -> the reason; none so far
MAY_IMPORT_BY_NAME = {"__init__", "base.registry"}  # the lazy face and the registries
METHOD_FREE = ("pipeline", "work", "job", "models", "export")
FILE_LINES, FUNCTION_LINES = 400, 60
LINK_HOSTS = {"127.0.0.1", "localhost", "www.apache.org", "arxiv.org", "github.com", "www.w3.org"}
MACHINE_PATH = re.compile("/wo" + "rk/|/ro" + r"ot/|/ho" + r"me/\w|/Use" + r"rs/\w|(?<!\w)[A-Z]:\\\\Users")

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def top(module: str) -> str:
    """``models.walk`` -> ``models``: the unit that has a layer."""
    return module.split(".")[0]


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """Every module of the package that `module` imports, anywhere in the file, as a dotted name."""
    package = [] if module == "__init__" else module.removesuffix(".__init__").split(".")
    if not module.endswith("__init__"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.split(".")[0] == "angelslim"]
            yield from (name.removeprefix("angelslim").lstrip(".") for name in names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and (node.module or "").split(".")[0] != "angelslim":
                continue
            if node.level:
                base = package[: len(package) - node.level + 1]
                base += node.module.split(".") if node.module else []
            else:
                base = (node.module or "").split(".")[1:]
            for name in node.names:
                longer = ".".join([*base, name.name])
                known = longer in MODULES or f"{longer}.__init__" in MODULES
                yield longer if known else ".".join(base)


IMPORTS = {module: set(imported(module, tree)) for module, tree in TREES.items()}


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the string nodes that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                found.add(id(first.value))
    return found


# ------------------------------------------------------------------------------------------- layers


def test_every_module_has_a_layer() -> None:
    names = {top(module) for module in MODULES if module not in ("__init__", "__main__")}
    assert names - set(LAYERS) == set(), "give the new module a layer here and in ARCHITECTURE.md"


def test_imports_point_to_lower_layers() -> None:
    wrong = []
    for module, targets in IMPORTS.items():
        if module in ("__init__", "__main__"):
            continue
        for target in targets:
            if target == "" or top(target) == top(module) or (module, target) in ALLOWED_UPWARDS:
                continue
            if LAYERS[top(target)] >= LAYERS[top(module)]:
                wrong.append(f"{module} (L{LAYERS[top(module)]}) -> {target} (L{LAYERS[top(target)]})")
    assert wrong == []


def test_exceptions_are_still_needed() -> None:
    assert [pair for pair in ALLOWED_UPWARDS if pair[1] not in IMPORTS.get(pair[0], set())] == []


def test_the_import_reader_sees_every_spelling() -> None:
    tree = ast.parse(
        "from . import walk\nfrom ..base.errors import UserError\nimport angelslim.job\n"
        "def f():\n    from angelslim.models import loading\nif TYPE_CHECKING:\n    from ..numerics import scheme"
    )
    found = set(imported("models.select", tree))
    assert found == {"models.walk", "base.errors", "job", "models.loading", "numerics.scheme"}


@pytest.mark.parametrize("folder", ["methods.ptq", "methods.qat", "methods.sparse.selectors"])
def test_methods_never_import_each_other(folder: str) -> None:
    inside = {name for name in MODULES if name.startswith(f"{folder}.") and not name.endswith("__init__")}
    entries = {name for name in inside if not name.rpartition(".")[2].startswith("_")}
    assert entries, folder
    wrong = [(name, target) for name in entries for target in IMPORTS[name] if target in entries]
    assert wrong == []


def test_modules_are_imported_by_name_in_registries_only() -> None:
    found = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "import_module"
    }
    assert found <= MAY_IMPORT_BY_NAME


def test_packages_state_their_layer() -> None:
    wrong = []
    for name, layer in LAYERS.items():
        for module in (name, f"{name}.__init__"):
            text = ast.get_docstring(TREES[module]) or "" if module in TREES else f"Layer {layer}:"
            if not text.startswith(f"Layer {layer}:"):
                wrong.append(f"{module} should begin with 'Layer {layer}:'")
    assert wrong == []


# ------------------------------------------------------------------------------------------ contents


def test_the_pipeline_knows_no_method() -> None:
    words = {*PTQ, *recipes(), *METHODS}
    pattern = re.compile(r"(?<![\w-])(" + "|".join(sorted(map(re.escape, words))) + r")(?![\w-])")
    wrong = []
    for module, tree in TREES.items():
        if top(module) not in METHOD_FREE:
            continue
        own = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in own:
                found = pattern.search(node.value)
                if found:
                    wrong.append(f"{module}:{node.lineno} names {found[1]!r}")
    assert wrong == []


def test_files_and_functions_stay_small() -> None:
    files = [
        f"{module}: {count} lines"
        for module, path in MODULES.items()
        if (count := len(path.read_text("utf-8").splitlines())) > FILE_LINES
    ]
    functions = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTION) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert files + functions == []


def test_nothing_prints() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == [], "the console module speaks for the package"


def public(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public classes and functions below a module or class; what is inside a function is private."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTION)) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}.{child.name}")


def test_every_public_name_teaches() -> None:
    bare = [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    bare += [
        name
        for module, tree in TREES.items()
        for name, node in public(tree, module)
        if not ast.get_docstring(node)
    ]
    assert bare == []


@pytest.mark.parametrize("start", ["angelslim", "angelslim.cli", "angelslim.config"])
def test_imports_are_light(start: str) -> None:
    heavy = ["torch", "transformers", "numpy", "matplotlib", "accelerate", "datasets", "lm_eval", "vllm"]
    heavy += ["pydantic"] if start == "angelslim" else []
    code = f"import sys, {start}; sys.stdout.write(' '.join(n for n in {heavy!r} if n in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded == ""


# ---------------------------------------------------------------------------- recipes, methods, formats


def documentation() -> str:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(page.read_text("utf-8") for page in pages)


def test_recipes_load_and_are_documented() -> None:
    text = documentation()
    assert recipes()
    for name in recipes():
        assert stages(load(name).config), name
        assert f"`{name}`" in text, f"the recipe {name} is in no page of docs/"


@pytest.mark.parametrize("kind", ["method", "quantizer", "format", "stage", "selector"])
def test_entries_have_page_and_test(kind: str) -> None:
    places = {
        "method": (PTQ, "methods"),
        "quantizer": (QAT, "methods"),
        "format": (FORMATS, "export"),
        "stage": (STAGES, "data"),
        "selector": (SELECTORS, "methods/sparse/selectors"),
    }
    registry, folder = places[kind]
    text, tests = documentation(), {path.stem for path in (ROOT / "tests" / folder).rglob("test_*.py")}
    for name in registry:
        assert f"`{name}`" in text, f"the {kind} {name} is in no page of docs/"
        assert f"test_{name}" in tests, f"tests/{folder}/test_{name}.py is missing"
    if kind == "method":
        used = {stage.method for name in recipes() for stage in stages(load(name).config)}
        assert set(registry) <= used, "a method without a recipe"


# -------------------------------------------------------------------------------------- the project


def project_files() -> list[Path]:
    """Every tracked file; without git, every file that is no build output."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
        return [path for path in found if path.is_file()]
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in ("build", "site") and not name.startswith(".")]
        found += [Path(folder, name) for name in files]
    return found


def test_no_machine_path_and_no_strange_host() -> None:
    wrong = defaultdict(set)
    for path in project_files():
        if path.suffix in (".safetensors", ".png") or path.name == "tokenizer.json":
            continue
        text = path.read_text("utf-8", errors="replace")
        hosts = set(re.findall(r"https?://([A-Za-z0-9][A-Za-z0-9.-]*)", text)) - LINK_HOSTS
        paths = {found.group() for found in MACHINE_PATH.finditer(text)}
        if hosts or paths:
            wrong[str(path.relative_to(ROOT))] |= hosts | paths
    assert dict(wrong) == {}


def listed_in_architecture() -> set[str]:
    """The paths of the annotated tree in ARCHITECTURE.md, relative to the package."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    block = re.search(r"```text\nsrc/angelslim/\n(.*?)```", text, re.DOTALL)
    assert block, "ARCHITECTURE.md has no tree"
    found, parents = set(), []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        parents[depth:] = [name.rstrip("/")]
        found.add("/".join(parents) + ("/" if name.endswith("/") else ""))
    return found


def test_architecture_page_is_true() -> None:
    listed = listed_in_architecture()
    modules = {path.relative_to(PACKAGE) for path in MODULES.values()}
    there = {str(path) for path in modules if path.name != "__init__.py" or path.parent == Path()}
    there |= {f"{path.parent}/" for path in modules if path.name == "__init__.py" and path.parent != Path()}
    there |= {f"{name}/" for name in ("recipes", "assets", "report/templates") if (PACKAGE / name).is_dir()}
    assert {"not in ARCHITECTURE.md": there - listed, "not in the code": listed - there} == {
        "not in ARCHITECTURE.md": set(),
        "not in the code": set(),
    }


def test_architecture_page_has_the_layers() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    tree = text.partition("src/angelslim/\n")[2].partition("```")[0]
    stated = {
        name.rstrip("/").removesuffix(".py"): int(layer)
        for name, layer in re.findall(r"^  (\w+(?:\.py|/))\s+L(\d+)\b", tree, re.MULTILINE)
    }
    assert stated == {name: layer for name, layer in LAYERS.items() if name in stated}
    here = {top(module) for module in MODULES} - {"__init__", "__main__"} | {"recipes"}
    assert set(stated) == here
