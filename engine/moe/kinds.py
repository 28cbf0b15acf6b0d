"""The ways in which a router can decide, by name; free of torch, so that pages can list them."""

from __future__ import annotations

from typing import Literal

Kind = Literal["softmax", "sigmoid", "expert choice", "noisy", "random"]

KINDS: dict[str, str] = {
    "softmax": "Each token takes its K most probable experts. Switch, Mixtral: https://arxiv.org/abs/2101.03961",
    "sigmoid": "Each expert is scored by itself, not against the others. DeepSeek-V3: https://arxiv.org/abs/2412.19437",
    "expert choice": "Each expert takes its C most probable tokens. Zhou et al. 2022: https://arxiv.org/abs/2202.09368",
    "noisy": "Noise on the logits while training, then the top K. Shazeer et al. 2017: https://arxiv.org/abs/1701.06538",
    "random": "K experts by lot and equal gates: what a router must beat. THOR: https://arxiv.org/abs/2110.04260",
}
"""One sentence and a source for each kind."""

Step = Literal["adaptive", "fixed"]
"""How far the selection bias moves: further or less far than the last time, or always as far."""

Unit = Literal["tokens", "texts"]
"""What the selection bias balances: every token's choice, or what most tokens of each text chose."""
