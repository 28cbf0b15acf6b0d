"""The Roofline view: what this device can do at every arithmetic intensity, and where each backend stands below it."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from engine.experiments import flash_roofline
from engine.experiments._flash_recorded import recorded_roofline
from ui import chart, export, run, theme
from ui.charts import flash_roofline as charts
from ui.charts.flash_roofline import Spot, Track
from ui.evidence import provenance
from ui.flash.missing import missing
from ui.flash.recorded import heading, sweep_in_words
from ui.flash.settings import PREFIX, Settings
from ui.measure_button import measure_button
from ui.prose import plain

RUN = f"{PREFIX}_roofline_run"
_HEIGHT, _INTENSITY_HEIGHT = 560, 210


def roofline(given: Settings) -> None:
    """What arithmetic says at once, the button, and the picture as its points come."""
    started = measure_button("flash_roofline", given.params, key=RUN)
    if started is not None:
        run.watch("flash_roofline", started, _draw, key=RUN, height=_HEIGHT)
    _intensity(given.params)
    if started is None:
        st.info(
            "Every device has two speeds: how fast it computes, and how fast bytes come from its main memory. Which of "
            "them is the limit depends on the **arithmetic intensity**, the FLOP (multiplications and additions) done "
            "for each byte moved. Standard attention moves its T × T matrix, FlashAttention does not: where will each "
            "stand below the roof of this device? **Measure** takes both speeds first (the best of all times counts), "
            "then the same sweep as “Speed and memory”.",
            icon=":material/lightbulb:",
        )
    recorded = recorded_roofline(given.params)
    if recorded is not None:
        found = recorded.found
        heading(recorded, sweep_in_words(recorded.params), dashed=False)
        fig = charts.roofline(spots(found), found.peaks.flops, found.peaks.bandwidth, mode=theme.mode())
        chart.figure(fig, key=f"{PREFIX}_roofline_recorded", sentence=found.sentence, height=_HEIGHT)


def tracks(params: flash_roofline.Params) -> list[Track]:
    """Both algorithms on the axis of intensity, by arithmetic alone."""
    looks = {"standard": "standard", "flash": "torch-flash"}
    return [
        Track(looks[path.name], f"{path.label}, computed", path.lengths.tolist(), path.intensity.tolist())
        for path in flash_roofline.predict_paths(params)
    ]


def _intensity(params: flash_roofline.Params) -> None:
    """It follows the controls: nothing of it is measured."""
    st.markdown("**Intensity by arithmetic alone**, with the settings beside it")
    chart.figure(
        charts.intensity(tracks(params), mode=theme.mode()),
        key=f"{PREFIX}_intensity",
        sentence=flash_roofline.describe_paths(flash_roofline.predict_paths(params)),
        height=_INTENSITY_HEIGHT,
    )


def spots(found: flash_roofline.Result) -> list[Spot]:
    """The points as they are drawn: those of a backend together."""
    names = list(dict.fromkeys(point.backend for point in found.points))
    ordered = sorted(found.points, key=lambda point: (names.index(point.backend), point.length))
    return [
        Spot(point.backend, point.label, point.length, point.intensity, point.flops_per_second, _hover(point))
        for point in ordered
    ]


def _hover(point: flash_roofline.Point) -> str:
    return (
        f"<b>{point.label}</b>, T = {point.length:,}, batch {point.batch}<br>"
        f"{flash_roofline.intensity_in_words(point.intensity)} FLOP a byte, "
        f"{point.flops_per_second / 1e9:,.3g} GFLOP/s ({point.low / 1e9:,.3g} to {point.high / 1e9:,.3g})<br>"
        f"{point.flops_per_second / point.roof:.0%} of what the roof allows here"
    )


def table(found: flash_roofline.Result) -> pd.DataFrame:
    """The points as rows."""
    return pd.DataFrame([vars(point) for point in found.points])


def _draw(found: flash_roofline.Result, params: flash_roofline.Params) -> None:
    fig = charts.roofline(spots(found), found.peaks.flops, found.peaks.bandwidth, mode=theme.mode())
    key = f"{PREFIX}_roofline"
    chart.figure(fig, key=key, sentence=found.sentence, height=_HEIGHT)
    if found.ended not in ("running", "finished"):
        st.info(plain(found.ending), icon=":material/info:")
    export.export(
        fig, key=key, name="flash-roofline", experiment="flash_roofline", params=params, data=lambda: table(found)
    )
    st.caption(
        plain(
            f"{found.memory} Speed is measured. The two lines of the roof meet at {found.peaks.ridge:.3g} FLOP a byte."
        )
    )
    missing(found.absent, found.stops)
    if found.ended != "running":
        provenance(found)
