"""Home: what the workbench is, one live thing, and the way through the labs."""

import streamlit as st

from engine.catalogue import MODELS
from engine.experiments import attention_effect
from ui import controls, run
from ui.controls import Look
from ui.labs import LABS, Lab
from ui.prose import plain

SHOWN = 5


def card(lab: Lab) -> None:
    """A lab with its question and its places to begin."""
    with st.container(border=True, height="stretch"):
        st.markdown(f"### {lab.icon} {lab.title}")
        st.markdown(lab.question)
        for start in lab.starts:
            settings = {f"{lab.url_path}_{name}": value for name, value in start.settings.items()}
            st.page_link(lab.script, label=start.label, icon=":material/arrow_forward:", query_params=settings)
        st.space("stretch")
        st.page_link(lab.script, label="Open the lab", icon=":material/open_in_full:")


@st.fragment
def next_token() -> None:
    """What the default model expects after the learner's words, measured now."""
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown(
            "Turn one knob and see at once what it does to a real language model, on this machine. "
            "Nothing is canned: every figure is measured now, or says where and when it was recorded."
        )
        values = controls.controls(
            attention_effect.Params, prefix="home", fields=["text"], text=Look(label="Begin a sentence", widget="line")
        )
        params = controls.validated(attention_effect.Params, values)
    with right, st.container(border=True, gap="xsmall"):
        st.markdown(f"How **{plain(params.model)}** would go on" if params else "Nothing to go on from.")
        st.caption(plain(MODELS[0].facts))
        found = run.run("attention_effect", params, key="home") if params else run.latest("home")
        for candidate in found.candidates[:SHOWN] if found else []:
            word = candidate.token.replace("␣", " ").strip() or candidate.token
            st.progress(candidate.before, text=f"**{plain(word)}** {candidate.before:.1%}")


st.title("See what happens inside a transformer", anchor=False)
live = st.container()
st.header("The labs", anchor=False)
with st.grid("auto", min_column_width=300):
    for lab in LABS:
        card(lab)
with live:
    next_token()
