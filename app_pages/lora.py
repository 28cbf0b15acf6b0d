"""The LoRA lab."""

from ui import labs, page
from ui.lora import explore, predict, settings

page.lab(
    labs.LORA,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
