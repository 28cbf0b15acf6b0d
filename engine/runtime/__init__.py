"""Where experiments run: devices, jobs, the cluster, and the queue in front of it."""

from engine.runtime.devices import DeviceInfo
from engine.runtime.jobs import Job, LocalJob, Progress
from engine.runtime.service import Runtime
from engine.runtime.tickets import State, Ticket

__all__ = ["DeviceInfo", "Job", "LocalJob", "Progress", "Runtime", "State", "Ticket"]
