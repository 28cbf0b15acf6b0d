"""Takes a figure home: as PNG, SVG or HTML, its data as CSV, and a short script that repeats the run.

The images are made in the browser by the figure that is on the page: a server needs no Chrome for it, and what is
saved is what was seen, zoom included.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from engine.experiments import ExperimentParams
from ui import theme

_HTML = """
<div class="row">
  <button type="button" id="png">PNG</button>
  <button type="button" id="svg">SVG</button>
</div>
<p id="problem" role="status"></p>
"""

_CSS = """
.row { display: flex; gap: 0.5rem; }
button {
  flex: 1; padding: 0.4rem 0.75rem; cursor: pointer; font: inherit; font-family: var(--st-font);
  color: var(--st-text-color); background: transparent;
  border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius);
}
button:hover, button:focus-visible { border-color: var(--st-primary-color); color: var(--st-primary-color); }
#problem { margin: 0; font-size: 0.875rem; font-family: var(--st-font); color: var(--st-text-color); }
"""

# Plotly's own camera button does the work: the format is set for the click and put back after it.
_JS = """
export default function ({ data, parentElement }) {
  const problem = parentElement.querySelector("#problem")
  const save = (format) => {
    const plot = document.querySelector(`.st-key-${CSS.escape(data.key)} .js-plotly-plot`)
    const camera = plot?.querySelector('.modebar-btn[data-title*="Download" i], .modebar-btn[data-attr="toImage"]')
    if (!camera) {
      problem.textContent = "The figure is not on the page; wait until it is drawn and try again."
      return
    }
    problem.textContent = ""
    const before = plot._context.toImageButtonOptions
    plot._context.toImageButtonOptions = { format, filename: data.name, scale: format === "png" ? 2 : 1 }
    camera.click()
    plot._context.toImageButtonOptions = before
  }
  for (const format of ["png", "svg"]) {
    parentElement.querySelector(`#${format}`).onclick = () => save(format)
  }
}
"""

_image_buttons = st.components.v2.component("workbench_image_export", html=_HTML, css=_CSS, js=_JS)


def export(
    fig: go.Figure,
    *,
    key: str,
    name: str,
    data: Callable[[], pd.DataFrame],
    experiment: str,
    params: ExperimentParams,
) -> None:
    """Draw the Export menu of a figure.

    Args:
        fig: the figure, after `ui.chart.figure` has drawn it.
        key: the one that it was drawn with.
        name: of the files, without an ending.
        data: gives the numbers behind the figure; called when the CSV is asked for.
        experiment, params: the run that the figure shows.
    """
    menu = st.popover("Export", icon=":material/download:", key=f"{key}_export", on_change="rerun")
    if not menu.open:
        return
    template = theme.template()
    with menu:
        _image_buttons(key=f"{key}_images", data={"key": key, "name": name})
        st.download_button(
            "HTML, interactive",
            lambda: page(fig, template),
            f"{name}.html",
            "text/html",
            key=f"{key}_html",
            on_click="ignore",
            width="stretch",
        )
        st.download_button(
            "Data as CSV",
            lambda: data().to_csv(index=False),
            f"{name}.csv",
            "text/csv",
            key=f"{key}_csv",
            on_click="ignore",
            width="stretch",
        )
        st.caption("The same run in Python:")
        st.code(script(experiment, params), language="python")


def page(fig: go.Figure, template: str) -> str:
    """`fig` in a Plotly template as a web page that needs no network."""
    themed = go.Figure(fig).update_layout(template=template)
    return themed.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})


def script(experiment: str, params: ExperimentParams) -> str:
    """A few lines of Python that repeat a run: only what differs from the defaults is written out."""
    given = params.model_dump(exclude_defaults=True)
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if len(arguments) > 80:
        arguments = "\n" + "".join(f"    {name}={value!r},\n" for name, value in given.items())
    return (
        f"from engine.experiments.{experiment} import Params, run\n"
        "from engine.runtime.jobs import LocalJob\n\n"
        f"params = Params({arguments})\n"
        "result = run(params, LocalJob())\n"
    )
