"""What optuna-dashboard shows of a study and its trials: a few facts in words, instead of all that is stored with them.

Attributes that only programs read (digests, costs of layers, names of workers) stay in the database and out of the
pages. What others have written is shown as it is. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optuna.storages import BaseStorage

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate
from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.storage import attrs

WSGIApp = Callable[[dict[str, Any], Any], Iterable[bytes]]
Attrs = list[dict[str, str]]
"""Attributes as the dashboard's pages get them: key and value, which is a string or JSON."""
PAGE = re.compile(r"/api/studies(?:/(\d+))?")
"""Address of the list of studies, or of one of them."""
TIMESTEPS, SETTINGS, SOURCE, PICTURE = "timesteps", "settings", "proposed by", "picture"
SKIPPED, REUSED = "layers skipped", "layers reused"
OURS = frozenset(
    {
        attrs.BASELINE, attrs.OWNER, attrs.RETRIES, attrs.CANDIDATE, attrs.GENERATION, attrs.STAGE, attrs.OPERATOR,
        attrs.PARENTS, attrs.SKIP_RATIO, attrs.COST, attrs.IMAGES, attrs.NOTABLE, attrs.FAILURE,
    }
)  # fmt: skip
"""Attributes of trials that are shown in other words, or not at all."""


def in_words(app: WSGIApp, storage: BaseStorage) -> WSGIApp:
    """The dashboard's application on ``storage``, whose pages show the attributes of adopt's studies in words."""

    def answer(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        found = PAGE.fullmatch(environment.get("PATH_INFO", ""))
        if environment.get("REQUEST_METHOD") != "GET" or found is None:
            return app(environment, start_response)
        begun: list[Any] = []
        body = b"".join(app(environment, lambda *given: begun.append(given)))
        status, headers, *rest = begun[-1]
        if status.startswith("200"):
            body = json.dumps(_reworded(json.loads(body), found[1], storage)).encode()
        kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start_response(status, [*kept, ("Content-Length", str(len(body)))], *rest)
        return [body]

    return answer


def _reworded(page: dict[str, Any], study_id: str | None, storage: BaseStorage) -> dict[str, Any]:
    """The JSON of one study, or of the list of them, with the attributes of adopt's studies in words."""
    if study_id is None:
        for line in page.get("study_summaries", []):
            stored = storage.get_study_user_attrs(line["study_id"])
            if attrs.CONFIG in stored:
                line["user_attrs"] = study_attrs(stored)
        return page
    stored = storage.get_study_user_attrs(int(study_id))
    if attrs.CONFIG not in stored:
        return page
    page["user_attrs"] = study_attrs(stored)
    for trial in [*page["trials"], *page["best_trials"]]:
        trial["user_attrs"] = trial_attrs(trial["user_attrs"])
    page["union_user_attrs"] = _columns(page["union_user_attrs"])
    return page


def study_attrs(stored: Mapping[str, Any]) -> Attrs:
    """What a study is, in words; its note says more. ``stored``: its user attributes."""
    config = StudyConfig.model_validate(stored[attrs.CONFIG])
    low, high = config.sampling.step_bounds
    solver = config.sampling.solver
    reference = "bundled with the model" if config.score.reference is None else config.score.reference
    images = stored.get(attrs.REFERENCE_IMAGES)
    warnings = [*(stored.get(attrs.SANITY) or []), *(stored.get(attrs.WARNINGS) or [])]
    steps = str(low) if low == high else f"{low} to {high}"
    facts = {  # five on the first page of the dashboard's table
        "warnings": "; ".join(warnings),
        "model": config.model.source,
        "sampling": f"{steps} steps, {solver if isinstance(solver, str) else ', '.join(solver)}",
        "value": f"{stored.get(attrs.METRIC, 'value')} of {config.score.images:,} images, lower is better",
        "reference": reference + (f", {images:,} images" if images else ""),
        "written by": f"adopt {stored[attrs.VERSION]}" if attrs.VERSION in stored else "",
    }
    return [{"key": key, "value": value} for key, value in facts.items() if value]


def trial_attrs(given: Attrs) -> Attrs:
    """What a trial tried and where that came from, in words; what others have written stays."""
    stored = {attr["key"]: attr["value"] for attr in given}
    facts = {
        **_candidate_facts(stored.get(attrs.CANDIDATE)),
        SOURCE: _source(stored),
        attrs.GENERATION: stored.get(attrs.GENERATION, ""),
        attrs.COST: _number(stored.get(attrs.COST)),
        PICTURE: stored.get(attrs.NOTABLE, ""),
        attrs.FAILURE: stored.get(attrs.FAILURE, ""),
    }
    others = [attr for attr in given if attr["key"] not in OURS]
    return [*({"key": key, "value": value} for key, value in facts.items() if value), *others]


def _candidate_facts(key: str | None) -> dict[str, str]:
    """Timesteps, settings, and how many layers are skipped and reused; a narrow page may break them at spaces."""
    try:
        candidate = Candidate.from_key(key or "")
    except ValueError:
        return {}
    skipped, reused = (sum(map(len, candidate.units_in(mode))) for mode in (SKIP, REUSE))
    return {
        TIMESTEPS: " ".join(map(str, candidate.timesteps)),
        SETTINGS: ", ".join(f"{name} {_number(str(value))}" for name, value in candidate.settings),
        SKIPPED: str(skipped) if skipped else "",
        REUSED: str(reused) if reused else "",
    }


def _source(stored: Mapping[str, str]) -> str:
    """What proposed a trial: ``baseline uniform``, ``mutation of 3``, ``random``."""
    if attrs.BASELINE in stored:
        return f"baseline {stored[attrs.BASELINE]}"
    parents = re.findall(r"\d+", stored.get(attrs.PARENTS, ""))
    return stored.get(attrs.OPERATOR, "") + (f" of {' and '.join(parents)}" if parents else "")


def _number(text: str | None) -> str:
    """At most four digits of a number, other text as it is."""
    try:
        return f"{float(text or ''):.4g}"
    except ValueError:
        return text or ""


def _columns(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Columns of the table of trials, in the order of ``trial_attrs``."""
    keys = {column["key"] for column in given}
    shown = {
        TIMESTEPS: attrs.CANDIDATE in keys,
        SETTINGS: attrs.CANDIDATE in keys,
        SKIPPED: attrs.CANDIDATE in keys,
        REUSED: attrs.CANDIDATE in keys,
        SOURCE: attrs.OPERATOR in keys or attrs.BASELINE in keys,
        attrs.GENERATION: attrs.GENERATION in keys,
        attrs.COST: attrs.COST in keys,
        PICTURE: attrs.NOTABLE in keys,
        attrs.FAILURE: attrs.FAILURE in keys,
    }
    numbers = (attrs.GENERATION, attrs.COST, SKIPPED, REUSED)
    ours = [{"key": key, "sortable": key in numbers} for key, there in shown.items() if there]
    return [*ours, *(column for column in given if column["key"] not in OURS)]
