"""What the bars of the whole model say, in words made from their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.experiments import full_model, full_model_step
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.full_model import PARTS, Moment, Prediction
from engine.experiments.full_model_step import Step
from ui.charts.full_model import digits
from ui.charts.memory import amount

_CLOSE = 0.0005  # of the measured memory: said to be the same
_MANY = 10  # runs; of fewer nothing is called a percentile
_STORED = ("weights", "scales")


def named(switches: Sequence[str]) -> str:
    """Switches by their names for people, e.g. ``"LoRA, 4-bit base"``."""
    return ", ".join(SWITCHES[name] for name in switches) or "nothing on"


def memory_sentence(found: full_model.Result, step: Step | None) -> str:
    """When most is held, how that was predicted, what each switch does to it, the largest first, and why 4 bits do."""
    peak = found.chosen.memory.peak
    part, size = max(peak.parts.items(), key=lambda item: item[1])
    words = (
        f"A step is fullest {when(peak)}: {amount(peak.total)}, {size / peak.total:.0%} of it {part}, "
        f"{_model_share(peak):.0%} the model itself"
    )
    if step is not None:
        off = abs(step.error)
        measured = f"measured {amount(step.peak_bytes)}"
        words += f"; {measured}, {'as predicted' if off < _CLOSE else f'{off:.1%} off the prediction'}"
    saved = {name: saved_bytes(found, name) for name in SWITCHES}
    ranked = sorted(saved, key=lambda name: -abs(saved[name]))
    effects = ", ".join(f"{SWITCHES[name]} {memory_effect(saved[name])}" for name in ranked)
    return f"{words}. With the others as they are set, {effects}. {four_bits_sentence(*found.worth('quantization'))}"


def when(moment: Moment) -> str:
    """A moment of a step as a part of a sentence, e.g. ``"at the end of the forward pass"``."""
    if moment.name == "the gradient of the loss":
        return "while the gradient of the loss is computed"
    if moment.name.startswith("the end"):
        return f"at {moment.name}"
    return f"in {'' if moment.name.startswith('the ') else 'the '}{moment.name}"


def four_bits_sentence(on: Prediction, off: Prediction) -> str:
    """What of 4 bits' saving is the weights themselves, and what the training that frozen ones do without.

    Args:
        on, off: with them and without, all else alike.
    """
    before, after = off.memory.peak.parts, on.memory.peak.parts
    saved = {part: before.get(part, 0) - after.get(part, 0) for part in PARTS}
    themselves = sum(saved.pop(part) for part in _STORED)
    rest = sum(saved.values())
    words = f"In 4 bits the weights themselves are {amount(themselves)} smaller"
    if rest == 0:
        return f"{words}, and that is all: adapters freeze the matrices without it too."
    if rest < 0:
        return f"{words}, but the rest of a step takes {amount(-rest)} more: each is unpacked for its products."
    parts = ", ".join(f"{part} {amount(size)}" for part, size in saved.items() if size > 0)
    learn = f"{on.total.learning:,} numbers instead of {off.total.learning:,}"
    who = "" if {"lora", "moe"} & set(on.on) else "only embeddings and norms, "
    return f"{words}; what is frozen does without {parts}. What learns then: {who}{learn}."


def unmeasured_sentence(params: SwitchParams, made: full_model.Prediction) -> str:
    """What the bars are where nothing could be measured, and what a run sets aside."""
    needed = full_model_step.Params(**params.model_dump()).memory_bytes()
    return (
        "Nothing is measured with these settings: the bars are what is predicted of them. A run sets aside "
        f"{amount(needed)}: the {amount(made.memory.peak.total)} of the step, the plain model that is built before it, "
        "and a fifth in reserve."
    )


def saved_bytes(found: full_model.Result, name: str) -> int:
    """Of a step, by a switch."""
    on, off = found.worth(name)
    return off.memory.peak.total - on.memory.peak.total


def memory_effect(saved: int) -> str:
    """What a switch does to memory, in words."""
    if saved == 0:
        return "changes nothing"
    return f"{'saves' if saved > 0 else 'costs'} {amount(abs(saved))}"


def _model_share(peak: Moment) -> float:
    return sum(peak.parts.get(part, 0) for part in ("weights", "scales", "adapters", "routers")) / peak.total


def speed_sentence(step: Step | None, flipped: Mapping[str, Step | None], off: Step | None = None) -> str:
    """How long a step takes, and what each switch that was measured does to it.

    Args:
        step: of the settings; None where it was not measured.
        flipped: with one switch the other way, by its name; None where that was not measured.
        off: with all of them off; None where that was not measured, or is one of the others.
    """
    if step is None:
        return "A step with these settings has not been measured yet."
    low, high, what = spread(step)
    words = (
        f"A step takes {digits(step.evidence.median_ms)} ms ({what} {digits(low)} to {digits(high)}), "
        f"{step.tokens_per_second:,.0f} tokens a second."
    )
    pairs = {
        name: (step, other) if name in step.on else (other, step)
        for name, other in flipped.items()
        if other is not None
    }
    if pairs:
        words += f" {'; '.join(f'{SWITCHES[name]} {speed_effect(*pair)}' for name, pair in pairs.items())}."
    if off is not None:
        words += (
            f" With everything off it takes {digits(off.evidence.median_ms)} ms: what is on {speed_effect(step, off)}."
        )
    if not pairs:
        return f"{words} Flip a switch and flip it back, or measure every switch, to see what each is worth."
    compared = [step, *(other for other in (*flipped.values(), off) if other is not None)]
    return f"{words}{_why(pairs)}{_caution(compared)}"


def spread(step: Step) -> tuple[float, float, str]:
    """From where to where a step's times go, in milliseconds, and what these ends are, in words."""
    if len(step.rounds) > 1:
        return min(step.rounds), max(step.rounds), f"range of {len(step.rounds)} turns"
    time = step.evidence
    return time.low_ms, time.high_ms, "10th to 90th percentile" if time.runs >= _MANY else f"spread of {time.runs} runs"


