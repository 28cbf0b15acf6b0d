"""The training lab: what its page shows."""
