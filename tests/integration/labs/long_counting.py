"""Counts in the long lane."""

from engine.experiments import counting


class Params(counting.Params):
    lane = "long"


run = counting.run
