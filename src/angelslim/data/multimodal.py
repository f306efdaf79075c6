"""Calibration samples with images and sound, made by the model's own processor.

A record is a conversation whose content is a list of parts, as chat APIs have it::

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "cat.png"},
                                               {"type": "text", "text": "What is this?"}]}]}

Parts are ``text``, ``image`` (or ``image_url`` with a ``url``) and ``audio`` (or ``audio_url``). Media are files beside
the data file or ``data:`` URLs; nothing is fetched. Images are read by Pillow; sound is WAV, or what soundfile reads,
as float32 at 16 kHz. A sample is what the processor returns, a dictionary of tensors, of
one conversation at its own length; one that is longer than allowed is left out, because a cut would lose part of an
image. Without a file, drawn shapes and tones are described (`builtin_conversations`): enough for the ranges of a
tower's features, no substitute for data like yours.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..base import console
from ..base.errors import DataError, MissingExtra, ModelError

Sample = dict[str, Tensor]
SUFFIXES = (".jsonl", ".json")
RATE = 16000  # samples a second: what the speech processors of transformers are made for
KINDS = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "black": (20, 20, 20)}
_TONES = {"low": 220.0, "middle": 440.0, "high": 1760.0}


def multimodal_samples(
    processor: Any, source: str | Path | None, *, kind: str, samples: int, max_length: int, seed: int = 0
) -> list[Sample]:
    """Return up to `samples` conversations as the processor encodes them; ``input_ids`` are ``[1, tokens]``.

    `kind` ("image" or "audio") chooses the built-in conversations when `source` is None or ``"builtin"``.
    """
    builtin = source is None or str(source) == "builtin"
    rows = builtin_conversations(kind, samples, seed) if builtin else read_conversations(Path(str(source)))
    found: list[Sample] = []
    longer = 0
    for messages in rows:
        sample = encode(processor, messages)
        if sample["input_ids"].shape[1] > max_length:
            longer += 1
        else:
            found.append(sample)
        if len(found) == samples:
            break
    where = "the built-in conversations" if builtin else str(source)
    if not found:
        fix = "Raise dataset.max_seq_length; an image alone can take over a thousand tokens."
        raise DataError(f"No conversation of at most {max_length} tokens.", where=where, fix=fix)
    if longer:
        console.log.warning("%s: %d conversations longer than %d tokens left out.", where, longer, max_length)
    if len(found) < samples:
        console.log.warning("%s holds %d samples; %d were asked for.", where, len(found), samples)
    return found


def processor_of(folder: Path) -> Any:
    """Load the processor of a vision or speech model; a missing one is a `ModelError`."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{folder} has no usable processor for images or sound ({reason}).",
            fix="Copy the model's preprocessor and processor files, or use dataset.name: TextDataset.",
        ) from error
    if not hasattr(found, "tokenizer"):
        raise ModelError(
            f"{folder} is a text model: its folder has a tokenizer and no processor.",
            fix="Use dataset.name: TextDataset.",
        )
    return found


def encode(processor: Any, messages: list[dict[str, Any]]) -> Sample:
    """Return the processor's tensors for one conversation; masks that hide nothing are left out."""
    from jinja2 import TemplateError

    parts = [part for turn in messages for part in turn["content"]]
    media = {kind: [part[kind] for part in parts if part["type"] == kind] for kind in ("image", "audio")}
    shown = [{**turn, "content": [_placeholder(part) for part in turn["content"]]} for turn in messages]
    try:
        text = processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=False)
        given: dict[str, Any] = {"images": media["image"]} if media["image"] else {}
        if media["audio"]:
            given |= {"audio": media["audio"], "sampling_rate": RATE}
        encoded = processor(text=[text], return_tensors="pt", **given)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"The model's processor refuses a conversation ({' '.join(str(error).split())[:160]}).",
            fix="Use the kinds of parts that this model reads.",
        ) from error
    tensors = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
    if "attention_mask" in tensors and bool(tensors["attention_mask"].all()):
        del tensors["attention_mask"]
    return tensors


