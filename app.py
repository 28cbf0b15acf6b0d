"""The Transformer Workbench: ``streamlit run app.py``."""

from pathlib import Path

import streamlit as st

from ui import chart, device, theme
from ui.labs import LABS

STATIC = Path(__file__).parent / "ui" / "static"

# The icon comes before the navigation: without one, the browser would fetch that of the page from a font server.
st.set_page_config(page_icon=STATIC / "mark.svg", layout="wide", initial_sidebar_state=220)
st.logo(STATIC / "logo.svg", size="large", icon_image=STATIC / "mark.svg")

page = st.navigation(
    {
        "": [
            st.Page("app_pages/home.py", title="Home", icon=":material/home:", default=True),
            st.Page("app_pages/targets.py", title="Targets", icon=":material/target:", url_path="targets"),
        ],
        "Labs": [
            st.Page(lab.script, title=lab.title, icon=lab.icon, url_path=lab.url_path, help=lab.question)
            for lab in LABS
        ],
    }
)

st.set_page_config(page_title=f"{page.title} · Transformer Workbench")

with st.sidebar:
    device.badge()

chart.hide_toolbars()
page.run()
theme.follow()
