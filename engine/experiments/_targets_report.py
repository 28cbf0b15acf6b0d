"""A run of the targets as a report: what the command line prints and the page offers. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from engine.experiments.targets import GROUPS, Figure, RecordedFigure, Result, Row, Target

SIGNS = {"passed": "✓", "failed": "✗", "not measured": "–"}
"""Before the word of a verdict."""

NOT_RECORDED = "not recorded yet"


def report(result: Result, recorded: Mapping[str, RecordedFigure]) -> str:
    """The table with its verdicts, where and how it was measured, in Markdown that reads well as it is."""
    heading = ("target", "bound", "measured", "10–90 %", "verdict", "recorded on a GPU")
    cells = [heading]
    cells += [
        (
            row.target.name,
            str(row.target.bound),
            measured(row),
            spread(row.target, row.figure),
            verdict(row),
            on_gpu(row.target, recorded.get(row.target.key)),
        )
        for row in result.rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heading))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "-|-".join("-" * width for width in widths))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [
        "# Targets",
        result.sentence,
        f"Measured on {result.device}, {result.date}, in {result.seconds:.0f} s; {versions}. {result.ending}",
        "\n".join(lines),
        "## What was measured",
        "\n".join(_explanations(result)),
        "## How",
        "\n".join(f"- {line[0].upper()}{line[1:]}." for line in result.evidence),
    ]
    return "\n\n".join(parts) + "\n"


def measured(row: Row) -> str:
    """What was measured; a dash if nothing was."""
    return "—" if row.figure is None else row.target.bound.amount(row.figure.value)


def spread(target: Target, figure: Figure | None) -> str:
    """From the 10th to the 90th percentile, and of how many runs; a dash of what does not vary."""
    if figure is None or figure.low is None or figure.high is None:
        return "—"
    low, high = (
        target.bound.amount(value).removesuffix(target.bound.unit).strip() for value in (figure.low, figure.high)
    )
    return f"{low} – {high}, {figure.runs} {figure.runs_of}"


def verdict(row: Row) -> str:
    """The verdict with its sign; of what was not measured, why."""
    if row.verdict == "not measured":
        why = row.note.rstrip(".") or "Not measured yet"
        return f"{SIGNS[row.verdict]} {why[0].lower()}{why[1:]}"
    return f"{SIGNS[row.verdict]} {row.verdict}"


def on_gpu(target: Target, recorded: RecordedFigure | None) -> str:
    """What a GPU gave, whether that keeps the bound, and where and when; of what no GPU is needed for, a dash."""
    if target.group == "coverage":
        return "—"
    if recorded is None:
        return NOT_RECORDED
    if recorded.figure is None:
        return f"{SIGNS['failed']} failed ({recorded.provenance})"
    sign = SIGNS["passed" if target.bound.holds(recorded.figure.value) else "failed"]
    return f"{sign} {target.bound.amount(recorded.figure.value)} ({recorded.provenance})"


def _explanations(result: Result) -> Iterator[str]:
    for group in GROUPS:
        said: dict[str, list[str]] = {}
        for row in result.rows:
            if row.target.group == group:
                said.setdefault(f"{row.target.how} {row.note}".strip(), []).append(row.target.name)
        yield from (f"- {'; '.join(names)}. {words}" for words, names in said.items())
