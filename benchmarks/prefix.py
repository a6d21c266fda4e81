"""prefix cache on a real search: scores equal to the bit with and without it, and evaluations saved.

    python benchmarks/studies.py digits-4 digits-4-paper    # first: makes the searches
    python benchmarks/prefix.py

The ``digits-4`` search goes on to 200 candidates, and each of them is scored again without the prefix cache.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

from common import RESULTS, record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study import components
from studies import ADOPT, database

CANDIDATES = 200


def go_on() -> None:
    """Resume the search to ``CANDIDATES``; a search that is there already is not run again."""
    arguments = ["--study", "digits-4", "--storage", str(database("digits-4"))]
    subprocess.run([*ADOPT, "run", *arguments, "--set", f"search.trials={CANDIDATES}"], check=True)


def saved_share(name: str) -> float:
    evaluations = json.loads((RESULTS / f"{name}.json").read_text())["result"]["show"]["evaluations"]
    return float(evaluations["saved"] / (evaluations["saved"] + evaluations["run"]))


def main() -> None:
    go_on()
    study = load_study(open_storage(f"sqlite:///{database('digits-4')}", create=False), "digits-4")
    searched = values_by_key(study)
    config = load_preset("digits-4")
    plain = replace(components.build(config).evaluator, prefix_cache=None)
    differ = 0
    for key, value in searched.items():
        differ += plain.score(Candidate.from_key(key), [config.score.images]).value != value
    result = {
        "candidates": len(searched),
        "candidates whose values differ in any bit": differ,
        "evaluations saved, digits-4": saved_share("digits-4"),
        "evaluations saved, digits-4-paper": saved_share("digits-4-paper"),
    }
    print(json.dumps(result, indent=2), record("prefix", result))


if __name__ == "__main__":
    main()
