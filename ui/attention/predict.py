"""The Predict tab of the attention lab: say what you expect, then see."""

from __future__ import annotations

import random

import numpy as np
import streamlit as st

from engine.experiments import attention_effect, attention_head
from ui import chart, run, theme
from ui.attention.settings import PREFIX, Settings, waiting
from ui.charts import attention as charts
from ui.prose import plain


def predict(given: Settings) -> None:
    """The Predict tab: say what you expect, then see."""
    if waiting(given):
        return
    _guess_next(given)
    st.divider()
    _guess_target(given)


def _guess_next(given: Settings) -> None:
    st.markdown("**What comes next?** Read your text as the model does and say its next word.")
    guess = st.text_input("Your guess", key=f"{PREFIX}_guess", placeholder="one word", max_chars=40).strip()
    if not guess:
        return
    untouched = given.params.model_copy(update={"temperature": 1.0, "mask": "own", "drop": -1})
    found = run.run("attention_effect", attention_effect.Params(**untouched.model_dump()), key=f"{PREFIX}_guess_run")
    if found is None or not found.candidates:
        st.caption(plain(found.sentence if found else ""))
        return
    words = [candidate.token.strip("␣").lower() for candidate in found.candidates]
    top = found.candidates[0]
    place = next((i for i, word in enumerate(words) if _is_said_by(guess.lower(), word)), None)
    if place == 0:
        st.success(plain(f"Yes: “{top.token}” is first, with {top.after:.1%}."), icon=":material/check_circle:")
    elif place is not None:
        st.info(
            plain(
                f"Number {place + 1}, with {found.candidates[place].after:.1%}. "
                f"First is “{top.token}” ({top.after:.1%})."
            ),
            icon=":material/lightbulb:",
        )
    else:
        st.info(
            plain(f"“{guess}” is not among the ten most probable; first is “{top.token}” ({top.after:.1%})."),
            icon=":material/lightbulb:",
        )


def _is_said_by(guess: str, word: str) -> bool:
    """Whether a token begins the guess: the whole word, or a piece of at least three letters of a longer one."""
    return guess == word or (len(word) >= 3 and guess.startswith(word))


def _guess_target(given: Settings) -> None:
    seen = given.overview
    if len(seen.tokens) < 3:
        st.caption("For the second game the text needs at least three tokens.")
        return
    layers, heads, length = seen.attention.shape[:3]
    turn = st.session_state.get(f"{PREFIX}_turn", 0)
    dice = random.Random(turn)
    again = [query for query in range(2, length) if seen.tokens[query] in seen.tokens[:query]]
    wanted = {"previous token": list(range(2, length)), "induction": again}
    places = [
        (layer, head, wanted[seen.roles[layer][head]])
        for layer in range(layers)
        for head in range(heads)
        if wanted.get(seen.roles[layer][head])
    ]
    layer, head, queries = dice.choice(places or [(dice.randrange(layers), dice.randrange(heads), range(2, length))])
    query = dice.choice(queries)
    role = seen.roles[layer][head]
    kind = f"a{'n' * (role == 'induction')} **{role}** head" if role else "a head without a role"
    st.markdown(f"**Where does it look?** Layer {layer}, head {head} is {kind}. Which token does it give the most?")
    marked = (f":primary-badge[{plain(token)}]" if i == query else plain(token) for i, token in enumerate(seen.tokens))
    st.markdown(" ".join(marked))
    st.caption(plain(f"The query is “{seen.tokens[query]}”, token {query}."))
    answer = st.selectbox(
        "It looks most at",
        range(length if seen.kind == "encoder" else query + 1),
        index=None,
        format_func=lambda i: f"{i} · {seen.tokens[i]}",
        key=f"{PREFIX}_answer{turn}",
        placeholder="Choose a token",
    )
    if answer is None:
        return
    row = seen.attention[layer, head, query].astype(np.float32)
    best = int(row.argmax())
    verdict = f"most goes to “{seen.tokens[best]}” (token {best}, {row[best]:.0%}); your choice gets {row[answer]:.0%}."
    if answer == best:
        st.success(plain(f"Right: {verdict}"), icon=":material/check_circle:")
    else:
        st.info(plain(f"Not quite: {verdict}"), icon=":material/lightbulb:")
    fig = charts.out_of(row, seen.tokens, query, mode=theme.mode())
    chart.figure(
        fig,
        key=f"{PREFIX}_answer_chart",
        sentence=attention_head.describe(
            seen.attention[layer, head].astype(np.float32), seen.tokens, f"Layer {layer}, head {head}"
        ),
        height=300,
    )
    st.button("Another head", icon=":material/casino:", on_click=_next_turn, args=(turn,))


def _next_turn(turn: int) -> None:
    st.session_state[f"{PREFIX}_turn"] = turn + 1
