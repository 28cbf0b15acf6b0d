"""The way of one token through a router, step by step, with what each step changed.

Needs no torch.

Legend: N tokens, E experts, K chosen for a token, C tokens that an expert takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from engine.experiments._router_sources import list_experts

if TYPE_CHECKING:
    from engine.experiments.router_token import Params

StageName = Literal["logits", "noise", "scores", "bias", "rank", "choice", "gates"]


@dataclass(frozen=True)
class Stage:
    """One step of the way, to be drawn as E bars.

    Args:
        name: which step it is.
        title: for a person, e.g. ``"Probabilities"``.
        formula: how the values come from those before, in plain signs.
        values: (E,); NaN where an expert is out of the race.
        note: what this step changed for this token, a sentence.
    """

    name: StageName
    title: str
    formula: str
    values: np.ndarray
    note: str


@dataclass(frozen=True)
class Way:
    """One token of a routed text.

    Args:
        params: of the router.
        position: of the token.
        clean: (E,), its logits without noise.
        logits: (E,), with it.
        probs: (N, E), of all tokens.
        taken: experts that compute the token.
        gates: of these.
        wanted: (K,), the experts that it chose, best first; None where experts choose.
        room: C, for expert choice.
    """

    params: Params
    position: int
    clean: np.ndarray
    logits: np.ndarray
    probs: np.ndarray
    taken: np.ndarray
    gates: np.ndarray
    wanted: np.ndarray | None
    room: int

    @property
    def refused(self) -> tuple[int, ...]:
        """Experts that the token chose and that had no room."""
        return () if self.wanted is None else tuple(sorted(set(self.wanted.tolist()) - set(self.taken.tolist())))

    @property
    def _scores(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logits)) if self.params.kind == "sigmoid" else self.probs[self.position]

    @property
    def _compared(self) -> np.ndarray:
        """(E,), what the choice goes by."""
        bias = np.zeros(self.params.experts)
        bias[self.params.tilted] = self.params.tilt
        return (self._scores if self.params.kind == "sigmoid" else self.logits) + bias

    def stages(self) -> Iterator[Stage]:
        """The steps that this kind of routing has, in order."""
        kind = self.params.kind
        yield Stage("logits", "Logits", "x · wₑ", self.clean, self._logits_note())
        if kind == "noisy":
            yield self._noise()
        if kind != "random":
            yield self._score()
        if kind in ("softmax", "sigmoid", "noisy"):
            yield self._bias()
        if kind == "expert choice":
            yield self._rank()
        yield self._choice()
        yield self._gate()

    def describe(self, token: str) -> str:
        """Where the token goes, in a sentence."""
        experts = self.params.experts
        if experts == 1 and len(self.taken):
            return f"There is one expert, so {token} goes to it with gate {self.gates[0]:.2f}."
        if not len(self.taken):
            why = (
                "no expert has it among its most probable"
                if self.wanted is None
                else f"{list_experts(self.refused)} had no room left"
            )
            return f"No expert computes {token}: {why}. What the layer adds to it is exactly 0."
        order = np.lexsort((self.taken, -self.gates))
        chosen = ", ".join(f"expert {self.taken[index]} with gate {self.gates[index]:.2f}" for index in order)
        said = f"{token} goes to {chosen}"
        if self.refused:
            said += f"; {list_experts(self.refused)} had no room left"
        said += "."
        if self.params.tilt and self.params.kind in ("expert choice", "random"):
            said += f" The bias changes nothing: {self.params.kind} routing has none."
        return said

    def _logits_note(self) -> str:
        if self.params.kind == "random":
            return "Random routing does not look at them."
        best = tuple(np.flatnonzero(self.clean == self.clean.max()).tolist())
        return f"The token points most in the direction of {list_experts(best)}."

    def _noise(self) -> Stage:
        shift = self.logits - self.clean
        before, after = int(self.clean.argmax()), int(self.logits.argmax())
        note = (
            "The noise is 0: nothing changes."
            if not shift.any()
            else f"The first place stays with expert {after}."
            if before == after
            else f"The first place goes from expert {before} to expert {after}."
        )
        return Stage("noise", "With noise", f"logit + normal noise of σ = {self.params.noise:g}", self.logits, note)

    def _score(self) -> Stage:
        scores = self._scores
        if self.params.kind == "sigmoid":
            note = f"Experts do not compete: the scores sum to {scores.sum():.2f}."
            return Stage("scores", "Scores", "1 / (1 + exp(−logit))", scores, note)
        entropy = -(scores[scores > 0] * np.log(scores[scores > 0])).sum() + 0.0
        note = (
            f"They sum to 1. Their entropy is {entropy:.2f} nats, as spread out as {np.exp(entropy):.1f} equal experts."
        )
        return Stage("scores", "Probabilities", "exp(logit) / Σ exp(logits)", scores, note)

    def _bias(self) -> Stage:
        params = self.params
        base = self._scores if params.kind == "sigmoid" else self.logits
        what = "score" if params.kind == "sigmoid" else "logit"
        before, after = (set(_best(values, params.top_k)) for values in (base, self._compared))
        if not params.tilt:
            note = "No expert has a bias: nothing changes."
        elif before == after:
            note = f"{params.tilt:+g} for expert {params.tilted} does not change the choice.".replace("-", "−")
        else:
            won, lost = (list_experts(tuple(sorted(experts))) for experts in (after - before, before - after))
            note = f"{params.tilt:+g} for expert {params.tilted}: {won} instead of {lost}.".replace("-", "−")
        return Stage("bias", "For the choice", f"{what} + bias", self._compared, note)

    def _rank(self) -> Stage:
        ranks = 1 + (self.probs > self.probs[self.position]).sum(0)  # (E,)
        first = tuple(np.flatnonzero(ranks == ranks.min()).tolist())
        note = (
            f"Each expert takes its first {self.room} of {len(self.probs)} tokens. This one is highest with "
            f"{list_experts(first)}, at place {ranks.min()}."
        )
        return Stage("rank", "Place in each expert's list", "1 + tokens that it prefers", ranks.astype(float), note)

    def _choice(self) -> Stage:
        params, values = self.params, np.full(self.params.experts, np.nan)
        title = "Chosen"
        if params.kind == "expert choice":
            values[self.taken] = self._scores[self.taken]
            count = len(self.taken)
            note = f"{count} of {params.experts} experts {'takes' if count == 1 else 'take'} the token."
            return Stage("choice", title, "place ≤ C", values, note)
        if params.kind == "random":
            values[self.wanted] = 1.0
            return Stage(
                "choice", title, f"{params.top_k} by lot", values, self._room_note("Drawn, whatever the token.")
            )
        compared = self._compared
        values[self.wanted] = compared[self.wanted]
        others = np.delete(np.arange(params.experts), self.wanted)
        if not len(others):
            note = "All experts are chosen."
        else:
            next_best = int(others[compared[others].argmax()])
            least = compared[self.wanted].min()
            margin = round(least, 2) - round(compared[next_best], 2)  # of the numbers on the bars
            lower = f"{margin:.2f}" if round(margin, 2) else "less than 0.01"
            note = (
                f"Expert {next_best} is as high and left out: the choice between equals is arbitrary."
                if least == compared[next_best]
                else f"The highest that is left out is expert {next_best}, lower by {lower}."
            )
        return Stage("choice", title, f"the {params.top_k} highest of those", values, self._room_note(note))

    def _room_note(self, note: str) -> str:
        return f"{note} No room left: {list_experts(self.refused)}." if self.refused else note

    def _gate(self) -> Stage:
        params, values = self.params, np.zeros(self.params.experts)
        values[self.taken] = self.gates
        if params.kind == "random":
            formula = "1 / K"
        elif params.kind == "expert choice" or params.top_k == 1:
            formula = "the score itself" if params.kind == "sigmoid" else "the probability itself"
        else:
            many = {"probability": "probabilities", "score": "scores"}[self._scored]
            formula = f"{self._scored} ÷ Σ {many} of the chosen"
        if not len(self.taken):
            note = "No expert computes the token: all gates are 0."
        else:
            note = f"They sum to {values.sum():.2f}."
            if params.top_k > 1 and params.kind in ("softmax", "noisy", "sigmoid"):
                note += f" {self._division()}"
            if params.top_k == 1 and params.kind in ("softmax", "noisy", "sigmoid"):
                note += " Divided by their sum the only one would always be 1, and the router would learn nothing."
        return Stage("gates", "Gates", formula, values, note)

    @property
    def _scored(self) -> str:
        """What the gates are made of, as its step calls it."""
        return "score" if self.params.kind == "sigmoid" else "probability"

    def _division(self) -> str:
        """How the largest gate comes about, in numbers; those that had no room count in the sum."""
        largest = int(self.taken[np.lexsort((self.taken, -self.gates))[0]])
        scores = self._scores
        return (
            f"Expert {largest} has {self._scored} {scores[largest]:.4f} ÷ {scores[self.wanted].sum():.4f} of all "
            f"chosen = {self.gates.max():.2f}."
        )


def _best(values: np.ndarray, count: int) -> list[int]:
    return np.argsort(-values, kind="stable")[:count].tolist()
