"""The All types view: what each bit buys, for every data type at once, below the bound for Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from engine.experiments import quantization_rates
from ui import chart, export, run, theme
from ui.charts import quantization_rates as charts
from ui.quantization.sentences import rates_sentence
from ui.quantization.settings import PREFIX, Settings, shared

_RUN = f"{PREFIX}_rates_run"
_HEIGHT = 560
_FLOATING = "Floating point"


def rates(given: Settings) -> None:
    """Every data type at every width, on the weights and with the scales of the page."""
    wanted = quantization_rates.Params(**shared(quantization_rates.Params, given.params))
    found = run.run("quantization_rates", wanted, key=_RUN)
    if found is None:
        return
    params = run.params_of(_RUN)
    key = f"{PREFIX}_rates"
    points = drawn(found)
    current = next((one for one, point in zip(points, found.points, strict=True) if point.current), None)
    fig = charts.rates(
        sorted(points, key=_order(points)), current, (found.bound_bits, found.bound_db), mode=theme.mode()
    )
    chart.figure(fig, key=key, sentence=rates_sentence(found), height=_HEIGHT)
    export.export(
        fig,
        key=key,
        name="quantization-all-types",
        experiment="quantization_rates",
        params=params,
        data=lambda: pd.DataFrame([vars(point) for point in found.points]),
    )


def drawn(found: quantization_rates.Result) -> list[charts.RatePoint]:
    """The points as they are drawn; formats that have one width only are one family, each with its name beside it."""
    widths = {point.family: 0 for point in found.points}
    for point in found.points:
        widths[point.family] += 1
    return [
        charts.RatePoint(
            name=point.data_type if widths[point.family] == 1 else f"{point.family}, {point.bits} bits",
            family=point.family if widths[point.family] > 1 else _FLOATING,
            bits_per_weight=point.bits_per_weight,
            sqnr_db=point.sqnr_db,
            label=point.data_type if widths[point.family] == 1 else "",
        )
        for point in found.points
    ]


def _order(points: list[charts.RatePoint]) -> Callable[[charts.RatePoint], tuple[int, float]]:
    """Families in the order of their first points, each by its bits."""
    families = list(dict.fromkeys(point.family for point in points))
    return lambda point: (families.index(point.family), point.bits_per_weight)
