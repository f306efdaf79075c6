"""Conversations with images and sound, through processors as transformers has them."""

from __future__ import annotations

import base64
import io
import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from angelslim.base.errors import DataError
from angelslim.data.multimodal import builtin_conversations, multimodal_samples, read_conversations
from families import audio_processor, image_processor


def png(colour: tuple[int, int, int] = (250, 10, 10)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(stream, "PNG")
    return stream.getvalue()


def wav(rate: int, values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes((values * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def record(part: dict, text: str = "What?") -> dict:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": text}]}]}


def test_files_and_data_urls_give_the_same_image(tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [
        record({"type": "image", "image": "red.png"}),
        record({"type": "image_url", "image_url": {"url": url}}),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, other = (turns[0]["content"][0]["image"] for turns in read_conversations(tmp_path / "rows.jsonl"))
    assert one.size == (20, 12) and one.tobytes() == other.tobytes()


def test_signs_inside_a_text_end_no_line(tmp_path):
    """Python's splitlines takes U+2028 for the end of a line, and JSON may hold it as it is."""
    (tmp_path / "red.png").write_bytes(png())
    rows = [record({"type": "image", "image": "red.png"}, text) for text in ("one\u2028two", "three")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    texts = [turns[0]["content"][1]["text"] for turns in read_conversations(file)]
    assert texts == ["one\u2028two", "three"]


def test_sound_comes_at_the_rate_that_processors_ask_for(tmp_path):
    time = np.arange(8000) / 8000
    (tmp_path / "tone.wav").write_bytes(wav(8000, 0.5 * np.sin(2 * np.pi * 100 * time)))
    (tmp_path / "rows.json").write_text(json.dumps([record({"type": "audio", "audio": "tone.wav"})]))
    (turns,) = read_conversations(tmp_path / "rows.json")
    values = turns[0]["content"][0]["audio"]
    assert values.dtype == np.float32 and len(values) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 100 * np.arange(16000) / 16000)
    assert np.abs(values - expected)[:15990].max() < 2e-3


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "image", "image": "absent.png"}, "no file"),
        ({"type": "image", "image": "http://127.0.0.1/a.png"}, "on the network"),
        ({"type": "image", "image": "broken.png"}, "cannot be read"),
        ({"type": "audio", "audio": "broken.wav"}, "cannot be read"),
        ({"type": "smell", "smell": "x"}, "'smell' is not understood"),
    ],
)
def test_what_cannot_be_read_is_named(part, match, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    (tmp_path / "rows.jsonl").write_text(json.dumps(record(part)))
    with pytest.raises(DataError, match=match):
        list(read_conversations(tmp_path / "rows.jsonl"))


def test_a_processor_makes_samples_of_one_length_each():
    samples = multimodal_samples(image_processor(), None, kind="image", samples=3, max_length=200)
    assert len(samples) == 3
    for sample in samples:
        assert "attention_mask" not in sample and sample["input_ids"].shape[0] == 1
        assert sample["pixel_values"].shape == (1, 3, 16, 16)
        assert int((sample["input_ids"] == 90).sum()) == 16
    again = multimodal_samples(image_processor(), None, kind="image", samples=3, max_length=200)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(samples, again, strict=True))


def test_sound_becomes_features():
    (sample,) = multimodal_samples(audio_processor(), None, kind="audio", samples=1, max_length=200)
    assert sample["input_features"].shape[1] == 16 and int((sample["input_ids"] == 90).sum()) > 0


def test_samples_that_do_not_fit_are_refused_with_the_way_out():
    with pytest.raises(DataError, match="No conversation of at most 5 tokens") as caught:
        multimodal_samples(image_processor(), None, kind="image", samples=2, max_length=5)
    assert "max_seq_length" in caught.value.fix


def test_the_builtin_conversations_differ_and_repeat():
    one, other = (list(builtin_conversations("image", 8, seed=1)) for _ in range(2))
    answers = [turns[1]["content"][0]["text"] for turns in one]
    assert answers == [turns[1]["content"][0]["text"] for turns in other] and len(set(answers)) > 3
