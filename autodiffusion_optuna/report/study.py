"""A study as Python and notebooks show it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup, escape

from autodiffusion_optuna.errors import ConfigError, StudyError, choose_from
from autodiffusion_optuna.export.formats import result_of, result_text
from autodiffusion_optuna.export.result import Result
from autodiffusion_optuna.report.figures import FIGURES
from autodiffusion_optuna.results.held_out import significant
from autodiffusion_optuna.results.summary import Row, StudySummary, banks_of

CELL = "padding:2px 10px;text-align:right"


@dataclass(frozen=True, eq=False, repr=False)
class StudyReport:
    """A study as it was read: it does not change while others go on with the study.

    ``summary``: all its figures, as ``adopt show`` prints them; ``summary.to_json()`` is that of ``adopt show --json``.

    >>> study.best_timesteps  # doctest: +SKIP
    (930, 701, 412, 105)
    >>> study.best_schedule.write("best.json")  # doctest: +SKIP
    >>> study.plot("history")  # doctest: +SKIP
    """

    summary: StudySummary

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.summary.config.name

    @cached_property
    def best_schedule(self) -> Result:
        """Everything that repeats the images of the best candidate (StudyError where none is finished).

        ``apply`` takes it, ``write`` makes it the JSON of ``adopt export``; ``levels`` are its sigmas.
        """
        return result_of(self.summary)

    @property
    def best_timesteps(self) -> tuple[int, ...]:
        """Timesteps of the best candidate, from noise to image (StudyError where none is finished)."""
        return self.best_schedule.timesteps

    @property
    def baselines(self) -> dict[str, tuple[int, ...]]:
        """Timesteps of each baseline by its name."""
        return {row.name: row.candidate.timesteps for row in self.summary.baselines}

    def export(self, form: str = "diffusers", *, source: str | Path | None = None) -> str:
        """The best candidate as text, as ``adopt export`` writes it; ``form``: a name of ``export.formats.FORMATS``.

        ``source``: folder or hub id of the model, where that is another one now, or the model was in memory.
        ``ConfigError`` for an unknown format or a model that it cannot hold, ``StudyError`` where nothing is finished.
        """
        best = self.best_schedule
        return result_text(best if source is None else best.with_model(source=str(source)), form)

    def plot(self, figure: str = "timesteps") -> go.Figure:
        """A figure of ``adopt report``, which a notebook shows: a name of ``report.figures.FIGURES``.

        ``ConfigError`` for an unknown name, ``StudyError`` where the study has nothing to draw in it.
        """
        if figure not in FIGURES:
            raise ConfigError(choose_from("figure", figure, FIGURES))
        drawn = FIGURES[figure][1](self.summary)
        if drawn is None:
            raise StudyError(f"study {self.name!r} has nothing to show in figure {figure!r}; choose another")
        return drawn

    def __repr__(self) -> str:
        summary = self.summary
        done = f"{len(summary.finished)} of {summary.config.search.trials} candidates"
        best = "none finished"
        if summary.best is not None:
            best = f"best {summary.metric}, {summary.best_images}: {significant(summary.best.chosen_by)}"
        return f"StudyReport({self.name!r}, {done}, {best})"

    def __str__(self) -> str:
        """The headline and the table of ``_repr_html_`` as text."""
        rows = [self._head(), *map(self._cells, self._rows())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([repr(self), *self._headline(), *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        """The best found, the baselines from best to worst, and the floor of many steps, as a table."""
        head = "".join(f'<th style="{CELL}">{escape(cell)}</th>' for cell in self._head())
        lines = [
            "".join(f'<td style="{CELL}">{escape(cell)}</td>' for cell in self._cells(row)) for row in self._rows()
        ]
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        notes = "".join(f"<li>{escape(line)}</li>" for line in self.summary.warnings())
        listed = f"<ul>{notes}</ul>" if notes else ""
        said = "".join(f"<p>{escape(line)}</p>" for line in [repr(self), *self._headline()])
        return Markup(f"{said}<table><tr>{head}</tr>{body}</table>{listed}")

    def _headline(self) -> list[str]:
        headline = self.summary.headline
        return [line for line in (headline and headline.text(), self.summary.choice_text) if line]

    def _rows(self) -> list[Row]:
        """The candidates, then the floor of many steps where it was scored."""
        floor = self.summary.many_steps
        return [*self.summary.rows(), *([] if floor is None else [floor])]

    def _head(self) -> list[str]:
        size = self.summary.held_out_size
        held_out = f"held-out noise, 95 %, {banks_of(size)} images" if size else "held-out noise"
        headline = self.summary.headline
        difference = f"difference to {headline.baseline.name if headline else 'uniform'}, 95 %"
        value = f"{self.summary.value_name}, search noise"
        return ["candidate", held_out, difference, value, "cost", "settings", "timesteps"]

    def _cells(self, row: Row) -> list[str]:
        held_out = "-" if row.held_out is None else row.held_out.text
        if row.held_out is not None and row.held_out.size != self.summary.held_out_size:
            held_out += f" ({banks_of(row.held_out.size)})"
        difference = self.summary.difference(row)
        timesteps = row.timesteps if row.candidate.steps < 50 else f"{row.candidate.steps} uniform ones"
        return [
            row.name, held_out, "-" if difference is None else difference.text, row.value_text, f"{row.cost:.2f}",
            row.settings or "-", timesteps,
        ]  # fmt: skip
