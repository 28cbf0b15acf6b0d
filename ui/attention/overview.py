"""All heads at a glance, as they lie in the model or sorted by what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import streamlit as st

from engine.experiments import attention
from engine.experiments._attention import REPEATING_TEXT
from ui import chart, clicks, export, theme
from ui.attention.one_head import ONE
from ui.attention.settings import PREFIX, Settings
from ui.charts import attention as charts

_GALLERY = (3, 6)
_WIDTH, _HEIGHT = 720, 432  # pixels of all maps, with which the sentence below them stays on a desktop's screen
_SMALLEST, _LARGEST = 38, 98  # pixels along one: many layers go beyond the height rather than below what can be read
_SHARE = "{:.0%}".format


@dataclass(frozen=True)
class Order:
    """A way to put heads in order: a statistic of the result, and how to read it.

    Args:
        label: what the learner asks for.
        values: takes the (L, H) statistic from a result.
        show: turns a value into words.
        sign: 1 for the largest first, −1 for the smallest.
        meaning: what the number is, a sentence.
    """

    label: str
    values: Callable[[attention.Result], np.ndarray]
    show: Callable[[float], str]
    sign: int
    meaning: str

    @property
    def share(self) -> bool:
        """Whether the number is a share of the mass."""
        return self.show is _SHARE


EVERY = "Every head"
INDUCTION = "Induction heads"
ORDERS = {
    order.label: order
    for order in (
        Order(
            INDUCTION,
            lambda r: r.on_probe["induction"],
            _SHARE,
            1,
            "mass on the token that followed the same token before, on random tokens said twice",
        ),
        Order(
            "Previous-token heads",
            lambda r: r.on_probe["previous token"],
            _SHARE,
            1,
            "mass on the previous token, on random tokens said twice",
        ),
        Order("Sinks", lambda r: r.on_text["first token"], _SHARE, 1, "mass on the first token of your text"),
        Order(
            "Most focused",
            lambda r: np.exp(r.on_text["entropy"]),
            "{:.1f} tokens".format,
            -1,
            "effective number of tokens looked at, e to the entropy, on your text",
        ),
        Order(
            "Most spread",
            lambda r: np.exp(r.on_text["entropy"]),
            "{:.1f} tokens".format,
            1,
            "effective number of tokens looked at, e to the entropy, on your text",
        ),
        Order(
            "Farthest reach", lambda r: r.on_text["mean distance"], "{:.1f} back".format, 1, "mean distance in tokens"
        ),
    )
}


def all_heads(given: Settings) -> None:
    """Draw the maps of all heads; choosing one opens it."""
    seen, params = given.overview, given.params
    label = st.pills(
        "Which heads",
        [EVERY, *ORDERS],
        default=EVERY,
        required=True,
        key=f"{PREFIX}_order",
        wrap=True,
        bind="query-params",
        label_visibility="collapsed",
    )
    layers, heads = seen.attention.shape[:2]
    titles, sentence = None, seen.sentence
    if label == EVERY:
        grid = [[(layer, head) for head in range(heads)] for layer in range(layers)]
    else:
        order = ORDERS[label]
        values = order.values(seen)
        rows, columns = _GALLERY
        ranked = np.argsort(-order.sign * values, axis=None, kind="stable")[: rows * columns]
        cells = [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(ranked, values.shape), strict=True)]
        grid = [cells[start : start + columns] for start in range(0, len(cells), columns)]
        titles = {cell: f"L{cell[0]} H{cell[1]}<br>{order.show(values[cell])}" for cell in cells}
        layer, head = cells[0]
        sentence = f"First is layer {layer}, head {head}, with {order.show(values[cells[0]])} ({order.meaning})."
        if order.share:
            sentence += f" {(values > 0.5).sum()} of {values.size} heads give it more than half of their mass."
    sentence += " Choose a map to open it."
    if label == INDUCTION and params.weights == "trained" and seen.kind == "decoder":
        _say_what_repeats(seen.tokens)
    key = f"{PREFIX}_all"
    across, down = _WIDTH // len(grid[0]), _HEIGHT // len(grid) - (charts.TITLE_HEIGHT if titles else 0)
    fig = charts.thumbnails(
        seen.attention,
        grid,
        lambda cell: _hover(seen, cell),
        chosen=(params.layer, params.head),
        side=min(_LARGEST, across, max(_SMALLEST, down)),
        titles=titles,
        mode=theme.mode(),
    )
    chart.figure(fig, key=key, sentence=sentence, width=fig.layout.width)
    if params.changes_attention or params.drop >= 0:
        st.caption(
            "These maps are of the untouched model on your whole text. “What changed” shows what your settings do."
        )
    clicks.on_cell_click(key, lambda x, y: _open_head(grid, x, y))
    export.export(
        fig,
        key=key,
        name="attention-heads",
        data=lambda: _statistics(seen),
        experiment="attention",
        params=attention.Params(**params.model_dump(include=set(attention.Params.model_fields))),
    )


def _say_what_repeats(tokens: list[str]) -> None:
    """Induction heads look up what followed the same token before: say how often your text lets them."""
    again = len(tokens) - len(set(tokens))
    st.caption(
        f"{again} of the {len(tokens)} tokens of your text occurred before: only there can a head find what followed."
    )
    if again < len(tokens) // 4:
        st.button("Use a text that repeats itself", icon=":material/repeat:", on_click=_use_repeating_text)


def _use_repeating_text() -> None:
    st.session_state[f"{PREFIX}_text"] = REPEATING_TEXT


def _hover(seen: attention.Result, cell: charts.Cell) -> str:
    layer, head = cell
    role = seen.roles[layer][head]
    probe, text = seen.on_probe, seen.on_text
    return (
        f"<b>Layer {layer}, head {head}</b>{' · ' + role if role else ''}<br>"
        f"on your text: previous {text['previous token'][cell]:.0%}, first {text['first token'][cell]:.0%}, "
        f"{np.exp(text['entropy'][cell]):.1f} tokens<br>"
        f"on repeated random tokens: induction {probe['induction'][cell]:.0%}, "
        f"previous {probe['previous token'][cell]:.0%}"
    )


def _open_head(grid: list[list[charts.Cell]], x: int, y: int) -> None:
    if y < len(grid) and x < len(grid[y]):
        layer, head = grid[y][x]
        st.session_state[f"{PREFIX}_layer"], st.session_state[f"{PREFIX}_head"] = layer, head
        st.session_state[f"{PREFIX}_view"] = ONE


def _statistics(seen: attention.Result) -> pd.DataFrame:
    layers, heads = seen.attention.shape[:2]
    layer, head = np.divmod(np.arange(layers * heads), heads)
    columns = {"layer": layer, "head": head, "role": [role for row in seen.roles for role in row]}
    columns |= {f"{name}, your text": values.ravel() for name, values in seen.on_text.items()}
    columns |= {f"{name}, repeated random tokens": values.ravel() for name, values in seen.on_probe.items()}
    return pd.DataFrame(columns)
