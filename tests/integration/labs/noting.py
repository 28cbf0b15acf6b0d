"""Reads a file whose state is part of what it computes."""

from pathlib import Path

from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    path: str = ""

    def cache_token(self):
        return str(Path(self.path).stat().st_mtime_ns)


def run(params, job):
    return Path(params.path).read_text()
