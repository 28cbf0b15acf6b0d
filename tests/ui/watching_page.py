"""A page that watches a job, with a button that depends on whether it runs."""

import streamlit as st
from engine.experiments.growing import Params

from ui import run


def draw(found, params):
    st.caption(f"{found.length} for {params.n}{', whole' if found.whole else ''}")


def go():
    st.session_state["gone"] = Params(n=st.session_state.get("n", 7))
    run.ask_again("watched")


st.button("Go", key="go", disabled=run.is_running("watched"), on_click=go)
if "gone" in st.session_state:
    run.watch("growing", st.session_state["gone"], draw, key="watched")
