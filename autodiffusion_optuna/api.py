"""The package from Python, beside the command line: search, look at a study, and draw images. Torch-free at import.

>>> import autodiffusion_optuna as adopt
>>> study = adopt.search("mixture", steps=3, trials=8, score_images=64, quiet=True)
>>> len(study.best_timesteps)
3
>>> adopt.sample("mixture", study.best_timesteps, images=2).shape
(2, 4, 4, 1)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autodiffusion_optuna.config import MEMORY, known_keys, locate_files, parse_config
from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.report.study import StudyReport
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.url import storage_url

if TYPE_CHECKING:
    from autodiffusion_optuna.evaluation.models import Model
    from autodiffusion_optuna.study.lifecycle import Run

EVERY = 20
"""Candidates between two printed lines, besides one for every new best."""
IN_MEMORY = f"{MEMORY}images"
"""``score.reference`` of a study whose images were in memory."""
ARGUMENTS = ("name", "solver", "extractor", "trials", "steps", "source", "prompts", "reference")
"""Settings that have an argument of their own, or come from one."""
AMBIGUOUS = ("images", "preset", "seed")


def load_study(name: str, storage: str | Path | None = None) -> StudyReport:
    """A study in a database, as it stands now.

    ``storage``: URL or SQLite file; None: ``$ADOPT_STORAGE``, else ``adopt.db`` in the current folder.

    >>> study = load_study("digits-4")  # doctest: +SKIP
    >>> study.best_timesteps  # doctest: +SKIP
    (938, 698, 407, 124)

    ``StorageError`` where the database cannot be read, ``StudyError`` where it holds no such study.
    """
    from autodiffusion_optuna.storage import studies
    from autodiffusion_optuna.storage.database import open_storage

    database = open_storage(storage_url(None if storage is None else str(storage)), create=False)
    return StudyReport(read_summary(studies.load_study(database, name)))


def search(
    model: Any,
    *,
    images: Any = None,
    steps: int | Mapping[str, int] = 6,
    trials: int = 100,
    solver: str | Sequence[str] = "ddim",
    scheduler: Any = None,
    prompts: Sequence[str] | str | Path | None = None,
    extractor: str | None = None,
    seed: int = 0,
    name: str | None = None,
    storage: str | Path | None = None,
    trust: bool = False,
    quiet: bool = False,
    on_trial: Callable[[StudyReport], None] | None = None,
    **settings: Any,
) -> StudyReport:
    """Search the timesteps of a model, as ``adopt run`` does, and score the winner on held-out noise.

    ``model``: a diffusers pipeline, or a ``UNet2DModel`` with its ``scheduler``, both run where they lie and left as
    they were; or the name, folder or hub id of a model. ``images``: like those that the model is to make: a folder, a
    file of images or statistics, an array uint8 [N, H, W, C] or [N, C, H, W], or PIL images; a bundled model brings its
    own. ``prompts``: of a text-to-image model, a list or a file. ``steps``: or ``{"min": 4, "max": 8}``.
    ``extractor``: None takes a bundled model's own, for small images ``pixels``, else for colour ``efficientnet-lite0``
    where it is installed. ``seed``: of the search; that of the noise is ``score_seed``.
    ``name``, ``storage``: where the study is kept, and goes on when it is called again; without ``storage`` nothing is
    kept but what is returned. ``settings``: those of a study file, such as ``max_skip=0.3``, ``score_images=500`` or
    ``held_out_banks=5``, with the section's name before those that occur twice.
    ``quiet``: print nothing. ``on_trial``: called with the study as it stands after each candidate. Ctrl-C, or a
    notebook's stop button, ends the search and returns what was found so far, without held-out values.

    >>> study = search(pipe, images="photos/", steps=6, trials=200)  # doctest: +SKIP
    >>> study = search(unet, scheduler=DDPMScheduler(), images=array)  # doctest: +SKIP

    AdoptError children for what cannot be searched; nothing is written then.
    """
    if storage is not None and name is None:
        raise ConfigError("storage was given without name; give both, so that the same call goes on with that study")
    from autodiffusion_optuna.study import lifecycle

    table = _table(settings, search={"trials": trials, "seed": seed}, sampling={"solver": solver, "steps": steps})
    table["name"] = name or "search"
    pixels = None
    if images is not None:
        table["score"]["reference"], pixels = _reference(images)
    with _opened(model, scheduler, prompts, table, trust) as (opened, model_settings), _place(storage) as url:
        table["model"] = model_settings
        table["score"]["extractor"] = extractor or _usual_extractor(model_settings, opened)
        config = parse_config(table)
        say = None if quiet else partial(print, flush=True)
        run = lifecycle.open_run(config, url, trust=trust, model=opened, images=pixels, say=say)
        try:
            return _work(run, _Progress(run, quiet, on_trial))
        finally:
            run.storage.engine.dispose()


def sample(
    model: Any,
    timesteps: Any,
    *,
    images: int = 16,
    seed: int | None = None,
    solver: str | None = None,
    scheduler: Any = None,
    prompts: Sequence[str] | str | Path | None = None,
    trust: bool = False,
    **settings: Any,
) -> NDArray[np.uint8]:
    """Images of a list of timesteps or of a result, uint8 [images, H, W, C]: those that a search scores.

    ``model``, ``scheduler``, ``prompts``: as for ``search``. ``timesteps``: a list, the text of one as ``adopt score
    --timesteps`` takes it ("ays:sd15"), a ``Result``, its JSON's path or dict, or a study. Image i comes from the noise
    of (``seed``, i); a result has a seed of its own. ``solver``: of a list; None is ddim.
    ``settings``: of the study file's ``[model]``, and for a list of ``[sampling]``.

    >>> grid = sample("digits", [938, 698, 407, 124], images=8, seed=1)  # doctest: +SKIP

    AdoptError children where they do not fit the model.
    """
    from autodiffusion_optuna.candidate import Candidate
    from autodiffusion_optuna.evaluation.drawing import ImageSampler
    from autodiffusion_optuna.evaluation.evaluator import largest_batch
    from autodiffusion_optuna.evaluation.sampling import Sampling
    from autodiffusion_optuna.export.applicable import read_applicable, read_timesteps
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.search.lists import read_list
    from autodiffusion_optuna.study.components import read_sampling

    if type(images) is not int or images < 1:
        raise ConfigError(f"images = {images!r}; give how many to draw, 1 or more")
    if seed is not None and type(seed) is not int:
        raise ConfigError(f"seed = {seed!r}; give an integer")
    if not isinstance(solver, (str, type(None))):
        raise ConfigError(f"solver = {solver!r}; images are drawn by one, give its name")
    text = timesteps if _is_text_of_list(timesteps) else None
    found = read_applicable(timesteps, solver) if text is None else []
    table = _table(settings, search={"trials": 1}, score={"extractor": "pixels"})
    table["name"] = "sample"
    if not isinstance(found, Result):
        table["sampling"] |= {"solver": solver or "ddim", "steps": max(len(found), 1)}
    elif table["sampling"]:
        raise ConfigError(f"{next(iter(table['sampling']))} was given, and {found} has its own; leave it out")
    else:
        table["sampling"] |= {"steps": len(found.timesteps)}
        table["model"] = {**_drawn_with(found), **table["model"]}
    with _opened(model, scheduler, prompts, table, trust) as (opened, model_settings):
        config = parse_config({**table, "model": model_settings})
        if isinstance(found, Result):
            candidate = found.candidate(opened.units, opened.schedule.T)
            sampling, noise = Sampling(**found.sampling_settings()), found.config.score.seed
        else:
            if text is None:
                candidate = Candidate(read_timesteps(found, opened.schedule.T))
            else:
                listed = read_list(text, opened.schedule)
                candidate = Candidate(listed.timesteps)
                for note in listed.notes:
                    warnings.warn(note, stacklevel=2)
            sampling, noise = read_sampling(config.sampling).fixed, 0
        opened.check_scale(sampling.guidance)
        batch = largest_batch(opened) if config.model.batch == "auto" else config.model.batch
        sampler = ImageSampler(opened, sampling, seed=noise if seed is None else seed, batch=batch)
        drawn: NDArray[np.uint8] = sampler.sample(candidate, 0, images).permute(0, 2, 3, 1).cpu().numpy()
        return np.ascontiguousarray(drawn)


def _table(settings: Mapping[str, Any], **given: dict[str, Any]) -> dict[str, Any]:
    """A study file's table of keywords: ``section_name`` everywhere, ``name`` alone where one setting has it."""
    known = [key.split(".") for key in known_keys() if key.count(".") == 1]
    places = {f"{section}_{name}": (section, name) for section, name in known}
    places |= {name: (section, name) for section, name in known if name not in AMBIGUOUS}
    table: dict[str, Any] = {
        section: dict(given.get(section, {})) for section in ("model", "sampling", "search", "score")
    }
    for key, value in settings.items():
        if key not in places or places[key][1] in ARGUMENTS:
            short = [
                name if name in places else f"{section}_{name}" for section, name in known if name not in ARGUMENTS
            ]
            raise ConfigError(choose_from("setting", key, short))
        section, name = places[key]
        table[section][name] = str(value) if isinstance(value, Path) else value
    locate_files(table, Path.cwd())
    return table


