"""The quantization lab: what its page shows."""
