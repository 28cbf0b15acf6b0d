"""The FlashAttention lab."""

from ui import labs, page
from ui.flash import explore, predict, settings

page.lab(
    labs.FLASH,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
