"""What README and docs/benchmarks.md say of rivals.py, from its committed result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rival_curves import at

from autodiffusion_optuna.results.held_out import significant

PATH = Path(__file__).parent / "results" / "rivals.json"
OURS, PUBLISHED, REACH = "adopt", "published EA", "evaluations to paper's final"
SIZES = {"digits-4 table": "5,985 four-step schedules of the digits model", "mixture": "9,880 of the analytic mixture"}
UNKNOWN = "No comparison is among the committed results."


def result() -> dict[str, Any] | None:
    """The committed result."""
    return json.loads(PATH.read_text())["result"] if PATH.exists() else None


def short(found: Mapping[str, Any] | None) -> str:
    """README's part: the picture and a line a problem that both searches finished, else a sentence on known optima."""
    if found is None:
        return UNKNOWN
    rows = [row(name, methods) for name, methods in found["live"].items() if {OURS, PUBLISHED} <= methods.keys()]
    lines = [sentence(found["tables"])] if found["tables"] else []
    if rows:
        share = "of its evaluations here / at its own 5,000 images"
        head = f"| | published search | `adopt` | `adopt` is as good after | {share} | best of Optuna's |"
        picture = "![Held-out distance against evaluations spent, one line a method](benchmarks/results/rivals.svg)"
        lines = [picture, "", head, "|---|---|---|---|---|---|", *(line(found, *each) for each in rows)]
        lines += ["", measured([found["settings"][name] for name, _, _ in rows])]
    return "\n".join(lines)


