"""The floor of `slider_latency`: the least that a Streamlit page with one slider and one 32 × 32 heat map can do."""

import numpy as np
import plotly.graph_objects as go
import streamlit as st

seed = st.slider("Seed", 0, 100, 50, key="seed")
st.plotly_chart(go.Figure(go.Heatmap(z=np.random.default_rng(seed).random((32, 32)))), key="map")