def _placeholder(part: dict[str, Any]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"]}


def read_conversations(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the conversations of a ``.jsonl`` or ``.json`` file, media loaded; faults are a `DataError`."""
    path = path.expanduser()
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise DataError("There is no such data file.", where=str(path), fix="Name a .jsonl or .json file.")
    try:
        text = path.read_text("utf-8-sig")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else map(json.loads, filter(str.strip, text.split("\n")))
        )
        for number, row in enumerate(rows, 1):
            yield conversation(row, path.parent, f"{path}, record {number}")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"Not valid JSON ({error}).", where=str(path), fix="One JSON object a line."
        ) from error


def conversation(row: Any, folder: Path, where: str) -> list[dict[str, Any]]:
    """Return a record's turns with loaded media; a shape that is not understood is a `DataError`."""
    turns = row.get("messages") or row.get("conversations") if isinstance(row, dict) else None
    fix = (
        "Use {'messages': [{'role', 'content': [{'type': 'image', 'image': PATH}, {'type': 'text', ...}]}]}."
    )
    if not isinstance(turns, list) or not turns:
        raise DataError("The record has no messages.", where=where, fix=fix)
    messages = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(content, list) or not isinstance(turn.get("role"), str):
            raise DataError("A turn lacks its role or its content.", where=where, fix=fix)
        messages.append(
            {"role": turn["role"], "content": [_part(part, folder, where, fix) for part in content]}
        )
    return messages


def _part(part: Any, folder: Path, where: str, fix: str) -> dict[str, Any]:
    given = part.get("type") if isinstance(part, dict) else None
    if given == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = KINDS.get(str(given))
    value = (
        None
        if kind is None
        else part.get(str(given)) or part.get(kind) or part.get("path") or part.get("url")
    )
    value = value.get("url") or value.get("data") if isinstance(value, dict) else value
    if kind is None or not isinstance(value, str):
        raise DataError(f"A part of type {given!r} is not understood.", where=where, fix=fix)
    raw = _bytes(value, folder, where)
    return {"type": kind, kind: _image(raw, where) if kind == "image" else _sound(raw, where)}


def _bytes(value: str, folder: Path, where: str) -> bytes:
    if value.startswith("data:"):
        return base64.b64decode(value.partition(",")[2])
    if value.startswith(("http://", "https://")):
        raise DataError(f"{value} is on the network.", where=where, fix="Download it and name the file.")
    file = folder / value.removeprefix("file://")
    if not file.is_file():
        raise DataError(
            f"There is no file {str(file)!r}.", where=where, fix="Name media beside the data file."
        )
    return file.read_bytes()


def _image(raw: bytes, where: str) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtra("pillow", "media", "Reading images") from error
    try:
        return Image.open(io.BytesIO(raw)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"An image cannot be read ({error}).", where=where, fix="Use PNG or JPEG.") from error


def _sound(raw: bytes, where: str) -> Any:
    """Return mono float32 samples at `RATE`."""
    if raw[:4] == b"RIFF":
        try:
            with wave.open(io.BytesIO(raw)) as file:
                found, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
                data = np.frombuffer(file.readframes(file.getnframes()), f"<i{width}") / 2.0 ** (
                    8 * width - 1
                )
        except (wave.Error, TypeError) as error:
            raise DataError(
                f"A sound cannot be read ({error}).", where=where, fix="Use 16-bit WAV."
            ) from error
        values = data.reshape(-1, channels).mean(axis=1)
    else:
        try:
            import soundfile
        except ModuleNotFoundError as error:
            raise MissingExtra("soundfile", "media", "Reading sound other than WAV") from error
        try:
            stored, found = soundfile.read(io.BytesIO(raw), always_2d=True)
        except RuntimeError as error:
            raise DataError(
                f"A sound cannot be read ({error}).", where=where, fix="Use WAV or FLAC."
            ) from error
        values = stored.mean(axis=1)
    if found != RATE:
        places = np.arange(0, len(values), found / RATE)
        values = np.interp(places, np.arange(len(values)), values)
    return values.astype(np.float32)


def builtin_conversations(kind: str, count: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield described shapes (`kind` "image") or tones ("audio"), always the same ones for a seed."""
    rng = random.Random(seed)  # noqa: S311  not for secrets
    for _ in range(count):
        part, question, answer = _shape(rng) if kind == "image" else _tone(rng)
        asked = {"role": "user", "content": [part, {"type": "text", "text": question}]}
        yield [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def _shape(rng: random.Random) -> tuple[dict[str, Any], str, str]:
    try:
        from PIL import Image, ImageDraw
    except ModuleNotFoundError as error:
        raise MissingExtra("pillow", "media", "Drawing images") from error
    colour, round_ = rng.choice(list(_COLOURS)), rng.random() < 0.5
    ground = tuple(rng.randrange(150, 256) for _ in range(3))
    image = Image.new("RGB", (224, 224), ground)
    left, top, size = rng.randrange(20, 100), rng.randrange(20, 100), rng.randrange(40, 100)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if round_ else draw.rectangle)((left, top, left + size, top + size), fill=_COLOURS[colour])
    answer = f"A {colour} {'circle' if round_ else 'square'}, {size} pixels wide."
    return {"type": "image", "image": image}, "What does the picture show?", answer


def _tone(rng: random.Random) -> tuple[dict[str, Any], str, str]:
    name, seconds = rng.choice(list(_TONES)), rng.randrange(1, 4)
    time = np.arange(seconds * RATE) / RATE
    values = 0.3 * np.sin(2 * math.pi * _TONES[name] * time) * (1 - time / seconds)
    answer = f"A {name} tone that fades away in {seconds} seconds."
    return {"type": "audio", "audio": values.astype(np.float32)}, "What do you hear?", answer
