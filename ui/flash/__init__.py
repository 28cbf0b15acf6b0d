"""The pieces of the FlashAttention lab's page."""
