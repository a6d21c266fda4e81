"""Our search beside the published one, Optuna's samplers and lists that need no search.

    python benchmarks/rivals.py --quick                                 # minutes: does it run here?
    python benchmarks/rivals.py                                         # hours; goes on where it was stopped
    python benchmarks/rivals.py --problems digits-4 --methods adopt "published EA" --seeds 0 1

``rival_tables.py`` and ``rival_live.py`` say what the problems are, ``rival_samplers.py`` which samplers there are,
``published_ea.py`` what the published search is. Scores and finished runs are kept in ``benchmarks/.cache``, shared by
all methods; nothing is sampled twice, and evaluations are counted as if each method had been alone. ``--again`` runs
the methods named once more. ``rivals.json`` and ``rivals.svg`` in ``benchmarks/results`` are written after each run
with what is finished so far, and so are the live runs themselves, ``rivals.jsonl``: another machine goes on from those.
In ``"result"``:

- ``tables``: {problem: {sampler: {"candidates to 2 %": median over seeds of the distinct candidates until the best is
  within 2 % of the optimum, null where fewer than half get there; "curve": {n: median of best / optimum after n};
  "seeds"; …}}}; of ours with the race also the evaluations to 2 %, in units of one candidate in full.
- ``live``: {problem: {method: {"evaluations": median of network evaluations times images spent; "held-out median":
  over seeds, of the winner's mean over the held-out banks; "held-out interval": lowest and highest seed, of a list
  without a search the 95 % interval over the banks; "seconds"; "seeds"}}}; of ours also "evaluations to paper's
  final": after which its winner, had it stopped there, is no worse than the published search's last one (medians).
- ``ratios``: those evaluations in per cent of what the published search spends, here and at its own 5,000 images.
- ``curves``: {problem: {method: [[evaluations, median held-out distance of the winner so far]]}}: the picture.
- ``finished``: {problem: {method: seeds done, of how many}}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import rival_live
import rival_tables
import torch
from common import RESULTS, record
from rival_curves import first_no_worse, held_out_curve, median, median_curve, stays_no_worse, thinned
from rival_live import LISTS, PROBLEMS, QUICK, Live
from rival_picture import draw
from rival_samplers import ADOPT, EA, IN_FULL, SAMPLERS, missing
from rival_store import Run, Store
from rival_tables import Table

from autodiffusion_optuna.results.held_out import HeldOut

CACHE = Path(__file__).parent / ".cache"
TABLES = ("digits-4 table", "mixture")
TABLE_SEEDS, QUICK_TABLE_SEEDS, QUICK_CANDIDATES = 20, 2, 30
PUBLISHED_IMAGES = 5000
"""That the published search scores a candidate on."""
RUNS = RESULTS / "rivals.jsonl"
SECTIONS = ("tables", "live", "ratios", "curves", "finished", "settings")


class Task(NamedTuple):
    """One run."""

    problem: str
    method: str
    seed: int
    quick: bool


@cache
def table_of(name: str) -> Table:
    """A table by name."""
    return rival_tables.digits_table(CACHE) if name == TABLES[0] else rival_tables.mixture_table(CACHE)


def live_of(quick: bool) -> dict[str, Live]:
    """Live problems by name."""
    return QUICK if quick else PROBLEMS


def place_of(quick: bool) -> Path:
    """Folder of the disk cache."""
    return CACHE / ("quick" if quick else "full")


@cache
def store_of(quick: bool) -> Store:
    """The disk cache, opened once in each process."""
    return Store(place_of(quick) / "rivals.db")


def tasks(given: argparse.Namespace) -> list[Task]:
    """All runs asked for: tables, ours live and the lists, then the others seed by seed.

    So the first third of the time gives every method a seed on every problem, and the rest more seeds.
    """
    found: list[Task] = []
    for name in TABLES if given.problems is None else [name for name in TABLES if name in given.problems]:
        seeds = range(QUICK_TABLE_SEEDS if given.quick else TABLE_SEEDS)
        found += [Task(name, method, seed, given.quick) for method in table_of(name).methods for seed in seeds]
    live = [
        Task(name, method, seed, given.quick)
        for name, problem in live_of(given.quick).items()
        for method in problem.methods
        for seed in problem.seeds_of(method)
    ]
    found += sorted(live, key=turn)
    return [
        task
        for task in found
        if (given.problems is None or task.problem in given.problems)
        and (given.methods is None or task.method in given.methods)
        and (given.seeds is None or task.seed in given.seeds)
        and missing(task.method) is None
    ]


def turn(task: Task) -> tuple[bool, int]:
    """Ours and the lists first, then one seed after the other; else in the order of the problems."""
    first = task.method in (ADOPT, LISTS)
    return not first, 0 if first else task.seed


def perform(task: Task) -> str:
    """One run, kept in the store; a line about it."""
    store, started = store_of(task.quick), time.perf_counter()
    if task.problem in TABLES:
        table = table_of(task.problem)
        if store.run(task.problem, task.method, task.seed) is None:
            wanted = table.candidates(task.method)
            wanted = min(wanted, QUICK_CANDIDATES) if task.quick else wanted
            found = rival_tables.search(table, task.method, task.seed, wanted)
            store.keep(task.problem, task.method, task.seed, found)
    else:
        live = live_of(task.quick)[task.problem]
        rival_live.run(live, task.method, task.seed, store, place_of(task.quick))
    return f"{task.problem}, {task.method}, seed {task.seed}: {time.perf_counter() - started:.0f} s"


def begin_process(parent: int) -> None:
    """One thread and no chatter; ends with the process that started it, however that ended."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# What is recorded


