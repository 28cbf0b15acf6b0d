"""What a run of training shows, in words that follow from its numbers."""

from __future__ import annotations

import numpy as np

from engine.experiments import training
from engine.experiments._training import recorded_run
from ui.training.settings import amount, step_seconds

FORMED = 0.5
"""From this score on a head is called an induction head."""

GUESSING = float(np.log(training.VOCAB_SIZE))
_RECENT = 15  # steps
_CLEAR = 0.05  # nats a token, less is no difference
_COPIES = 0.5  # share of the second round that is right


def loss(found: training.Result) -> str:
    """What the held-out loss did."""
    first, last = found.held_out_loss[0], found.held_out_loss[-1]
    guessing = f"guessing costs {GUESSING:.2f}"
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
    """Whether the training loss fell since checkup `best`, and not for another reason than the text."""
    until = int(found.checked[best])
    if found.ended == "diverged" or until < 1 or len(found.loss) <= until:
        return False
    fell = found.loss[-_RECENT:].mean() < found.loss[max(0, until - _RECENT) : until].mean() - _CLEAR
    copying = found.copied[-1] > found.copied[best] + 0.1
    return bool(fell and not copying)


def random_samples(found: training.Result) -> str:
    """What the random samples do to the training loss."""
    words = "The training loss includes the random samples"
    cheaper = found.loss[-_RECENT:].mean() < found.held_out_loss[-1]
    if found.copied[-1] > _COPIES and cheaper:
        words += ", which cost less now that their second half can be copied"
    return f"{words}."


def induction(found: training.Result) -> str:
    """Whether and when a head learned to look back."""
    formed = np.flatnonzero(found.induction >= FORMED)
    running = found.ended == "running"
    if len(formed):
        first = formed[0]
        since = (
            ""
            if found.checked[first] == found.checked[-1]
            else (f" there and {found.induction[-1]:.0%} {'by now' if running else 'at the end'}")
        )
        return (
            f"An induction head formed by step {found.checked[first]}: its score is {found.induction[first]:.0%}"
            f"{since}. The best previous-token head scores {found.previous_token[-1]:.0%}, and of random tokens that "
            f"are said again the model gets {found.copied[-1]:.0%} right."
        )
    words = (
        f"No induction head {'has formed so far,' if running else 'formed'} in {found.checked[-1]} steps: the best "
        f"score is {found.induction.max():.0%}, the best previous-token head reaches {found.previous_token.max():.0%}."
    )
    if running:
        return words
    recorded = recorded_run()
    if recorded is not None and (recorded.induction >= FORMED).any():
        read = recorded.checked[(recorded.induction >= FORMED).argmax()] * recorded.tokens_per_step
        words += (
            f" The shipped model's had formed when it had read {read:,} tokens; this run read "
            f"{found.checked[-1] * found.tokens_per_step:,}."
        )
    return words


def progress(found: training.Result) -> str:
    """When half of what was learned was learned."""
    first, lowest = found.held_out_loss[0], found.held_out_loss.min()
    so_far = " so far" if found.ended == "running" else ""
    if first - lowest < _CLEAR:
        return (
            f"The held-out loss has not clearly fallen{so_far}: it was {first:.2f} nats a token before the first step."
        )
    half = np.flatnonzero(found.held_out_loss <= (first + lowest) / 2)[0]
    return f"Half of all progress{so_far} was made by step {found.checked[half]} of {found.checked[-1]}."


def speed(found: training.Result) -> str:
    """How much arithmetic a second the steps did, of which there is at least one; checkups and samples left out."""
    seconds = step_seconds(found)
    return (
        f"The steps did {amount(found.measured.flops / seconds)}FLOP/s on {found.device}: they took {seconds:.3g} of "
        f"{found.seconds:.3g} s, checkups and samples the rest."
    )