def _is_text_of_list(given: Any) -> bool:
    """Whether it is the text of a list rather than the path of a result."""
    from autodiffusion_optuna.search.lists import looks_like_list

    return isinstance(given, str) and not given.endswith(".json") and looks_like_list(given)


def _drawn_with(result: Any) -> dict[str, Any]:
    """Of a result's ``[model]``: what decides its images, besides the model itself."""
    settings: dict[str, Any] = result.config.model.model_dump(mode="json", exclude_defaults=True)
    return {name: settings[name] for name in settings if name not in ("source", "device", "precision", "compile")}


def _reference(images: Any) -> tuple[str, Any]:
    """``score.reference``, and the images uint8 [N, C, H, W] where they are in memory."""
    if isinstance(images, (str, Path)):
        table = {"score": {"reference": str(images)}}
        locate_files(table, Path.cwd())
        return table["score"]["reference"], None
    from autodiffusion_optuna.evaluation.references.in_memory import images_of

    return IN_MEMORY, images_of(images)


@contextmanager
def _opened(
    given: Any, scheduler: Any, prompts: Any, table: Mapping[str, Any], trust: bool
) -> Iterator[tuple[Model, dict[str, Any]]]:
    """The model that was named or given, and ``[model]`` of its study."""
    from autodiffusion_optuna.evaluation.models import in_memory, load_model
    from autodiffusion_optuna.evaluation.models.prompts import read_prompts
    from autodiffusion_optuna.export.pipelines import is_applied

    provisional: dict[str, Any] = {**table, "score": {"extractor": "pixels", **table["score"]}}
    settings, listed = dict(table["model"]), prompts is not None and not isinstance(prompts, (str, Path))
    if prompts is not None and not listed:
        settings["prompts"] = str(prompts)
    if isinstance(given, (str, Path)):
        if scheduler is not None or listed:
            what = "prompts as a list" if scheduler is None else "scheduler"
            raise ConfigError(f"{what} goes with a model in memory, {str(given)!r} is loaded; give it as files")
        settings["source"] = str(given)
        located = {"model": settings}
        locate_files(located, Path.cwd())
        yield load_model(parse_config({**provisional, **located}).model, trust=trust), settings
        return
    if is_applied(given):
        raise ConfigError("the pipeline has a result or a list applied; take it back first with remove(pipe)")
    in_memory.check_its_own(settings)
    parts = in_memory.parts_of(given, scheduler)
    settings |= parts.settings
    located = {"model": settings}
    locate_files(located, Path.cwd())
    config = parse_config({**provisional, **located}).model
    texts = tuple(prompts) if listed else None if config.prompts is None else read_prompts(Path(config.prompts))
    with in_memory.model_in_memory(parts, config, texts) as model:
        yield model, settings


