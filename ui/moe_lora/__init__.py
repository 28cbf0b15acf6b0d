"""The MoE-LoRA lab: what its page shows."""
