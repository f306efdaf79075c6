import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelslim.base.errors import ConfigError
from angelslim.config.files import parse_yaml, plain, read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("5E4", 5e4), ("-1e+3", -1e3), (".5", 0.5), ("3", 3), ('"1e-6"', "1e-6"), ("None", "None"), ("NULL", None),
     ("0,1", "0,1"), ("1e", "1e"), ("e5", "e5"), ("2026-01-02", "2026-01-02"), ("yes", True), ("~/x", "~/x"), ("", None)],
)  # fmt: skip
def test_scalars(text, value):
    got = parse_yaml(text, "here")
    assert got == value
    assert type(got) is type(value)


def test_keys_become_strings_and_merge_keys_work():
    text = "a: &a {x: 1, 7: 2}\nb: {<<: *a, x: 3}\n"
    assert parse_yaml(text, "here") == {"a": {"x": 1, "7": 2}, "b": {"x": 3, "7": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model:\n  name: a\n  name: b\n", r"line 3, column 3: .*'name' is given twice"),
        (b"a: 1\nb: {c: 1, c: 2}\n", r"line 2, column 11: .*'c' is given twice"),
        (b"model: [1, 2\nx: 1", r"line 2, column 2: Not valid YAML"),
        (b"model:\n\t- x", r"line 2, column 1: Not valid YAML"),
        (b"", r"The file is empty"),
        (b"# only words\n", r"The file is empty"),
        (b"- a\n- b\n", r"holds a list, not sections"),
        (b"just words", r"holds a text, not sections"),
        (b"12", r"holds a number"),
        (b"a: \xff\xfe", r"Not UTF-8 text \(byte 3\)"),
        (b"a: 1\n---\nb: 2\n", r"Not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", r"Not valid YAML"),
        (b"a: *b\n", r"Not valid YAML"),
        (b"a: \x07", r"Not valid YAML"),
        (b"a: .nan\n", r"not finite"),
        (b"a: &a [*a]\n", r"unfolds into too many values"),
        (b"a: " + b"[" * 60 + b"]" * 60, r"too many values"),
        (b"a: " + b"[" * 3000, r"Not valid YAML|nested too deeply"),
        (b"{[1]: 2}", r"Not valid YAML"),
        (b"a: 2026-99-99", r"Not valid YAML"),
    ],
)
def test_broken_files_say_where(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(path)
    assert "run.yaml" in str(caught.value)


def test_aliases_cannot_unfold_without_end(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="too many values"):
        read_yaml(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="This is a folder"):
        read_yaml(tmp_path)


def test_byte_order_mark_is_no_key(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: 1\n")
    assert read_yaml(path) == {"model": 1}


def test_python_objects_are_refused():
    with pytest.raises(ConfigError, match="type object"):
        plain({"a": object()}, "given")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(write_yaml(value), "here") == value


@pytest.mark.parametrize(
    "text", ["1e-6", "1e5", "no", "null", "12", "0x1f", "12:30", "2026-01-02", "~", ".5", "=", "<<"]
)
def test_texts_that_look_like_numbers_stay_texts(text):
    assert parse_yaml(write_yaml({"a": text}), "here") == {"a": text}
