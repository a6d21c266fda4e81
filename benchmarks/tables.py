"""README's tables, from the committed results: ``python benchmarks/tables.py``. A test compares them with README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REGRET = "regret, share of the median's"
STUDIES = ("digits-4", "digits-4-paper")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["result"]
    return result


def interval(held_out: dict[str, Any]) -> str:
    return f"{held_out['mean']:.2f} ± {(held_out['high'] - held_out['low']) / 2:.2f}"


def studies() -> str:
    """Held-out FD of uniform, the best baseline and the winner, and what the search cost."""
    lines = [
        "| study | uniform | best baseline | found | found / uniform | candidates | saved | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in STUDIES:
        result = load(name)
        show = result["show"]
        baselines = {baseline["name"]: baseline for baseline in show["baselines"]}
        best = result["best_baseline"]
        evaluations = show["evaluations"]
        saved = evaluations["saved"] / (evaluations["saved"] + evaluations["run"])
        uniform, found = baselines["uniform"]["held_out"], show["best"]["held_out"]
        lines.append(
            f"| `{name}` | {interval(uniform)} | {interval(baselines[best]['held_out'])} ({best}) "
            f"| **{interval(found)}** | {found['mean'] / uniform['mean']:.2f} | {show['finished']} "
            f"| {saved:.0%} | {result['wall_seconds']:.0f} |"
        )
    return "\n".join(lines)


def layers() -> str:
    """Held-out FD of the layer search beside candidates that skip nothing."""
    result = load("digits-10-layers")
    best = result["show"]["best"]
    skipped = sum(len(names) for names in best["skips"])
    rows = [(f"found: {len(best['timesteps'])} steps, {skipped} layers skipped", best["cost"], best["held_out"])]
    for name, other in result["without_skips"].items():
        rows.append((f"{name}: {len(other['timesteps'])} steps", other["cost"], other["held_out"]))
    lines = ["| `digits-10-layers` | cost | FD(digits) |", "|---|---|---|"]
    lines += [f"| {what} | {cost:.2f} | {interval(held_out)} |" for what, cost, held_out in rows]
    return "\n".join(lines)


def facts() -> str:
    """What the machinery costs and saves, one line each."""
    overhead, prefix, mixture, frechet = load("overhead"), load("prefix"), load("mixture"), load("frechet")
    ours, published = mixture["adopt, 100 trials"], mixture["paper, 100 trials"]
    solvers, skipping = load("prefix_solvers"), load("skip_time")
    saved = [solver["saved"] for solver in solvers.values()]
    window = load("dashboard")
    storage = load("storage")
    sleeping = storage["sleeping"]
    bookkeeping = ", ".join(
        f"{sizes['100']['together']:.0f} ms at trial 100, {sizes['1000']['together']:.0f} at 1,000 and "
        f"{sizes['5000']['together']:.0f} at 5,000 in {name}"
        for name, sizes in zip(("SQLite", "Postgres"), storage["milliseconds"].values(), strict=True)
    )
    locked = max(size["locked"] for sizes in storage["milliseconds"].values() for size in sizes.values())
    lines = [
        f"Overhead: a search takes {overhead['ratio']:.2f} times the bare network time of the same evaluations "
        "([overhead.json](benchmarks/results/overhead.json)).",
        f"Bookkeeping for a trial of {storage['parameters']} parameters (10 steps, 58 layers), the proposal included, "
        f"median: {bookkeeping}, of which at most {locked:.0f} ms under the lock that other workers wait for; "
        f"{sleeping['workers']} workers on one Postgres, each trial a second's sleep, are "
        f"{sleeping['speed_up']:.1f} times as fast as one, on {storage['cores']} cores "
        "([storage.json](benchmarks/results/storage.json)).",
        f"Prefix cache: {prefix['candidates']} candidates of a search scored again without it, "
        f"{prefix['candidates whose values differ in any bit']} differ in any bit; it saved "
        f"{prefix['evaluations saved, digits-4']:.0%} of the network evaluations of `digits-4` and "
        f"{prefix['evaluations saved, digits-4-paper']:.0%} of `digits-4-paper` "
        "([prefix.json](benchmarks/results/prefix.json)).",
        f"The same with each of {len(solvers)} solvers, over a walk of one-gene changes: "
        f"{sum(solver['differ'] for solver in solvers.values())} runs differ in any bit, and {min(saved):.0%} to "
        f"{max(saved):.0%} of the evaluations are saved "
        "([prefix_solvers.json](benchmarks/results/prefix_solvers.json)).",
        f"Skipped cost is saved time: over {skipping['masks']} random masks of {skipping['units']} layers, counted and "
        f"measured time correlate by {skipping['correlation of predicted and measured time']:.2f} "
        "([skip_time.json](benchmarks/results/skip_time.json)).",
        f"Regret: where all {mixture['candidates']:,} candidates are known (analytic mixture, K = 3 on a grid of 40), "
        f"100 trials come within {ours[REGRET]:.2%} of the distance from the optimum to the median candidate; the "
        f"published operators within {published[REGRET]:.2%}; means of {ours['seeds']} seeds "
        "([mixture.json](benchmarks/results/mixture.json)).",
        f"Fréchet distance: {frechet['speed_ratio']:.0f} times as fast as clean-fid's at D = {frechet['dimensions']}, "
        f"N = {frechet['generated']}, relative difference {frechet['relative_difference']:.0e} "
        "([frechet.json](benchmarks/results/frechet.json)).",
        f"Dashboard of {window['trials']:,} trials with {window['parameters']} parameters: "
        f"the first load takes {window['first load, seconds']:.0f} s, "
        f"a poll {window['poll, seconds']:.1f} s, with a new trial {window['poll with a new trial, seconds']:.1f} s "
        "([dashboard.json](benchmarks/results/dashboard.json)).",
    ]
    return "\n".join(f"- {line}" for line in lines)


if __name__ == "__main__":
    print(studies(), "\n")
    print(layers(), "\n")
    print(facts())
