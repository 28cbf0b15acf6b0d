"""The MoE-LoRA lab."""

from ui import labs, page
from ui.moe_lora import explore, predict, settings

page.lab(
    labs.MOE_LORA,
    controls=settings.settings,
    explore=explore.explore,
    predict=predict.predict,
    code=explore.code,
    tests=explore.tests,
)
