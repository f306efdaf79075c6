"""Read data files into records: a record is either one text or one conversation.

Shapes understood, one record a line (``.jsonl``), one list (``.json``) or one row (``.parquet``, hub):

- ``{"messages": [{"role", "content"}, ...]}``
- ``{"conversations": [{"from", "value"}, ...]}``, as ShareGPT exports have it (an own ``"system"`` key too)
- ``{"instruction", "input", "output"}``, as Alpaca has it (``input`` may be missing or empty)
- ``{"prompt", "response"}`` or ``{"prompt", "completion"}``
- ``{"text": ...}``

A ``.txt`` or ``.md`` file is one text. Everything else is a `DataError` that names the file and the line.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base.errors import DataError, MissingExtra
from .chat import Messages
from .offline import hub_offline

Record = str | Messages

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".parquet")
SHAPES = "'messages', 'conversations', 'instruction'/'output', 'prompt'/'response' or 'text'"
_HUB = re.compile(r"[\w.-]+/[\w.-]+(,[\w.-]+)?")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def read_records(source: str | Path) -> Iterator[Record]:
    """Yield the records of a file, or of a data set of the hub that is already in the local cache."""
    path = Path(source).expanduser()
    if path.is_file():
        yield from _read_file(path)
    elif path.is_dir():
        raise DataError("This is a folder, not a data file.", where=str(source), fix=_name_one())
    elif path.suffix not in SUFFIXES and _HUB.fullmatch(str(source)):
        yield from _read_hub(str(source))
    else:
        raise DataError("There is no such data file.", where=str(source), fix=_name_one())


def _name_one() -> str:
    return f"Name a file ({', '.join(SUFFIXES)}), or use 'builtin' for the built-in data."


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"Files of the kind {path.suffix!r} are not read.", where=str(path), fix=_name_one())
    if path.stat().st_size == 0:
        raise DataError("The file is empty.", where=str(path), fix=_name_one())
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.suffix in (".txt", ".md"):
        yield _decode(path.read_bytes(), str(path))
    elif path.suffix == ".json" and path.read_bytes()[:64].lstrip().startswith(b"["):
        for index, row in enumerate(_parse(path.read_bytes(), str(path))):
            yield to_record(row, f"{path}, record {index}")
    else:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if line.strip():
                    yield to_record(_parse(line, where), where)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Not UTF-8 text (byte {error.start}).", where=where, fix="Convert it to UTF-8."
        ) from error


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(raw, where))
    except json.JSONDecodeError as error:
        raise DataError(
            f"Not valid JSON: {error.msg} (column {error.colno}).",
            where=where,
            fix="Correct or remove it; a .jsonl file holds one JSON object a line.",
        ) from error


def to_record(row: Any, where: str) -> Record:
    """Turn one parsed object into a record; an unknown shape is a `DataError` naming its keys."""
    if not isinstance(row, dict):
        raise DataError(
            f"Expected a JSON object, found {type(row).__name__}.", where=where, fix=f"Use {SHAPES}."
        )
    if row.get("messages") or row.get("conversations"):
        turns = row.get("messages") or row["conversations"]
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [_message(turn, where) for turn in [*system, *_as_list(turns, where)]]
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return _ask("\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"])
    reply = row.get("response", row.get("completion"))
    if isinstance(row.get("prompt"), str) and isinstance(reply, str):
        return _ask(row["prompt"], reply)
    keys = ", ".join(map(str, row)) or "none"
    raise DataError(f"Record of unknown shape (keys: {keys}).", where=where, fix=f"Use {SHAPES}.")


def _ask(question: str, reply: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _as_list(turns: Any, where: str) -> list[Any]:
    if not isinstance(turns, list):
        raise DataError("The conversation is not a list of turns.", where=where, fix=f"Use {SHAPES}.")
    return turns


def _message(turn: Any, where: str) -> dict[str, str]:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    if isinstance(content, list):  # the parts of a multimodal message; only text can be used here
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if isinstance(role, str) and len(texts) < len(parts):
            raise DataError(
                "A turn of the conversation has parts that are no text, such as images or sound.",
                where=where,
                fix="To calibrate with them set dataset.name to MultiModalDataset or AudioDataset; else remove them.",
            )
        content = "".join(texts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            "A turn of the conversation lacks its role or its text.",
            where=where,
            fix="Each turn needs 'role' and 'content' (or 'from' and 'value'), both strings.",
        )
    return {"role": _ROLES.get(role, role), "content": content}


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", "eval", purpose) from error
    return datasets


def _read_parquet(path: Path) -> Iterator[Record]:
    _datasets("Reading a .parquet file")
    from datasets.io.parquet import ParquetDatasetReader

    try:  # streamed row by row; the reader takes patterns, and a name may look like one
        rows = enumerate(ParquetDatasetReader(glob.escape(str(path)), streaming=True).read())
        yield from (to_record(row, f"{path}, row {index}") for index, row in rows)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        fix = "Write the file again, or give the data as .jsonl."
        raise DataError(f"Not a parquet file that can be read: {reason}", where=str(path), fix=fix) from error


def _read_hub(name: str) -> Iterator[Record]:
    datasets = _datasets(f"Reading the data set {name!r}")
    repository, _, config = name.partition(",")
    try:
        with hub_offline():
            rows = datasets.load_dataset(repository, config or None, split="train")
    except (OSError, ValueError) as error:  # what the library raises for a data set that is not in the cache
        command = f"datasets.load_dataset({repository!r}" + (f", {config!r})" if config else ")")
        raise DataError(
            f"The data set {name!r} is neither a file here nor in the local cache of the hub.",
            fix=f"Fetch it once with {command} where there is a network, or name a local file.",
        ) from error
    for index, row in enumerate(rows):
        yield to_record(row, f"{name}, row {index}")