def speed_effect(on: Step, off: Step) -> str:
    """What a switch does to a step's time, and whether that can be told from chance."""
    one, other = on.evidence.median_ms, off.evidence.median_ms
    if not apart(on, off):
        what = "adds" if one > other else "takes off"
        return f"{what} about {digits(abs(one - other))} ms, which is within the spread"
    ratio = one / other
    return f"makes a step {ratio:.2f} times slower" if ratio > 1 else f"makes a step {1 / ratio:.2f} times faster"


def apart(one: Step, other: Step) -> bool:
    """Whether one is slower in every turn or, if they were not timed in turns, their spreads leave a gap."""
    a, b = one.evidence, other.evidence
    if 1 < len(one.rounds) == len(other.rounds):
        slower = [mine > theirs for mine, theirs in zip(one.rounds, other.rounds, strict=True)]
        return (all(slower) or not any(slower)) and a.median_ms != b.median_ms
    return a.low_ms > b.high_ms or b.low_ms > a.high_ms


def _why(pairs: Mapping[str, tuple[Step, Step]]) -> str:
    """Why 4 bits are slower where they are: memory is what they are for."""
    if "quantization" not in pairs:
        return ""
    on, off = pairs["quantization"]
    if not apart(on, off) or on.evidence.median_ms < off.evidence.median_ms:
        return ""
    return " 4 bits take time: every product unpacks its matrix first, forward and backward."


def _caution(steps: Sequence[Step]) -> str:
    """What is to be known of times that were not taken in turns."""
    turns = {len(step.rounds) for step in steps}
    if len(turns) == 1 and (count := turns.pop()) > 1:
        return f" All were timed in {count} turns, and told apart is what differed alike in each of them."
    return (
        " Not all were timed in turns, and what else the machine did meanwhile is in the difference: “Measure every "
        "switch” takes turns."
    )
