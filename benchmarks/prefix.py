"""prefix cache on real searches: evaluations saved, and scores equal to the bit with and without it.

    OMP_NUM_THREADS=1 python benchmarks/prefix.py

Each study is searched as it ships, with as many images a candidate: the race stops candidates by them. The published
search ends where ``digits-4`` does. The search of ``digits-4`` goes on to 200
candidates, and each of them is scored again without the prefix cache. ``benchmarks/results/prefix.json`` is written
again after each study.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from statistics import fmean
from typing import Any

from common import record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study import components, lifecycle, loop

STUDIES = ("digits-4", "digits-6", "digits-10", "faces-4", "faces-6", "digits-4-paper")
SHORTER = {"digits-4-paper": ["search.trials=120"]}
CANDIDATES = 200


def saved_share(name: str, seed: int) -> float:
    """Share of the network evaluations of one search that the prefix cache answered."""
    config = load_preset(name, [f"search.seed={seed}", *SHORTER.get(name, ())])
    parts = components.build(config)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/a.db")
        study = lifecycle.open_study(parts, storage)
        loop.work(parts, study, storage)
        summary = read_summary(study)
    return summary.total("saved") / (summary.total("run") + summary.total("saved"))


def differing(name: str, images: int) -> int:
    """Of ``CANDIDATES`` of a search, how many score otherwise without the prefix cache."""
    config = load_preset(name, [f"search.trials={CANDIDATES}", f"score.images={images}", "score.pruner=none"])
    parts = components.build(config)
    plain = replace(parts.evaluator, prefix_cache=None)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/a.db")
        study = lifecycle.open_study(parts, storage)
        loop.work(parts, study, storage)
        searched = values_by_key(study)
    assert len(searched) == CANDIDATES
    return sum(plain.score(Candidate.from_key(key), [images]).value != value for key, value in searched.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="of a candidate whose values are compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the search")
    given = parser.parse_args()
    saved: dict[str, list[float]] = {}
    result: dict[str, Any] = {"seeds": given.seeds, "evaluations saved": {}}
    for name in STUDIES:
        saved[name] = [saved_share(name, seed) for seed in given.seeds]
        result["evaluations saved"][name] = {"mean": fmean(saved[name]), "by seed": saved[name]}
        print(name, saved[name], record("prefix", result), flush=True)
    result["candidates"], result["images"] = CANDIDATES, given.images
    result["candidates whose values differ in any bit"] = differing("digits-4", given.images)
    print(json.dumps(result, indent=2), record("prefix", result))


if __name__ == "__main__":
    main()
