import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from angelslim.base.errors import DataError, MissingExtra
from angelslim.data.records import read_records

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ASKED[1]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"instruction": "Hi", "input": "", "output": "Ho"},
        {"prompt": "Hi", "response": "Ho"},
        {"prompt": "Hi", "completion": "Ho"},
    ],
)
def test_every_shape_of_conversation_reads_alike(row: dict[str, Any], write: Any) -> None:
    assert list(read_records(write("a.jsonl", json.dumps(row)))) == [ASKED]


def test_system_and_input_are_kept(write: Any) -> None:
    rows = [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}]},
        {"instruction": "Translate.", "input": "Hi", "output": "Ho"},
    ]
    first, second = read_records(write("a.json", json.dumps(rows)))
    assert first[0] == {"role": "system", "content": "Be brief."}
    assert second[0] == {"role": "user", "content": "Translate.\nHi"}


def test_texts_and_blank_lines(write: Any) -> None:
    assert list(read_records(write("a.jsonl", '{"text": "one"}\n\n{"text": "two"}\n'))) == ["one", "two"]
    assert list(read_records(write("a.md", "# one\n"))) == ["# one\n"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "tw\n', r"a\.jsonl, line 2: Not valid JSON"),
        ("a.jsonl", '{"text": "one"}\n[1]\n', r"line 2: Expected a JSON object, found list"),
        ("a.jsonl", '{"question": 1, "reply": 2}\n', r"line 1: .*unknown shape \(keys: question, reply\)"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"line 1: .*lacks its role or its text"),
        ("a.jsonl", '{"messages": "Hi"}\n', r"line 1: .*not a list of turns"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            r"no text.*MultiModalDataset",
        ),
        ("a.json", '[{"text": "one"}, {"txt": "two"}]', r"a\.json, record 1: .*unknown shape"),
        ("a.jsonl", "", "empty"),
        ("a.txt", b"\xff\xfe\x00", "Not UTF-8"),
        ("a.csv", "a,b", r"'\.csv' are not read"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(name: str, content: Any, said: str, write: Any) -> None:
    with pytest.raises(DataError, match=said):
        list(read_records(write(name, content)))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        list(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="folder"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("source", ["a.parquet", "owner/name,config"])
def test_datasets_is_asked_for_by_name(
    source: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    place = write(source, "PAR1") if source.endswith("parquet") else source
    with pytest.raises(MissingExtra, match=r"angelslim\[eval\]"):
        list(read_records(place))


class Hub(ModuleType):
    """Stands for `datasets`, which is an extra: one data set is in its cache."""

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    __path__ = ()  # makes it a package, so that datasets.config can be imported

    def load_dataset(self, repository: str, config: str | None, split: str) -> list[dict[str, str]]:
        assert self.config.HF_HUB_OFFLINE and split == "train"
        if (repository, config) != ("owner/name", "small"):
            raise ConnectionError("offline")
        return [{"text": "one"}, {"text": "two"}]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    module = Hub("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setitem(sys.modules, "datasets.config", module.config)
    return module


def test_a_cached_hub_data_set_is_read_without_the_network(hub: Hub) -> None:
    assert list(read_records("owner/name,small")) == ["one", "two"]
    assert hub.config.HF_HUB_OFFLINE is False, "the switch is put back"


def test_a_hub_data_set_outside_the_cache_says_how_to_fetch_it(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"load_dataset\('owner/name', 'large'\)"):
        list(read_records("owner/name,large"))
    assert hub.config.HF_HUB_OFFLINE is False


def test_parquet_is_read_row_by_row_whatever_the_file_is_called(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "part[1].parquet"
    datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(5)]).to_parquet(str(path))
    rows = read_records(path)
    assert next(rows) == "row 0"
    assert list(rows) == [f"row {number}" for number in range(1, 5)]


def test_a_damaged_parquet_file_is_named(write: Any) -> None:
    with pytest.raises(DataError, match=r"broken\.parquet: Not a parquet file"):
        list(read_records(write("broken.parquet", "PAR1 and nothing more")))
