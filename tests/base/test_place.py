"""The folder of unfinished work is taken over by the same work only."""

import os
from pathlib import Path

import pytest

from angelslim.base.errors import UserError
from angelslim.base.place import fingerprint, leave, open_place


def opened(place: Path, mark: str, overwrite: bool = False) -> bool:
    return open_place(place, mark, "other work", fix="Delete it.", overwrite=overwrite)


def test_the_same_work_finds_its_folder_and_other_work_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    assert not opened(place, "one")
    (place / "part").touch()
    assert opened(place, "one")
    with pytest.raises(UserError, match="other work"):
        opened(place, "two")
    assert (place / "part").exists()
    assert not opened(place, "two", overwrite=True)
    assert not (place / "part").exists()


def test_a_torn_marker_belongs_to_nobody(tmp_path: Path) -> None:
    opened(tmp_path / "place", "one")
    (tmp_path / "place" / "job.json").write_text('{"finger')
    with pytest.raises(UserError, match="other work"):
        opened(tmp_path / "place", "one")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "job.json.tmp").touch()
    opened(tmp_path, "one")  # a kill before the marker had its name
    (tmp_path / "job.json").unlink()
    (tmp_path / "letter.txt").touch()
    with pytest.raises(UserError, match="in the way"):
        opened(tmp_path, "one")


def test_the_fingerprint_follows_facts_files_and_version(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text("a")
    first = fingerprint({"seed": 0}, [file], "1")
    assert first == fingerprint({"seed": 0}, [str(file)], "1")
    assert first != fingerprint({"seed": 1}, [file], "1")
    assert first != fingerprint({"seed": 0}, [file], "2")
    stat = file.stat()
    file.write_text("ab")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert first != fingerprint({"seed": 0}, [file], "1")
    file.write_text("a")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert first != fingerprint({"seed": 0}, [file], "1")


def test_a_folder_in_which_nothing_was_kept_goes(tmp_path: Path) -> None:
    place = tmp_path / "out.partial"
    opened(place, "one")
    (place / "part").touch()
    leave(place)
    assert (place / "part").exists()
    (place / "part").unlink()
    leave(place)
    assert not place.exists()
