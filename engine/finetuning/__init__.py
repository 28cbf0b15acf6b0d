"""Teaching a pretrained decoder something new: `facts` to learn, `lessons` made of them, `methods` to learn them by, a
`diary` of how it goes, and `changes`, what it did to the weights.

Needs no torch by itself; of its modules only `facts` does not either.
"""

from typing import Literal

Method = Literal["LoRA", "rank-stabilized LoRA", "DoRA", "PiSSA", "LoRA+", "full fine-tuning"]
"""A way to fine-tune."""
