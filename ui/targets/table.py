"""The table of targets as HTML: a row a target on a wide window, a card a target on a narrow one."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterator, Mapping, Sequence

from engine.experiments._targets_report import measured, on_gpu, spread, verdict
from engine.experiments.targets import GROUPS, RecordedFigure, Row, Verdict
from ui import theme

COLUMNS = ("Target", "Bound", "Measured here", "10–90 %", "Verdict", "Recorded on a GPU")

_WIDTHS = (27, 12, 11, 15, 16, 19)
"""Of the columns, in per cent."""

_TINTS: dict[Verdict, int] = {"passed": 2, "failed": 1, "not measured": 6}
"""Places in `theme.CATEGORIES`."""

_STYLE = """<style>
.targets { width: 100%; border-collapse: collapse; font-size: 0.9rem; margin-bottom: 0.5rem; }
.targets th, .targets td { text-align: left; vertical-align: top; padding: 0.35rem 0.6rem 0.35rem 0;
  border: 0; border-bottom: 1px solid LINE; overflow-wrap: anywhere; }
.targets thead th { color: MUTED; font-weight: 600; }
.targets th.group { padding-top: 1.1rem; font-size: 1rem; font-weight: 700; }
.targets tbody th { font-weight: 400; }
.targets .verdict { display: inline-block; padding: 0 0.45rem; border-radius: 0.5rem; }
.targets .note { display: block; color: MUTED; font-size: 0.8rem; font-weight: 400; }
.targets td { font-variant-numeric: tabular-nums; }
@media (min-width: 900px) { .targets { table-layout: fixed; } WIDTHS}
@media (max-width: 899px) {
  .targets, .targets tbody, .targets tr, .targets th, .targets td { display: block; }
  .targets thead { display: none; }
  .targets tr { border-bottom: 1px solid LINE; padding: 0.5rem 0; }
  .targets th, .targets td { border: 0; padding: 0.1rem 0; }
  .targets tbody th { font-weight: 600; }
  .targets td { display: grid; grid-template-columns: 9rem 1fr; }
  .targets td::before { content: attr(data-label); color: MUTED; }
  .targets td .verdict { justify-self: start; }
  .targets td.empty { display: none; }
}
TINTS</style>"""


def table(rows: Sequence[Row], recorded: Mapping[str, RecordedFigure], *, mode: theme.Mode) -> str:
    """All rows under the names of their groups.

    Args:
        rows: measured or not.
        recorded: what a GPU gave, by the targets' keys.
        mode: light or dark.
    """
    heads = "".join(f"<th scope='col'>{name}</th>" for name in COLUMNS)
    bodies = "".join(_groups(rows, recorded))
    return f"{_style(mode)}<table class='targets'><thead><tr>{heads}</tr></thead>{bodies}</table>"


def _groups(rows: Sequence[Row], recorded: Mapping[str, RecordedFigure]) -> Iterator[str]:
    for group, title in GROUPS.items():
        chosen = [row for row in rows if row.target.group == group]
        if chosen:
            head = f"<tr><th class='group' scope='rowgroup' colspan='{len(COLUMNS)}'>{html.escape(title)}</th></tr>"
            notes = [row.note for row in chosen]
            lines = (
                _row(row, recorded.get(row.target.key), repeated=place > 0 and notes[place - 1] == row.note)
                for place, row in enumerate(chosen)
            )
            yield f"<tbody>{head}{''.join(lines)}</tbody>"


def _row(row: Row, on_a_gpu: RecordedFigure | None, *, repeated: bool) -> str:
    """One target; a note that the row above has too is not repeated."""
    note = "" if repeated or row.verdict == "not measured" else row.note
    below = f"<span class='note'>{html.escape(note)}</span>" if note else ""
    cells = (
        html.escape(str(row.target.bound)),
        html.escape(measured(row)),
        html.escape(spread(row.target, row.figure)),
        f"<span class='verdict {row.verdict.replace(' ', '-')}'>{html.escape(verdict(row))}</span>",
        html.escape(on_gpu(row.target, on_a_gpu)),
    )
    drawn = (
        f"<td data-label='{label}'{' class=empty' if cell == '—' else ''}>{cell}</td>"
        for label, cell in zip(COLUMNS[1:], cells, strict=True)
    )
    return f"<tr><th scope='row'>{html.escape(row.target.name)}{below}</th>{''.join(drawn)}</tr>"


def _style(mode: theme.Mode) -> str:
    surface = theme.SURFACES[mode]
    tints = "".join(
        f".targets .{name.replace(' ', '-')} {{ background: "
        f"color-mix(in srgb, {theme.CATEGORIES[mode][place]} 24%, {surface.paper}); color: {surface.ink}; }}\n"
        for name, place in _TINTS.items()
    )
    widths = " ".join(
        f".targets thead th:nth-child({place}) {{ width: {width}%; }}" for place, width in enumerate(_WIDTHS, 1)
    )
    parts = {"LINE": surface.line, "MUTED": surface.muted, "TINTS": tints, "WIDTHS": widths}
    return functools.reduce(lambda style, part: style.replace(*part), parts.items(), _STYLE)
