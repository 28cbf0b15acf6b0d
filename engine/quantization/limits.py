"""The limits of quantization that a page names before anything is computed; needs no torch."""

MIN_BITS, MAX_BITS = 2, 8
"""Of a code."""

FEWEST_TOKENS = 64
"""To measure perplexity on: of fewer, the mean loss would say more about the text than about the model."""
