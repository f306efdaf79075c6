from __future__ import annotations

import subprocess
import sys

import pytest

from angelslim.base.errors import ConfigError
from angelslim.base.registry import Registry


@pytest.fixture
def registry(tmp_path, monkeypatch):
    package = tmp_path / "zoo"
    (package / "cages").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cat.py").write_text('"""A small animal.\n\nMore words."""\nANIMAL = "meow"\n')
    (package / "dog.py").write_text("ANIMAL = 'woof'\n")
    (package / "base.py").write_text("raise RuntimeError('helpers are not entries')\n")
    (package / "_hidden.py").write_text("ANIMAL = 'shh'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry("animal", "zoo", "ANIMAL")
    for name in [name for name in sys.modules if name.partition(".")[0] == "zoo"]:
        del sys.modules[name]


def test_a_file_is_an_entry(registry):
    assert list(registry) == ["cat", "dog"]
    assert registry.get("cat") == "meow"
    assert "dog" in registry and "base" not in registry and "_hidden" not in registry


def test_names_and_summaries_import_nothing(registry):
    assert registry.summary("cat") == "A small animal."
    assert registry.summary("dog") == ""
    assert "zoo.cat" not in sys.modules


def test_an_unknown_name_suggests_the_nearest(registry):
    with pytest.raises(ConfigError, match=r"Unknown animal 'catt'. Did you mean 'cat'"):
        registry.get("catt")


def test_entry_points_add_entries(registry, monkeypatch):
    class Entry:
        name, value = "cow", "zoo.dog"

    monkeypatch.setattr(
        "angelslim.base.registry.entry_points", lambda group: [Entry] if group == "angelslim.animals" else []
    )
    assert list(registry) == ["cat", "cow", "dog"]
    assert registry.get("cow") == "woof"


def test_an_entry_point_cannot_replace_a_built_in(registry, monkeypatch):
    class Entry:
        name, value = "cat", "zoo.dog"

    monkeypatch.setattr("angelslim.base.registry.entry_points", lambda group: [Entry])
    assert registry.get("cat") == "meow"


def test_listing_methods_does_not_load_torch():
    code = (
        "import sys; from angelslim.base.registry import Registry; "
        "r = Registry('method', 'angelslim.methods.ptq', 'METHOD'); assert r.summary('rtn'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
