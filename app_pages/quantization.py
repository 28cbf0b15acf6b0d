"""The quantization lab."""

from ui import labs, page
from ui.quantization import explore, predict, settings

page.lab(
    labs.QUANTIZATION,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
