"""The LoRA lab: what its page shows."""
