"""The attention lab: what its page shows."""
