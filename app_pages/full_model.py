"""The whole model's lab."""

from ui import labs, page
from ui.full_model import explore, predict, settings

page.lab(
    labs.FULL_MODEL,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