def _usual_extractor(settings: Mapping[str, Any], model: Model) -> str:
    """What images are compared by where nobody chose; ``ConfigError`` where nothing here can."""
    from autodiffusion_optuna.evaluation.features import usual_extractor

    found = usual_extractor(settings["source"], model.picture_shape)
    if found is None:
        raise ConfigError(
            f"images of {'x'.join(map(str, model.picture_shape))} are too large for extractor 'pixels'; give "
            "extractor=, such as 'inception' with score_weights='inception-2015-12-05.pt'"
        )
    return found


@contextmanager
def _place(storage: str | Path | None) -> Iterator[str]:
    """URL of the database: the one given, or one that is gone afterwards."""
    if storage is not None:
        yield storage_url(str(storage))
        return
    with TemporaryDirectory(prefix="adopt-", ignore_cleanup_errors=True) as folder:
        yield f"sqlite:///{folder}/study.db"


def _work(run: Run, progress: _Progress) -> StudyReport:
    """Search to the budget and score the winner; what was found so far where the user stops it."""
    from autodiffusion_optuna.study import loop, validation

    progress.say_start()
    try:
        loop.work(run.components, run.study, run.storage, progress.show if progress.looks else None, run.store)
        if run.components.config.finalists:
            progress.say("scoring the finalists on validation noise, then the winner and the baselines on held-out …")
        else:
            progress.say("scoring the winner and the baselines on held-out noise …")
        validation.validate(run.components, run.study)
    except KeyboardInterrupt:
        report = StudyReport(read_summary(run.study))
        if report.summary.best is None:
            raise
        progress.say(f"stopped: {report!r}")
        return report
    return StudyReport(read_summary(run.study))


class _Progress:
    """Lines about a search as it goes: a new best, and one every so often."""

    def __init__(self, run: Run, quiet: bool, on_trial: Callable[[StudyReport], None] | None) -> None:
        self.run, self.quiet, self.on_trial = run, quiet, on_trial
        self.lowest: float | None = None

    @property
    def looks(self) -> bool:
        """Whether anybody wants to know."""
        return not self.quiet or self.on_trial is not None

    def say(self, line: str) -> None:
        """Print a line, unless nobody wants to read it."""
        if not self.quiet:
            print(line, flush=True)

    def say_start(self) -> None:
        """What is searched and how it is scored, and what is doubtful about it."""
        config, summary = self.run.components.config, read_summary(self.run.study)
        self.say(
            f"searching {config.search.trials} candidates of {config.model.source}, {summary.value_name} each"
            + (f", {len(summary.finished)} finished before" if summary.finished else "")
        )
        for line in summary.warnings():
            self.say(f"warning: {line}")

    def show(self) -> None:
        """Look at the study after a candidate."""
        summary = read_summary(self.run.study)
        finished, budget, lead = len(summary.finished), summary.config.search.trials, summary.lead
        due = finished % EVERY == 0 or finished == budget
        if lead is not None and (self.lowest is None or lead[0] < self.lowest or due):
            self.lowest = lead[0]
            self.say(f"{finished} of {budget} candidates, best {summary.metric} {lead[0]:.4g}  {lead[1]}")
        if self.on_trial is not None:
            self.on_trial(StudyReport(summary))
