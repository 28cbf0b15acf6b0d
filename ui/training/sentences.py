"""What a run of training shows, in words that follow from its numbers."""

from __future__ import annotations

import numpy as np

from engine.experiments import training
from engine.experiments._training import Recorded, recorded_run
from ui.training.settings import amount, step_seconds

FORMED = 0.5
"""From this score on a head is called an induction head."""

INDUCTION_HEAD = (
    "An induction head looks for the last time that the present token was read and at what came after it then, so that "
    "it can be said again."
)

ONE_LAYER = (
    "One layer cannot have one, however long it learns: the head has to find a place by the token that stood before "
    "it, and only a previous-token head of a layer below can have noted there which that was. Set Depth to 2, and "
    "leave it some 300 steps."
)

GUESSING = float(np.log(training.VOCAB_SIZE))
_CLEAR = 0.05  # nats a token, less is no difference
_COPIES = 0.5  # share of the second round that is right


def loss(found: training.Result) -> str:
    """What the held-out loss did."""
    first, last = found.held_out_loss[0], found.held_out_loss[-1]
    guessing = f"guessing evenly costs ln {training.VOCAB_SIZE} = {GUESSING:.2f}"
    if len(found.checked) == 1:
        return f"Before its first lesson the model is at {first:.2f} nats a token on held-out text; {guessing}."
    words = (
        f"{'So far the' if found.ended == 'running' else 'The'} held-out loss went from {first:.2f} nats a token "
        f"({guessing}) to {last:.2f}: "
    )
    if last >= GUESSING:
        words += "no better than guessing." if last < GUESSING + _CLEAR else "worse than guessing."
    else:
        before = f"{np.exp(first):,.0f}" if first < GUESSING else f"all {training.VOCAB_SIZE}"
        words += f"{np.exp(last):,.0f} equally likely next tokens instead of {before}."
    best = int(found.held_out_loss.argmin())
    if last > found.held_out_loss[best] + _CLEAR:
        words += f" It was lowest after step {found.checked[best]} ({found.held_out_loss[best]:.2f})"
        words += ": after that the model learned its text by heart." if _by_heart(found, best) else "."
    return words


def _by_heart(found: training.Result, best: int) -> bool:
    """Whether the text that it reads has become cheaper since checkup `best`."""
    fell = found.text_loss[-1] < found.text_loss[best] - _CLEAR
    return bool(fell and best > 0 and found.ended != "diverged")


def apart(found: training.Result, random_share: float) -> str:
    """What the kinds of tokens cost of which the training loss is the mean."""
    words = []
    if random_share < 1:
        words.append(
            f"The text that it reads costs {found.text_loss[-1]:.2f}, unread text {found.held_out_loss[-1]:.2f}."
        )
    if random_share > 0:
        why = ", now that it can be copied" if found.copied[-1] > _COPIES else ""
        words.append(f"A random token that is said again costs {found.random_loss[-1]:.2f}{why}.")
    return " ".join(words)


def mixture(random_share: float) -> str:
    """Why a head forms or does not: what the model reads."""
    if random_share == 0:
        return "It reads text alone, which rarely makes a head in so few steps."
    return (
        f"{random_share:.0%} of what it reads is random tokens said twice: only by looking back can their second half "
        "be foretold; text alone rarely makes a head in so few steps."
    )


def formed(found: training.Result) -> int | None:
    """The first checkup at which there was an induction head; None if there was none."""
    reached = np.flatnonzero(found.induction >= FORMED)
    return int(reached[0]) if len(reached) else None


def head_name(found: training.Result, checkup: int) -> str:
    """The best induction head at a checkup, e.g. ``"layer 1, head 0"``."""
    layer, head = found.heads[checkup]
    return f"layer {layer}, head {head}"


