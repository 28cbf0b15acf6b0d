"""Which cell of a heat map was clicked: Streamlit reports selected points, and a heat map has none.

An invisible component listens to Plotly's own click event of the figure on the page. It attaches itself when the
pointer comes near, because the figure may have been drawn anew since.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

_JS = """
const heard = new WeakSet()
const latest = new Map()

export default function ({ data, setTriggerValue }) {
  latest.set(data.key, (cell) => setTriggerValue("cell", cell))
  const selector = `.st-key-${CSS.escape(data.key)} .js-plotly-plot`
  const attach = (event) => {
    const plot = event.target.closest?.(selector)
    if (!plot || heard.has(plot)) return
    heard.add(plot)
    plot.on("plotly_click", ({ points }) => {
      const { x, y, curveNumber } = points[0]
      if (curveNumber < data.traces && Number.isInteger(x) && Number.isInteger(y)) latest.get(data.key)?.({ x, y })
    })
  }
  document.addEventListener("pointerover", attach, { passive: true })
  return () => document.removeEventListener("pointerover", attach)
}
"""

_listener = st.components.v2.component("workbench_heatmap_clicks", html="<span hidden></span>", js=_JS)


def on_cell_click(key: str, then: Callable[[int, int], None], *, traces: int = 1) -> None:
    """Call `then(x, y)`, before the page is drawn again, when a cell of a heat map is clicked.

    Args:
        key: the one that the figure was drawn with by `ui.chart.figure`.
        then: gets the column and the row of the cell, counted from 0; it may set widgets through `st.session_state`.
        traces: how many of the figure's first traces are maps whose cells count.
    """
    name = f"{key}_clicks"

    def clicked() -> None:
        cell = st.session_state[name].cell
        if cell:
            then(int(cell["x"]), int(cell["y"]))

    _listener(key=name, data={"key": key, "traces": traces}, on_cell_change=clicked, height=1)
