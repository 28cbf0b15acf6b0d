"""Every combination of the techniques that `ModelConfig` switches on and off."""

import itertools

import pytest

SWITCHES = ("use_lora", "use_quantization", "use_flashattention", "use_moe")
COMBINATIONS = [dict(zip(SWITCHES, states, strict=True)) for states in itertools.product((False, True), repeat=4)]


def named(switches: dict[str, bool]) -> str:
    return "+".join(name.removeprefix("use_") for name, on in switches.items() if on) or "nothing"


every_combination = pytest.mark.parametrize("switches", COMBINATIONS, ids=named)