def induction(found: training.Result, num_layers: int) -> str:
    """Whether and when a head learned to look back, and which; or why it did not in a model of so many layers."""
    first, last = formed(found), len(found.checked) - 1
    running = found.ended == "running"
    if first is not None:
        when = "by now" if running else "at the end"
        words = f"An induction head formed by step {found.checked[first]}: {head_name(found, first)}"
        if first == last:
            words += f", which scores {found.induction[first]:.0%}."
        elif (found.heads[first] == found.heads[last]).all():
            words += f", which scored {found.induction[first]:.0%} then and scores {found.induction[last]:.0%} {when}."
        else:
            words += (
                f", which scored {found.induction[first]:.0%} then. The best {when} is {head_name(found, last)}, with "
                f"{found.induction[last]:.0%}."
            )
        return (
            f"{words} The best previous-token head scores {found.previous_token[-1]:.0%}, and of random tokens that "
            f"are said again the model gets {found.copied[-1]:.0%} right."
        )
    words = (
        f"No induction head {'has formed so far,' if running else 'formed'} in {found.checked[-1]} steps: the best "
        f"score of a head {_highest(found.induction, found.checked)}, of a previous-token head "
        f"{_highest(found.previous_token, found.checked)}."
    )
    if num_layers == 1:
        return f"{words} {ONE_LAYER}"
    if running:
        return words
    recorded = recorded_run()
    if recorded is not None and (recorded.induction >= FORMED).any():
        read = recorded.checked[(recorded.induction >= FORMED).argmax()] * recorded.tokens_per_step
        words += (
            f" The storyteller's had formed when it had read {read:,} tokens; this run read "
            f"{found.checked[-1] * found.tokens_per_step:,}."
        )
    return words


def _highest(scores: np.ndarray, checked: np.ndarray) -> str:
    """The highest of the scores and, if it is another one, the last."""
    best = int(scores.argmax())
    words = f"is {scores[best]:.0%}"
    if f"{scores[best]:.0%}" == f"{scores[-1]:.0%}":
        return words
    return f"{words} after step {checked[best]} and {scores[-1]:.0%} after step {checked[-1]}"


def look_back(found: training.Result) -> str:
    """What the drawn head does between the lines."""
    before, now = (stripe(weights) for weights in found.head_maps)
    period = found.head_maps.shape[1] // 2
    return (
        f"The head that looks back most, {head_name(found, -1)}, on {period} random tokens said twice. Between the "
        f"lines a token of the second round looks one place past where it stood in the first, {period - 1} tokens "
        f"back: {before:.0%} of its attention before the first step, {now:.0%} after step {found.checked[-1]}. That is "
        f"of this one sequence; its score above, {found.induction[-1]:.0%}, is the mean over other random tokens, in "
        "sequences of three lengths."
    )


def stripe(weights: np.ndarray) -> float:
    """The induction score of one map (2P, 2P): the mean over queries q ≥ P of its weight on key q − P + 1."""
    period = len(weights) // 2
    query = np.arange(period, 2 * period)
    return float(weights[query, query - period + 1].mean(dtype=np.float32))


def storyteller(recorded: Recorded, tokens_per_step: int) -> str:
    """What the dashed curve is, and why it runs otherwise."""
    return (
        "The storyteller is the model that comes with the workbench. It read another mixture, "
        f"{recorded.text_share:.0%} text in blocks of {recorded.block_size} tokens, "
        f"{recorded.tokens_per_step / tokens_per_step:.2g} times as many tokens a step."
    )


def progress(found: training.Result) -> str:
    """When half of what was learned was learned."""
    first, lowest, last = found.held_out_loss[0], found.held_out_loss.min(), found.held_out_loss[-1]
    so_far = " so far" if found.ended == "running" else ""
    if first - lowest < _CLEAR:
        if last > first + _CLEAR:
            return (
                f"The held-out loss has risen{so_far}: from {first:.2f} nats a token before the first step to "
                f"{last:.2f} after step {found.checked[-1]}."
            )
        return (
            f"The held-out loss has not clearly fallen{so_far}: it was {first:.2f} nats a token before the first step."
        )
    half = np.flatnonzero(found.held_out_loss <= (first + lowest) / 2)[0]
    words = f"Half of all progress{so_far} was made by step {found.checked[half]} of {found.checked[-1]}."
    if last > lowest + _CLEAR:
        best = found.checked[found.held_out_loss.argmin()]
        words += f" After step {best} the loss rose again, from {lowest:.2f} to {last:.2f}."
    return words


def speed(found: training.Result) -> str:
    """How much arithmetic a second the steps did, of which there is at least one; what else was done is left out."""
    seconds = step_seconds(found)
    return (
        f"The steps did {amount(found.measured.flops / seconds)}FLOP/s on {found.device}: they took {seconds:.3g} of "
        f"{found.seconds:.3g} s; checkups, samples and weighing one step took the rest."
    )
