"""The pieces of the whole model's page."""
