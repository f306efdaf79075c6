"""Quantization-aware training of one to two bits: which method keeps most of a model, and what it costs.

A small Llama is trained from nothing on the text of the environment's packages; from that checkpoint every method trains
with the same tokens in the same order, at the best of three learning rates by the dev split, with three seeds. Beside
them: the same model trained on in full precision, rounded without training, INT4 by GPTQ, and a smaller dense model of
the 2-bit model's bytes that saw all the tokens. Two sizes: `full` for a GPU (22 million parameters), `small` for a
processor (4 million).

    python benchmarks/lowbit_quality.py --work DIR --workers 4 --budget-minutes 8     # again until nothing is left
    python benchmarks/lowbit_quality.py --work DIR --speed                            # alone on the machine
    python benchmarks/lowbit_quality.py --work DIR --mechanisms --workers 4           # why: lowbit_mechanisms.json
    python benchmarks/lowbit_quality.py --work DIR --summary                          # the tables again

Every run leaves one file in ``DIR/rows`` and is never repeated; after a kill the same command goes on. Each command ends
with the results file of what is there so far. Rows of an earlier machine stay in it, and are never paired with those of
another base (`lowbit/earlier.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from common import RESULTS, environment, write
from lowbit import earlier
from lowbit.board import Board, Deadline
from lowbit.findings import findings_of
from lowbit.study import MECHANISMS, SEEDS, STUDIES, Run, Study, runs_of
from lowbit.summary import setting, tables, whole

HERE = Path(__file__).resolve()
DOCS = HERE.parents[1] / "docs"  # whose page on training shows the figure
GRACE = 40  # seconds after the budget in which a run may come to its end


def study_of(options: argparse.Namespace) -> Study:
    """Return the study that the command line asks for."""
    return STUDIES[options.size].shortened(options.steps)


def asked_runs(options: argparse.Namespace) -> list[Run]:
    """Return the runs that the command line asks for."""
    only = [name for name in options.only.split(",") if name]
    if options.mechanisms:
        only, options.seeds = list(MECHANISMS), 1
    runs = runs_of(study_of(options), SEEDS[: options.seeds], only)
    unknown = set(only) - {run.method for run in runs}
    if unknown:
        known = sorted({run.method for run in runs_of(study_of(options))})
        raise SystemExit(f"unknown in --only: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    skipped = earlier.finished(earlier_rows(options)) if options.missing else set()
    if options.mechanisms:
        runs = [run for run in runs if run.kind != "part"]
    return [run for run in runs if run.name not in skipped]


def earlier_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the rows of the results file that belong to this study and this corpus."""
    meta = json.loads((options.work / "data" / "meta.json").read_text("utf-8"))
    path = options.results / "lowbit_quality.json"
    rows, why = earlier.read(path, setting(study_of(options), {}), meta["hash"])
    if why and not options.worker:
        print(f"{path} is not continued: {why}", flush=True)
    return rows


def board_of(options: argparse.Namespace) -> Board:
    """Open the work folder; with the trials of the results file where those are taken over."""
    return Board(options.work, earlier.tried(earlier_rows(options)) if options.missing else None)


def bench_of(options: argparse.Namespace) -> Any:
    """Open the corpus on the device."""
    import torch
    import transformers

    from lowbit import corpus
    from lowbit.runs import Bench

    device = "cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu"
    if device == "cpu":
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    study = study_of(options)
    loaded = corpus.load(options.work / "data", study, device)
    return Bench(study, loaded, board_of(options), device, options.compile)


def prepare(options: argparse.Namespace, board: Board) -> None:
    """Make the corpus, and refuse a folder of another study or another corpus."""
    from lowbit import corpus

    start = time.perf_counter()
    study = study_of(options)
    meta = corpus.prepare(study, options.work / "data")
    print(f"corpus {meta['hash']}: {meta} in {time.perf_counter() - start:.0f} s", flush=True)
    identity = {"study": str(study), "corpus": meta["hash"]}
    held = board.folder / "identity.txt"
    if held.is_file() and held.read_text("utf-8") != str(identity):
        raise SystemExit(
            f"{board.folder} belongs to another study or corpus:\n{held.read_text('utf-8')}\n{identity}"
        )
    held.write_text(str(identity), "utf-8")
    (board.folder / "environment.json").write_text(json.dumps(environment(), indent=1), "utf-8")
    for path in (board.folder / "errors").glob("*.txt"):
        path.unlink()  # one more try a command


def work(options: argparse.Namespace) -> None:
    """Take runs until none is left or the time is over (in a process of its own, or the only one)."""
    from lowbit.runs import perform

    deadline = Deadline(options.until)
    runs = asked_runs(options)
    bench = bench_of(options)
    board: Board = bench.board
    while True:
        todo = board.open_runs(runs)
        ready = [run for run in todo if board.ready(run)]
        fitting = [run for run in ready if run.kind == "base" or board.seconds_of(run) < deadline.left()]
        if deadline.left() <= 0 or not todo or (ready and not fitting):
            return
        for run in fitting:
            with board.claim(run.name) as mine:
                if mine:
                    _attempt(bench, run, perform)
                    break
        else:
            if not ready and not board.busy(todo):
                return  # what is left needs a run that failed
            time.sleep(1)


