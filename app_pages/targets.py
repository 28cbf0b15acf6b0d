"""The targets page."""

from ui.targets import view

view.page()
