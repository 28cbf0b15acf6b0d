"""A page that is nothing but the picker; what it says is in the session, as is what kinds the test wants."""

import streamlit as st

from engine.experiments.attention_effect import Params
from ui import models

st.session_state["picked"] = models.pick(
    Params, prefix="probe", kinds=st.session_state.get("kinds", ("decoder", "encoder"))
)
