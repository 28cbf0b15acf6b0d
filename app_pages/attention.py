"""The attention lab."""

from ui import labs, page
from ui.attention import explore, predict, settings

page.lab(
    labs.ATTENTION,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
