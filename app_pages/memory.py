"""The memory lab."""

from ui import labs, page
from ui.memory import explore, predict, settings

page.lab(
    labs.MEMORY,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