def summarise(quick: bool) -> dict[str, Any]:
    """All sections, of what is finished."""
    store = store_of(quick)
    result: dict[str, Any] = {section: {} for section in SECTIONS}
    for name in TABLES:
        if runs := store.runs(name):
            table = table_of(name)
            result["tables"][name] = rival_tables.summary(table, runs)
            total = QUICK_TABLE_SEEDS if quick else TABLE_SEEDS
            result["finished"][name] = {m: f"{len(done)} of {total} seeds" for m, done in runs.items()}
    for name, live in live_of(quick).items():
        done = {
            method: {seed: run for seed, run in found.items() if "held_out" in run}
            for method, found in store.runs(name).items()
        }
        add_live(result, live, {method: found for method, found in done.items() if found})
    return result


def add_live(result: dict[str, Any], live: Live, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> None:
    """A live problem's part of every section."""
    if not runs:
        return
    searched = {method: found for method, found in runs.items() if method != LISTS}
    methods = {method: searched_entry(found) for method, found in searched.items()}
    if LISTS in runs:
        methods |= listed(live, runs[LISTS][0])
    curves = {method: curves_of(found) for method, found in searched.items()}
    if ADOPT in searched and EA in searched:
        target = statistics.median(rival_live.final_values(searched[EA]))
        reach = median([first_no_worse(curve, target) for curve in curves[ADOPT]])
        methods[ADOPT]["evaluations to paper's final"] = reach
        stays = median([stays_no_worse(curve, target) for curve in curves[ADOPT]])
        result["ratios"][live.name] = ratios(live, methods[EA]["evaluations"], reach, stays)
    result["live"][live.name] = methods
    result["curves"][live.name] = {
        method: median_curve([thinned(curve, rival_live.DOUBLED) for curve in found])
        for method, found in curves.items()
    }
    result["finished"][live.name] = {
        method: f"{len(found)} of {len(live.seeds_of(method))} seeds" for method, found in runs.items()
    }
    first = next(iter(next(iter(runs.values())).values()))
    said = {key: first[key] for key in ("precision", "device", "metric")}
    said["processors"] = sorted({run["processor"] for found in runs.values() for run in found.values()})
    banks = {"images": live.images, "held-out banks": rival_live.BANKS, "held-out images": live.held_out}
    result["settings"][live.name] = {**said, **banks}


def searched_entry(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A method's figures over its seeds."""
    values = rival_live.final_values(runs)
    return {
        "evaluations": statistics.median(run["winners"][-1][0] for run in runs.values()),
        "held-out median": statistics.median(values),
        "held-out interval": [min(values), max(values)],
        "seconds": statistics.median(run["seconds"] for run in runs.values()),
        "seeds": len(runs),
    }


def listed(live: Live, run: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures of every list that needs no search."""
    found = {}
    for name, key in run["lists"].items():
        banks = HeldOut(live.held_out, tuple(run["held_out"][key]))
        found[name] = {
            "evaluations": run["evaluations"][name],
            "held-out median": banks.mean,
            "held-out interval": [banks.low, banks.high],
            "seconds": None,
            "seeds": 1,
        }
    return found


def curves_of(runs: Mapping[int, Mapping[str, Any]]) -> list[list[tuple[int, float]]]:
    """Held-out distance of the winner so far against evaluations, of each seed."""
    return [held_out_curve(run["winners"], run["held_out"]) for run in runs.values()]


def ratios(live: Live, spent: float, reach: float | None, stays: float | None) -> dict[str, Any]:
    """What ours takes to be no worse, beside what the published search spends."""
    own = spent * PUBLISHED_IMAGES / live.images

    def per_cent(of: float) -> float | None:
        return None if reach is None else 100 * reach / of

    return {
        "the published search spends": spent,
        "per cent of it": per_cent(spent),
        f"at {PUBLISHED_IMAGES:,} images it spends": own,
        f"per cent of it at {PUBLISHED_IMAGES:,} images": per_cent(own),
        "evaluations from which ours stays no worse": stays,
    }


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The committed result with what is known here in its place: tables may not have been run here."""
    found: dict[str, Any] = {}
    for section in SECTIONS:
        before, now = old.get(section, {}), new[section]
        found[section] = {name: {**before.get(name, {}), **now.get(name, {})} for name in {**before, **now}}
    return found


def write(quick: bool) -> str:
    """Record what is finished, and draw it; a quick run's goes beside its cache."""
    result = summarise(quick)
    path, picture = place_of(quick) / "rivals.json", place_of(quick) / "rivals.svg"
    if quick:
        path.write_text(json.dumps(result, indent=2) + "\n")
    else:
        path, picture = RESULTS / "rivals.json", RESULTS / "rivals.svg"
        old = json.loads(path.read_text())["result"] if path.exists() else {}
        result = merged(old, result)
        store_of(quick).write(RUNS, PROBLEMS)
        record("rivals", result)
    if result["curves"]:
        picture.write_text(draw(result["curves"], result["live"], result["settings"]))
    return str(path)


# The command


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {method: None for live in PROBLEMS.values() for method in live.methods}
    names = [*dict.fromkeys([*SAMPLERS, *every, IN_FULL])]
    parser.add_argument("--quick", action="store_true", help="few seeds, few candidates, one live problem")
    parser.add_argument("--problems", nargs="+", choices=[*TABLES, *PROBLEMS], help="only these")
    parser.add_argument("--methods", nargs="+", choices=names, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--again", action="store_true", help="run what --methods names once more")
    cores = 1 if torch.cuda.is_available() else os.cpu_count()
    parser.add_argument("--processes", type=int, default=cores, help="runs side by side, a thread each")
    given = parser.parse_args(arguments)
    if given.again and given.methods is None:
        parser.error("--again needs --methods: which are to be run once more")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    for name in SAMPLERS:
        if missing(name):
            print(f"left out: {missing(name)}")
    wanted, failed = tasks(given), 0
    if not given.quick:
        recall()
    if given.again:
        forget(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, context, begin_process, (os.getpid(),)) as pool:
        running = {pool.submit(perform, task): task for task in wanted}
        for number, future in enumerate(as_completed(running), 1):
            try:
                print(f"{number} of {len(wanted)}: {future.result()}", flush=True)
            except Exception as error:  # the others go on
                failed += 1
                print(f"{number} of {len(wanted)}: {running[future]} failed: {error!r}", file=sys.stderr, flush=True)
            if running[future].problem not in TABLES:
                write(given.quick)
    print(write(given.quick))
    sys.exit(failed > 0)


def recall() -> None:
    """Take the committed live runs, and their precision for those to come: values in one and the other differ."""
    store = store_of(False)

    def fits(run: Run) -> bool:
        said = str(run.data["precision"])
        return rival_live.keep_precision(PROBLEMS[run.problem], store, said) == said

    if others := store.read(RUNS, fits):
        print(f"left out: {others} committed runs in another precision than those begun here")


def forget(wanted: Sequence[Task]) -> None:
    """Remove finished runs, and the package's studies of them; scores on the disk stay."""
    for problem, method, seed, quick in wanted:
        store_of(quick).forget(problem, method, seed)
        if problem not in TABLES:
            rival_live.forget(live_of(quick)[problem], method, seed, place_of(quick))


if __name__ == "__main__":
    main()
