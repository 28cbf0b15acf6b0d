"""The router lab: which expert computes which token."""

from ui import labs, page
from ui.router import explore, predict, settings

page.lab(
    labs.ROUTER,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
