"""The whole pipeline on a planted corpus with known answers: counts, bytes, kills, refusals."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from angelslim.base.errors import ConfigError, DataError, UserError
from angelslim.config.files import write_yaml
from angelslim.data.curation import run as runner
from angelslim.data.curation.results import CurationReport
from angelslim.data.curation.run import curate
from angelslim.data.curation.work import Workplace
from angelslim.data.records import read_records
from angelslim.report.curation import curation_html

from .planted import babble

CHAT = [{"role": "user", "content": babble(900, 40)}, {"role": "assistant", "content": babble(901, 50)}]
STAGES: list[Any] = [
    {"denoise": {"lines": ["accept all cookies"]}},
    {"heuristics": {"min_characters": 100}},
    "exact",
    {"fuzzy": {"threshold": 0.7}},
    {"semantic": {"threshold": 0.97}},
    {"mixture": {"weights": {"web": 1, "science": 1}, "max_repeats": 2}},
]


def near(text: str) -> str:
    words = text.split()
    words[40] = "changed"
    return " ".join(words)


def corpus(folder: Path) -> dict[str, Any]:
    """Two sources with one planted case for each stage; returns the recipe."""
    web = [babble(seed) for seed in range(30)]
    web += ["", "short", web[0].upper(), near(web[1]), f"<p>{babble(50)}</p>\naccept all cookies"]
    science = [babble(seed) for seed in range(100, 105)] + [web[2]]
    (folder / "web.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in web))
    (folder / "science.jsonl").write_text(
        "\n".join([*(json.dumps({"text": text}) for text in science), json.dumps({"messages": CHAT})])
    )
    sources = [
        {"name": "science", "path": str(folder / "science.jsonl")},
        {"name": "web", "path": str(folder / "we*.jsonl")},
    ]
    return {"seed": 1, "sources": sources, "stages": STAGES, "output": {"shard_size": 5000}}


def write(folder: Path, recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(write_yaml(recipe))
    return path


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for part in sorted(out.glob("part-*")) for line in part.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CurationReport, Path]:
    folder = tmp_path_factory.mktemp("corpus")
    path = write(folder, corpus(folder))
    report = curate(path, folder / "out", page=curation_html)
    return path, report, folder / "out"


def test_every_planted_case_is_dropped_for_its_reason(finished: tuple[Path, CurationReport, Path]) -> None:
    _, report, _ = finished
    found = {
        f"{stage.name}: {name}": (reason.documents, reason.examples[0].text[:5])
        for stage in report.stages[:-1]
        for name, reason in stage.dropped.items()
        if reason.documents
    }
    assert (
        found
        == {
            "read: empty": (1, ""),
            "heuristics: min_characters": (1, "short"),
            "exact: exact duplicate": (
                2,
                babble(2)[:5],
            ),  # of web: science is read first and holds it already
            "fuzzy: near-duplicate": (1, near(babble(1))[:5]),
        }
    )
    changed = {
        name: reason.documents for name, reason in report.stages[1].changed.items() if reason.documents
    }
    assert changed == {"markup": 1, "boilerplate lines": 1, "white space": 1}
    assert report.stages[4].dropped["near-duplicate"].sources == {"web": 1}


def test_what_is_left_is_what_was_planted_to_stay(finished: tuple[Path, CurationReport, Path]) -> None:
    _, report, out = finished
    rows = lines(out)
    assert all(list(row) in (["text", "source"], ["messages", "source"]) for row in rows)
    science = Counter(
        json.dumps(row.get("text", row.get("messages"))) for row in rows if row["source"] == "science"
    )
    expected = [*(babble(seed) for seed in range(100, 105)), babble(2), CHAT]
    assert science == {json.dumps(record): 2 for record in expected}, "seven documents, twice each"
    web = Counter(row["text"] for row in rows if row["source"] == "web")
    assert set(web.values()) == {1}
    assert set(web) <= {babble(0), babble(1), *(babble(seed) for seed in range(3, 30)), babble(50)}
    assert report.stages[-1].flow.documents_out == len(rows)


def test_flows_add_up(finished: tuple[Path, CurationReport, Path]) -> None:
    _, report, out = finished
    assert report.stages[0].flow.documents_in == 42
    for before, after in zip(report.stages, report.stages[1:], strict=False):
        assert before.flow.documents_out == after.flow.documents_in
        assert before.flow.characters_out == after.flow.characters_in
    for stage in report.stages:
        for field in ("documents_in", "documents_out", "characters_in", "characters_out"):
            assert sum(getattr(flow, field) for flow in stage.sources.values()) == getattr(stage.flow, field)
        if stage.name != "mixture":
            dropped = sum(reason.documents for reason in stage.dropped.values())
            assert stage.flow.documents_in - stage.flow.documents_out == dropped
    written = sum(
        len(row["text"]) if "text" in row else len("\n".join(turn["content"] for turn in row["messages"]))
        for row in lines(out)
    )
    assert report.stages[-1].flow.characters_out == written
    assert sum(report.lengths_before) == 41, "empty ones have no length"
    assert sum(report.lengths_after) == report.stages[-1].flow.documents_out


def test_parts_keep_their_size_and_can_be_read_again(finished: tuple[Path, CurationReport, Path]) -> None:
    _, report, out = finished
    sizes = [(out / name).stat().st_size for name in report.shards]
    assert max(sizes) <= 5000 and sum(sizes) == report.bytes and len(sizes) > 2
    again = [record for name in report.shards for record in read_records(out / name)]
    assert len(again) == report.stages[-1].flow.documents_out
    assert CurationReport.from_json((out / "report.json").read_text()) == report
    page = (out / "report.html").read_text()
    assert "near-duplicate" in page and "https:" not in page and "<svg" in page


def test_two_runs_give_equal_bytes(finished: tuple[Path, CurationReport, Path], tmp_path: Path) -> None:
    path, _, out = finished
    curate(path, tmp_path / "again", page=curation_html)
    assert digests(tmp_path / "again") == digests(out)


def test_a_finished_run_is_left_alone(finished: tuple[Path, CurationReport, Path]) -> None:
    path, report, out = finished
    before = digests(out)
    assert curate(path, out) == report
    assert digests(out) == before


def test_what_a_kill_after_the_last_step_left_is_cleared(
    finished: tuple[Path, CurationReport, Path], tmp_path: Path
) -> None:
    path, _, _ = finished
    curate(path, tmp_path / "out")
    mark = CurationReport.from_json((tmp_path / "out" / "report.json").read_text()).fingerprint
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "job.json").write_text(json.dumps({"fingerprint": mark}))
    curate(path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def _killed(path: Path, out: Path, after: int, during: str) -> None:
    """Run, and kill this process at the `after`-th commit: before it, after it, or while the shards are written."""
    seen = 0
    commit = Workplace._commit

    def counted(self: Workplace, *words: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == after and during == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, *words)
        if seen == after and during == "after":
            os.kill(os.getpid(), signal.SIGKILL)

    Workplace._commit = counted  # type: ignore[method-assign]
    if during == "writing":
        from angelslim.data.curation.shards import ShardWriter

        close = ShardWriter.close

        def half(self: ShardWriter) -> None:
            close(self)
            if len(self.names) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        ShardWriter.close = half  # type: ignore[method-assign]
    curate(path, out, page=curation_html)


@pytest.mark.parametrize(
    ("after", "during"),
    [
        (1, "before"),
        (1, "after"),
        (2, "before"),
        (2, "after"),
        (4, "after"),
        (5, "before"),
        (7, "after"),
        (2, "writing"),
    ],
)
def test_a_killed_run_continues_to_the_same_bytes(
    finished: tuple[Path, CurationReport, Path],
    tmp_path: Path,
    after: int,
    during: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _, expected = finished
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(path, out, after, during))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    done = len(list((tmp_path / "out.partial").glob("[0-9]*.json")))
    assert done == (7 if during == "writing" else after if during == "after" else after - 1)
    commits: list[str] = []
    commit = Workplace._commit
    monkeypatch.setattr(
        Workplace, "_commit", lambda self, stem, *rest: (commits.append(stem), commit(self, stem, *rest))
    )
    curate(path, out, page=curation_html)
    assert len(commits) == 7 - done, "finished stages are not done again"
    assert digests(out) == digests(expected)
    assert not (tmp_path / "out.partial").exists()


def test_another_recipe_or_other_files_do_not_continue_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = corpus(tmp_path)
    path = write(tmp_path, recipe)
    process = multiprocessing.get_context("fork").Process(
        target=_killed, args=(path, tmp_path / "out", 3, "after")
    )
    process.start()
    process.join()
    other = write(tmp_path, {**recipe, "seed": 2})
    with pytest.raises(UserError, match="unfinished curation of another recipe"):
        curate(other, tmp_path / "out")
    assert (tmp_path / "out.partial" / "job.json").exists(), "nothing is lost by the refusal"
    curate(other, tmp_path / "out", overwrite=True)
    assert lines(tmp_path / "out")


def test_a_folder_that_is_something_else_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, corpus(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="no curated set"):
            curate(path, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_earlier_set_is_replaced_only_when_asked(tmp_path: Path) -> None:
    recipe = {**corpus(tmp_path), "stages": ["exact"]}
    out = tmp_path / "out"
    curate(write(tmp_path, recipe), out)
    changed = write(tmp_path, {**recipe, "seed": 9})
    with pytest.raises(DataError, match="--overwrite"):
        curate(changed, out)
    assert curate(changed, out, overwrite=True).recipe["seed"] == 9


def test_without_shuffling_the_order_is_that_of_reading(tmp_path: Path) -> None:
    recipe = {**corpus(tmp_path), "stages": [], "output": {"shuffle": False}}
    curate(write(tmp_path, recipe), tmp_path / "out")
    shown = [row.get("text") for row in lines(tmp_path / "out")]
    assert shown[:6] == [*(babble(seed) for seed in range(100, 105)), babble(2)]
    assert shown[7:9] == [babble(0), babble(1)]


def test_shuffling_is_one_permutation_over_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {**corpus(tmp_path), "stages": []}
    path = write(tmp_path, recipe)
    curate(path, tmp_path / "one")
    monkeypatch.setattr("angelslim.data.curation.shards.BUCKET", 3000)
    curate(path, tmp_path / "many")
    assert lines(tmp_path / "one") == lines(tmp_path / "many"), "the buckets' size changes nothing"
    shown = [row["source"] for row in lines(tmp_path / "one")]
    assert "science" in shown[10:], "sources are mixed"


def test_half_surrogates_become_text_that_a_file_can_hold(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "odd \\ud800 character"}\n{"text": "fine \\ud83d\\ude00"}')
    recipe = {"sources": [{"name": "a", "path": str(tmp_path / "a.jsonl")}], "stages": ["exact", "denoise"]}
    curate(write(tmp_path, recipe), tmp_path / "out")
    assert {row["text"] for row in lines(tmp_path / "out")} == {"odd \ufffd character", "fine \U0001f600"}


def test_two_changing_stages_follow_each_other(tmp_path: Path) -> None:
    recipe = {
        **corpus(tmp_path),
        "stages": ["denoise", "exact", {"denoise": {"lines": [".*short.*"]}}, "exact"],
    }
    report = curate(write(tmp_path, recipe), tmp_path / "out")
    assert [stage.name for stage in report.stages] == ["read", "denoise", "exact", "denoise", "exact"]
    assert report.stages[3].dropped["nothing but noise"].documents == 1
    assert "short" not in [row.get("text") for row in lines(tmp_path / "out")]


# --------------------------------------------------------------------------------------------- refusals


def test_wrong_recipes_are_refused_before_any_work(tmp_path: Path) -> None:
    good = corpus(tmp_path)
    nowhere = [{"name": "a", "path": str(tmp_path / "no.jsonl")}]
    pattern = [{"name": "a", "path": str(tmp_path / "no*.jsonl")}]
    for change, complaint in (
        ({"stages": ["fuzy"]}, "Unknown stage 'fuzy'. Did you mean 'fuzzy'"),
        ({"stages": [{"fuzzy": {"treshold": 0.5}}]}, "'treshold'. Did you mean 'threshold'"),
        ({"stages": [{"fuzzy": {"threshold": 3}}]}, r"stage 1 \(fuzzy\): threshold is 3"),
        ({"stages": [{"fuzzy": {}, "exact": {}}]}, "each stage is a name"),
        ({"stages": ["mixture", "exact"]}, "No stage can follow"),
        ({"stagse": []}, "'stagse'. Did you mean 'stages'"),
        ({"sources": [*good["sources"], good["sources"][0]]}, "Two sources are called 'science'"),
        ({"sources": []}, "sources"),
        ({"sources": [{"name": "a"}]}, "path: it is missing"),
        ({"sources": nowhere, "stages": []}, "no such data file"),
        ({"sources": pattern, "stages": []}, "No file matches"),
        ({"output": {"shard_size": "large"}}, "shard_size"),
    ):
        with pytest.raises((ConfigError, DataError), match=complaint):
            curate(write(tmp_path, {**good, **change}), tmp_path / "out")
        assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists(), change


def test_nothing_left_says_which_stage_and_why(tmp_path: Path) -> None:
    recipe = {**corpus(tmp_path), "stages": [{"heuristics": {"min_characters": 10_000}}]}
    with pytest.raises(DataError, match=r"heuristics dropped all 41 documents \(min_characters 41\)"):
        curate(write(tmp_path, recipe), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists(), "a mended recipe can start"


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    recipe = corpus(tmp_path)
    (tmp_path / "web.jsonl").write_text('{"text": ""}\n{"text": "  \\n "}\n')
    with pytest.raises(DataError, match="'web' has no document with text"):
        curate(write(tmp_path, recipe), tmp_path / "out")


def test_a_broken_line_names_its_place(tmp_path: Path) -> None:
    recipe = corpus(tmp_path)
    (tmp_path / "web.jsonl").write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(DataError, match=r"web\.jsonl, line 2"):
        curate(write(tmp_path, recipe), tmp_path / "out")


def test_files_that_change_while_they_are_read_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**corpus(tmp_path), "stages": ["exact"]}
    path, read = write(tmp_path, recipe), runner._read

    def grow(*words: Any) -> Any:
        result = read(*words)
        with (tmp_path / "web.jsonl").open("a") as stream:
            stream.write('\n{"text": "one more"}')
        return result

    monkeypatch.setattr(runner, "_read", grow)
    with pytest.raises(DataError, match="changed while"):
        curate(path, tmp_path / "out")
