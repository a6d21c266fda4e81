"""Prefix memory on a real search: scores equal to the bit with and without it, evaluations saved, bytes held.

    python benchmarks/studies.py digits-4 digits-4-paper    # first: makes the searches
    python benchmarks/prefix.py

Every candidate of the ``digits-4`` search is scored again without the memory; then once more in the same order with a
memory of a tenth of the default budget, which has to drop most of what it remembers.
"""

from __future__ import annotations

import json
from dataclasses import replace

from common import record

from autodiffusion_optuna import records
from autodiffusion_optuna import study as runner
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.prefix import PrefixMemory
from autodiffusion_optuna.report import load_study
from autodiffusion_optuna.storage import open_storage
from studies import database, shown

SMALL_BUDGET = 16 * 2**20


def saved_share(name: str) -> float:
    evaluations = shown(name)["evaluations"]
    return evaluations["saved"] / (evaluations["saved"] + evaluations["run"])


def main() -> None:
    study = load_study(open_storage(f"sqlite:///{database('digits-4')}", create=False), "digits-4")
    searched = records.values_by_key(study)
    config = load_preset("digits-4")
    evaluator = runner.build(config).evaluator
    plain = replace(evaluator, memory=None)
    small = replace(evaluator, memory=PrefixMemory(SMALL_BUDGET))
    assert small.memory is not None
    differ, over = 0, 0
    for key, value in searched.items():
        candidate = Candidate.from_key(key)
        without = plain.score(candidate, [config.score.images]).value
        with_small = small.score(candidate, [config.score.images]).value
        differ += not (without == with_small == value)
        over += small.memory.nbytes > SMALL_BUDGET
    result = {
        "candidates": len(searched),
        "candidates whose values differ in any bit": differ,
        "times the memory was over its budget": over,
        "evaluations saved, digits-4": saved_share("digits-4"),
        "evaluations saved, digits-4-paper": saved_share("digits-4-paper"),
    }
    print(json.dumps(result, indent=2), record("prefix", result))


if __name__ == "__main__":
    main()