def row(name: str, methods: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """A problem, its methods, and the name of the best of Optuna's own samplers among them; "" where there is none."""
    foreign = [other for other in ("random", "TPE", "CMA-ES", "NSGA-II", "GP") if other in methods]  # in one order
    return name, methods, min(foreign, key=lambda other: methods[other]["held-out median"], default="")


def line(found: Mapping[str, Any], name: str, methods: Mapping[str, Any], best: str) -> str:
    """One problem: FD of each side and the evaluations it spent; shares of the published search's."""
    ours, ratios = methods[OURS], found["ratios"][name]
    reach = ours.get(REACH)
    shares = [value for key, value in ratios.items() if key.startswith("per cent of it")]
    after = "-" if reach is None else f"**{reach:,.0f}**"
    share = "-" if reach is None else " / ".join(f"{significant(value, 2)} %" for value in shares)
    other = f"{best} {figure(methods[best])}" if best else "-"
    return f"| `{name}` | {figure(methods[PUBLISHED])} | {figure(ours)} | {after} | {share} | {other} |"


def measured(settings: Sequence[Mapping[str, Any]]) -> str:
    """How the figures of all rows were measured, as a sentence."""
    banks = {f"{s['metric']} on {s['held-out banks']} x {s['held-out images']} held-out images" for s in settings}
    searched = {f"{s['images']} in {s['metric']}" for s in settings}
    return (
        f"{' and '.join(sorted(banks))}, medians over seeds; an evaluation is one network call for one image; images a "
        f"candidate in the search: {', '.join(sorted(searched))}."
    )


def figure(entry: Mapping[str, Any]) -> str:
    """Held-out distance, after how many evaluations, and of how many seeds both are the median."""
    seeds = "1 seed" if entry["seeds"] == 1 else f"{entry['seeds']} seeds"
    return f"{significant(entry['held-out median'])} at {entry['evaluations']:,.0f} ({seeds})"


def sentence(tables: Mapping[str, Any]) -> str:
    """How far each search comes where every candidate's value is known."""
    told = []
    for name, samplers in tables.items():
        if {OURS, PUBLISHED} <= samplers.keys():
            ours, published = (count(samplers[method]) for method in (OURS, PUBLISHED))
            others = {
                method: sampler
                for method, sampler in samplers.items()
                if not method.startswith(OURS) and method != PUBLISHED
            }
            best = min(others, key=lambda method: others[method]["candidates to 2 %"] or 1e9, default=None)
            third = f", the next best ({best}) {count(others[best])}" if best else ""
            told.append(f"of {SIZES[name]} `adopt` needs {ours}, the published search {published}{third}")
    seeds = max(sampler["seeds"] for samplers in tables.values() for sampler in samplers.values())
    return (
        f"Where every candidate's value is known, candidates until the best is within 2 % of the optimum, median of "
        f"{seeds} seeds: {'; '.join(told)}."
    )


def count(sampler: Mapping[str, Any]) -> str:
    """Candidates to 2 %, as text."""
    reached = sampler["candidates to 2 %"]
    return f"more than {sampler['candidates']}" if reached is None else f"{reached:g}"


def full(found: Mapping[str, Any] | None) -> str:
    """The part of docs/benchmarks.md: every method of every problem."""
    if found is None:
        return UNKNOWN
    parts = [table(name, samplers) for name, samplers in found["tables"].items()]
    parts += [sentence(found["tables"])] if parts else []
    return "\n\n".join([*parts, *(live(found, name, methods) for name, methods in found["live"].items())])


def table(name: str, samplers: Mapping[str, Any]) -> str:
    """Best over optimum after n candidates of every sampler."""
    shown = list(max((sampler["curve"] for sampler in samplers.values()), key=len))
    lines = [
        f"| {name}: best / optimum after | {' | '.join(shown)} | to 2 % | seeds that got there |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for method, sampler in samplers.items():
        ratios = [f"{sampler['curve'][n]:.3f}" if n in sampler["curve"] else "-" for n in shown]
        there = f"{sampler['seeds within 2 %']} of {sampler['seeds']}"
        lines.append(f"| {method} | {' | '.join(ratios)} | {count(sampler)} | {there} |")
    worth = samplers.get(OURS, {}).get("candidates' worth of evaluations to 2 %")
    if worth is not None and samplers[OURS]["race"]:
        worst = samplers[OURS]["the same, worst seed"]
        lines += ["", f"With the race `{OURS}` spends the evaluations of {worth:.1f} candidates to get within 2 %"]
        lines[-1] += "." if worst is None else f", at worst {worst:.1f}."
    return "\n".join(lines)


def live(found: Mapping[str, Any], name: str, methods: Mapping[str, Any]) -> str:
    """Held-out distance and cost of every method, the best first."""
    said = found["settings"][name]
    lines = [
        f"| {name}: {said['metric']}, {said['images']} images a candidate | held-out, median | lowest to highest seed "
        "| evaluations | minutes | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for method in sorted(methods, key=lambda method: methods[method]["held-out median"]):
        entry = methods[method]
        low, high = (significant(end) for end in entry["held-out interval"])
        minutes = "-" if entry["seconds"] is None else f"{entry['seconds'] / 60:.1f}"
        lines.append(
            f"| {method} | {significant(entry['held-out median'])} | {low} to {high} | {entry['evaluations']:,.0f} | "
            f"{minutes} | {entry['seeds']} |"
        )
    banks = f"{said['held-out banks']} held-out banks of {said['held-out images']} images"
    lines += ["", f"Scored on {banks}, the network in {said['precision']}. {reached(found, name, methods)}".rstrip()]
    return "\n".join(lines)


def reached(found: Mapping[str, Any], name: str, methods: Mapping[str, Any]) -> str:
    """How soon ours is as good as the published search, as a sentence."""
    reach = methods.get(OURS, {}).get(REACH)
    if reach is None:
        return ""
    shares = [value for key, value in found["ratios"][name].items() if key.startswith("per cent of it")]
    ours, papers = (f"{significant(value, 2)} %" for value in shares)
    first = found["curves"][name][OURS][0][0] == reach
    return (
        f"`{OURS}` is no worse than the published search's last winner after {reach:,.0f} evaluations"
        f"{', with its very first trial, the list of OptimalSteps' if first else ''}: {ours} of what that spends here, "
        f"{papers} of what it would spend at its own 5,000 images a candidate.{ahead(found, name, methods)}"
    )


def ahead(found: Mapping[str, Any], name: str, methods: Mapping[str, Any]) -> str:
    """Which methods are better than ours until which budget, once ours has a winner; "" where none is."""
    ours, told = found["curves"][name][OURS], []
    for method, entry in methods.items():
        if method.startswith(OURS):
            continue
        curve = found["curves"][name].get(method) or [[entry["evaluations"], entry["held-out median"]]]
        known = [(max(spent, ours[0][0]), value) for spent, value in curve]
        better = [(spent, value) for spent, value in known if (at(ours, spent) or 0) > value]
        if better:
            when, least = min(better, key=lambda point: point[1])
            until = next((spent for spent, value in ours if spent >= better[-1][0] and value <= least), None)
            later = f"with {significant(least)} at {when:,.0f}" if until is None else f"until {until:,.0f}"
            told.append(f"`{method}` {later}")
    return f" Better than `{OURS}` on the way: {', '.join(told)}." if told else ""