def _attempt(bench: Any, run: Run, perform: Any) -> None:
    """Carry out one run; an error becomes a file, and the worker goes on."""
    import gc

    from angelslim.base.errors import UserError

    try:
        row = perform(bench, run)
    except (
        RuntimeError,
        UserError,
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        AssertionError,
    ):
        bench.board.failed(run.name).write_text(traceback.format_exc(), "utf-8")
        print(f"FAILED {run.name}\n{traceback.format_exc()}", flush=True)
    else:
        bench.board.post(run.name, row)
        shown = {
            key: row[key] for key in ("rate", "dev", "test", "seconds", "tokens_per_second") if key in row
        }
        print(f"{run.name}: {shown}", flush=True)
    gc.collect()


def start_workers(options: argparse.Namespace) -> None:
    """Start the workers and wait; stop those that outlive the budget."""
    command = [sys.executable, str(HERE), *sys.argv[1:], "--worker", "--until", str(options.until or 0)]
    place = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // options.workers, 1))}
    workers = [subprocess.Popen(command, env=place) for _ in range(options.workers)]
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(1)
            if options.until and time.time() > options.until + GRACE:
                print("the budget is over: stopping the workers", flush=True)
                break
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):  # the first lets a long run save its checkpoint
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(sign)
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(15)


def measure_speed(options: argparse.Namespace) -> None:
    """Measure step time and memory, alone on the machine."""
    from lowbit import speed

    bench, place = bench_of(options), environment()

    def post(row: dict[str, Any]) -> None:
        bench.board.post("speed-compiled" if options.compile else "speed", {**row, "environment": place})
        write_results(options, bench.board)

    speed.measure(bench, rounds=options.rounds, post=post, deadline=Deadline(options.until))


def write_results(options: argparse.Namespace, board: Board) -> tuple[Path, dict[str, Any]]:
    """Write the results files of what is there; return where the first lies, and its figures."""
    done = board.rows()
    rows = earlier.together(
        earlier_rows(options), {name: {"base": None, **row} for name, row in done.items()}
    )
    raw, bars = whole(study_of(options), rows)
    place = board.folder / "environment.json"
    raw["environment_of_runs"] = json.loads(place.read_text("utf-8")) if place.is_file() else None
    options.results.mkdir(parents=True, exist_ok=True)
    if findings := findings_of(rows):
        write("lowbit_mechanisms", findings, [], options.results)
    return write("lowbit_quality", raw, bars, options.results), raw


def summarize(options: argparse.Namespace, board: Board) -> None:
    """Write the results files, print the tables, draw the figure."""
    from lowbit.figure import draw

    path, raw = write_results(options, board)
    print(f"\n{tables(raw['methods'])}\n")
    figure = DOCS / "recovery.svg" if options.results == RESULTS else options.results / "recovery.svg"
    draw(raw["recovery"], figure)
    left = board.open_runs(asked_runs(options))
    failed = [file.stem for file in (board.folder / "errors").glob("*.txt")]
    minutes = sum(board.seconds_of(run) for run in left) / 60
    print(
        f"{len(board.rows())} results here, {len(raw['rows'])} in all; left: {len(left)} runs, about {minutes:.1f} minutes of one worker; "
        f"failed: {failed or 'none'}; {path}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, weights and rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for lowbit_quality.json")
    parser.add_argument("--size", choices=sorted(STUDIES), default="full")
    parser.add_argument("--steps", type=int, help="steps of quantized training; the rest in proportion")
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--only", default="", help="methods, with commas; the base is always there")
    parser.add_argument(
        "--missing",
        action="store_true",
        help="leave out runs that the results file has from another base, and take over its learning rates",
    )
    parser.add_argument(
        "--mechanisms", action="store_true", help="the methods of lowbit_mechanisms.json, one seed each"
    )
    parser.add_argument("--budget-minutes", type=float, help="start no run that would end later")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a processor's worker")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--speed", action="store_true", help="measure step time and memory instead")
    parser.add_argument("--rounds", type=int, default=15, help="--speed: turns")
    parser.add_argument("--summary", action="store_true", help="compute nothing new")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work, options.results = options.work.resolve(), options.results.resolve()
    return options


def main() -> None:
    """Do what the command line asks for."""
    options = arguments()
    if options.worker:
        options.until = options.until or None
        work(options)
        return
    board = Board(options.work)
    options.until = Deadline.after(options.budget_minutes).until
    if not options.summary:
        prepare(options, board)
        asked_runs(options)
        board = board_of(options)
        if options.speed:
            measure_speed(options)
        elif options.workers > 1:
            start_workers(options)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                work(options)
    summarize(options, board)


if __name__ == "__main__":
    main()
