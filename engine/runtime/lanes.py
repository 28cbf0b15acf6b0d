"""A lane: jobs that wait for the same kind of worker, served in order."""

from __future__ import annotations

from engine.runtime.tickets import Work


class Lane:
    """First come, first served; at most `slots` at a time.

    The queue is kept here, and not by Dask, because only then is the place in it known, and because Dask fails what
    waits at a worker together with the job that killed it.

    Args:
        name: the Dask resource that its workers have.
        slots: how many workers it has.
    """

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = slots
        self._waiting: list[Work] = []
        self._served: list[Work] = []

    def put(self, work: Work) -> None:
        """Queue up."""
        self._waiting.append(work)
        self.number()

    def take(self) -> Work | None:
        """The next to be served; None if nobody waits or no slot is free."""
        if not self._waiting or len(self._served) >= self.slots:
            return None
        work = self._waiting.pop(0)
        self._served.append(work)
        return work

    def drop(self, work: Work) -> bool:
        """Take `work` out of the queue; False if it is no longer waiting there."""
        if work not in self._waiting:
            return False
        self._waiting.remove(work)
        self.number()
        return True

    def release(self, work: Work) -> None:
        """`work` has been served: its slot is free."""
        self._served.remove(work)
        self.number()

    def number(self) -> None:
        """Tell everybody who has not begun their place; who was handed over but has not begun is the first of them."""
        queued = [work for work in self._served if work.state == "queued"] + self._waiting
        for place, work in enumerate(queued, start=1):
            work.place = place
