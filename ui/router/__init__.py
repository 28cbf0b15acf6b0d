"""The pieces of the router lab's page."""
