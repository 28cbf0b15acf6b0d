"""The pieces of the memory lab's page."""
