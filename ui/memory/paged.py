"""The Paged optimizer view: a model that leaves no room for AdamW's state, with plain and with paged AdamW, live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from engine.experiments import _memory, memory, memory_paged, to_plain
from ui import chart, run, theme
from ui.charts import memory as charts
from ui.charts.memory import Stack, amount
from ui.memory.settings import PREFIX
from ui.prose import plain

_HEIGHT = 340
_RUN = f"{PREFIX}_paged"
_STARTED = f"_{PREFIX}_paged_started"


def paged(params: memory.Params) -> None:
    """What paging is for, the button that runs it, and what was recorded on a GPU."""
    st.markdown(
        "AdamW keeps two numbers beside each weight. Paged, they lie in memory that GPU and computer share and come to "
        "the card page by page while a step uses them: a model fits whose weights and gradients fit. This run "
        f"allows itself the {params.card} GB of the card that is chosen beside this, or half of what the GPU has free "
        "where that is less, and says which; what its process already holds is not counted. It fills 30% of them with "
        "weights, and takes three steps with each optimizer. Without a GPU nothing runs out, whatever the card. The "
        "other settings beside this play no part."
    )
    large = st.toggle("Large batch", key=f"{PREFIX}_large_batch", bind="query-params", help="256 samples, not 8.")
    running = run.is_running(_RUN)
    st.button(
        "Running…" if running else "Run both",
        key=f"_{PREFIX}_paged_button",
        type="primary",
        icon=":material/swap_vert:",
        disabled=running,
        on_click=_start,
        args=(memory_paged.Params(budget=params.card, large_batch=large),),
    )
    started = st.session_state.get(_STARTED)
    found = run.run("memory_paged", started, key=_RUN) if started is not None else None
    if found is not None:
        _show(to_plain(found), f"{PREFIX}_paged_live", f"Measured on {found.device}.")
    if found is None or not found.limit_bytes:
        _recorded()


def _start(params: memory_paged.Params) -> None:
    st.session_state[_STARTED] = params
    run.ask_again(_RUN)


def _recorded() -> None:
    st.divider()
    found = _memory.recorded()
    if found is None or found.paged is None:
        st.caption("No run on a GPU has been recorded with this version.")
        return
    st.markdown("**On a GPU, recorded; the card that is chosen plays no part**")
    _show(found.paged, f"{PREFIX}_paged_recorded", f"{found.provenance[0].upper()}{found.provenance[1:]}.")


def _show(found: Mapping[str, Any], key: str, provenance: str) -> None:
    """What both optimizers need against the limit, and what became of them."""
    if not found["limit_bytes"]:
        st.info(plain(found["sentence"]), icon=":material/info:")
    else:
        weights = found["weight_bytes"]
        held = {"weights": weights, "gradients": weights}
        bars = [
            Stack("AdamW needs", {**held, "optimizer state": 2 * weights}),
            Stack("Paged AdamW needs on the card", held),
        ]
        fig = charts.stacks(bars, card=found["limit_bytes"], line="PyTorch may hold", mode=theme.mode())
        held_before = "The line counts what the process held before as well."
        chart.figure(fig, key=key, sentence=f"{found['sentence']} {held_before}", height=_HEIGHT)
    st.table(_attempts(found), border="horizontal")
    st.caption(plain(provenance))


def _attempts(found: Mapping[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            attempt["optimizer"]: {
                "steps": f"{len(attempt['losses'])}",
                "ended": "completed" if attempt["completed"] else "ran out of memory",
                "peak": amount(attempt["peak_bytes"]) if attempt["peak_bytes"] else "—",
                "paged state": amount(attempt["paged_bytes"]) if attempt["paged_bytes"] else "—",
            }
            for attempt in found["attempts"]
        }
    ).T
