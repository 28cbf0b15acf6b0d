"""The training lab."""

from ui import labs, page
from ui.training import explore, predict, settings

page.lab(
    labs.TRAINING,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
