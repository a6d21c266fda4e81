"""The figures of README and docs, from the committed results. ``make docs`` writes them there, a test compares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodiffusion_optuna.results.held_out import HeldOut, paired, significant

RESULTS = Path(__file__).parent / "results"
DEMO = "faces-4"
"""The study of ``make demo``, whose recorded output README shows."""
STUDIES = ("faces-4", "faces-6", "faces-10", "faces-solvers-6", "digits-4", "digits-4-paper", "digits-10-layers")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["result"]
    return result


def searched() -> dict[str, dict[str, Any]]:
    """Those results of ``STUDIES`` that are committed."""
    return {name: load(name) for name in STUDIES if (RESULTS / f"{name}.json").exists()}


def held_out(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> HeldOut:
    """A candidate's values on the held-out banks."""
    return HeldOut(result["held_out_images"], tuple(candidate["values"]))


def difference(result: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """First minus second with its 95 % interval, paired by bank: both were scored on the same noises there."""
    found = paired(held_out(result, first), held_out(result, second))
    return "-" if found is None else found.text


def mean(result: Mapping[str, Any], candidate: Mapping[str, Any] | None) -> str:
    """Mean over the held-out banks, as text."""
    return "-" if candidate is None else significant(held_out(result, candidate).mean)


def by_winner(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The seeds' runs from the best winner to the worst."""
    return sorted(result["runs"], key=lambda run: held_out(result, run["candidates"]["found"]).mean)


def median_run(result: Mapping[str, Any]) -> dict[str, Any]:
    """The seed whose winner is the median of all seeds' winners, the better one of two."""
    runs = by_winner(result)
    return runs[(len(runs) - 1) // 2]


def studies() -> str:
    """A line a study: held-out values of the same solver's uniform list and of the winner, difference and floors."""
    lines = [
        "| study | measured as | uniform, same solver | found | found minus uniform, 95 % | many steps | real images |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in searched().items():
        run, runs = median_run(result), by_winner(result)
        candidates, real = run["candidates"], run["real"] and run["real"]["value"]
        found, uniform, many = candidates["found"], candidates["uniform"], candidates.get("many steps")
        ends = [mean(result, other["candidates"]["found"]) for other in (runs[0], runs[-1])]
        over = f" ({ends[0]} to {ends[1]}, {len(runs)} seeds)" if len(runs) > 1 else ""
        solver = found["settings"].get("solver", result["solver"])
        floor = "" if many is None else f" ({len(many['timesteps'])})"
        lines.append(
            f"| `{name}` | {result['metric']}, {len(found['timesteps'])} steps of {solver} | {mean(result, uniform)} | "
            f"**{mean(result, found)}**{over} | {difference(result, found, uniform)} | {mean(result, many)}{floor} | "
            f"{'-' if real is None else significant(real)} |"
        )
    return "\n".join(lines)


def costs() -> str:
    """A line a study: what the search took, and what the median seed found."""
    lines = [
        "| study | candidates | network calls reused | minutes | timesteps found | best other baseline |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in searched().items():
        run = median_run(result)
        calls, candidates = run["evaluations"], run["candidates"]
        lines.append(
            f"| `{name}` | {run['finished']} | {calls['saved'] / (calls['saved'] + calls['run']):.0%} | "
            f"{run['seconds'] / 60:.1f} | {' '.join(map(str, candidates['found']['timesteps']))} | "
            f"{mean(result, candidates.get('best baseline'))} |"
        )
    return "\n".join(lines)


def settings() -> str:
    """On how many images the values of ``studies`` stand."""
    sizes: dict[str, list[str]] = {}
    for name, result in searched().items():
        banks = f"{result['held_out_banks']} banks of {result['held_out_images']:,} held-out images"
        sizes.setdefault(f"{banks}, {result['images']:,} images a candidate in the search", []).append(f"`{name}`")
    listed = "; ".join(f"{', '.join(names)}: {size}" for size, names in sizes.items())
    return f"{listed}." if listed else "No search is among the committed results."


def layers() -> str:
    """Held-out values of each search of layers beside candidates that skip nothing."""
    parts = []
    for name, result in searched().items():
        candidates = median_run(result)["candidates"]
        found = candidates["found"]
        if "uniform, every layer on" not in candidates:
            continue
        lines = [f"| `{name}` | cost | {result['metric']} | found minus this, 95 % |", "|---|---|---|---|"]
        for label in ("found", "uniform, every layer on", "best without skips"):
            other = candidates[label]
            steps, skipped = len(other["timesteps"]), other["skipped"]
            what = f"{label}: {steps} steps" + (f", {skipped} layers skipped" if skipped else "")
            against = "" if other is found else difference(result, found, other)
            lines.append(f"| {what} | {other['cost']:.2f} | {mean(result, other)} | {against} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No search of layers is among the committed results."


def printed() -> str:
    """What ``make demo`` prints, from the recorded run of its study; lines that say little are left out."""
    lines = searched()[DEMO]["printed"] if DEMO in searched() else []
    lines = [line for line in lines if not line.startswith(("scored ", "left out"))]
    unscored = [i for i, line in enumerate(lines) if re.match(r"\S+ +- +- ", line)]
    if unscored:  # baselines that have no held-out value are not worth their lines here
        lines = [*lines[: unscored[0]], "…", *lines[unscored[-1] + 1 :]]
    finalists = [i for i, line in enumerate(lines) if line.startswith("trial ")]
    if len(finalists) > 1:
        lines = [*lines[: finalists[0] + 1], "…", *lines[finalists[-1] + 1 :]]
    progress = [i for i, line in enumerate(lines) if line.startswith("candidates ")]
    if len(progress) > 2:
        lines = [*lines[: progress[0] + 1], "…", *lines[progress[-1] :]]
    activate = "to type adopt alone: . .venv/bin/activate"
    heads = [f"$ make demo     # an environment in .venv, the study {DEMO}, the picture above"]
    return "\n".join(["```console", *heads, *lines, f"wrote {DEMO}.png", activate, "```"])


def facts() -> str:
    """What the machinery costs and saves, one line each."""
    overhead, prefix, frechet = load("overhead"), load("prefix"), load("frechet")
    solvers, skipping = load("prefix_solvers"), load("skip_time")
    saved = [solver["saved"] for solver in solvers.values()]
    spared = [f"{shares['mean']:.0%} (`{name}`)" for name, shares in prefix["evaluations saved"].items()]
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
        f"Overhead: a search takes {overhead['processor']['ratio']:.2f} times the seconds of the processor that "
        "network and extractor alone take for the same evaluations; "
        f"{overhead['share of wall']['proposal and storage']:.1%} of its time goes into proposals and the database "
        "([overhead.json](../benchmarks/results/overhead.json)).",
        f"Bookkeeping for a trial of {storage['parameters']} parameters (10 steps, 58 layers), the proposal included, "
        f"median: {bookkeeping}, of which at most {locked:.0f} ms under the lock that other workers wait for; "
        f"{sleeping['workers']} workers on one Postgres, each trial a second's sleep, are "
        f"{sleeping['speed_up']:.1f} times as fast as one, on {storage['cores']} cores "
        "([storage.json](../benchmarks/results/storage.json)).",
        f"Prefix cache: {prefix['candidates']} candidates of a search scored again without it, "
        f"{prefix['candidates whose values differ in any bit']} differ in any bit; it saves "
        f"{', '.join(spared)} of the network evaluations of a search "
        "([prefix.json](../benchmarks/results/prefix.json)).",
        *(
            f"Race, `{name}`: of the best {study['best']} candidates of a search in full it stops "
            f"{study['best stopped']}, for {study['evaluations']:.0f} % of the evaluations; rank correlation with the "
            "last value "
            f"{', '.join(f'{value:.2f} ({count} images)' for count, value in study['rank correlation'].items())} "
            "([race.json](../benchmarks/results/race.json))."
            for name, study in load("race")["studies"].items()
        ),
        f"The same with each of {len(solvers)} solvers, over a walk of one-gene changes: "
        f"{sum(solver['differ'] for solver in solvers.values())} runs differ in any bit, and {min(saved):.0%} to "
        f"{max(saved):.0%} of the evaluations are saved "
        "([prefix_solvers.json](../benchmarks/results/prefix_solvers.json)).",
        f"Saved cost is saved time: over {skipping['choices']} random choices which of {skipping['units']} layers are "
        "skipped or reused, counted and measured time correlate by "
        f"{skipping['correlation of predicted and measured time']:.2f} "
        "([skip_time.json](../benchmarks/results/skip_time.json)).",
        f"Fréchet distance: {frechet['speed_ratio']:.0f} times as fast as clean-fid's at D = {frechet['dimensions']}, "
        f"N = {frechet['generated']}, relative difference {frechet['relative_difference']:.0e} "
        "([frechet.json](../benchmarks/results/frechet.json)).",
        f"Dashboard of {window['trials']:,} trials with {window['parameters']} parameters: "
        f"the first load takes {window['first load, seconds']:.0f} s, "
        f"a poll {window['poll, seconds']:.1f} s, with a new trial {window['poll with a new trial, seconds']:.1f} s "
        "([dashboard.json](../benchmarks/results/dashboard.json)).",
    ]
    return "\n".join(f"- {line}" for line in lines)
