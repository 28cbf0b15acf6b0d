"""Ends badly, in several ways."""

import os
import sys
import threading
from typing import Literal

from engine.errors import InputError
from engine.experiments import ExperimentParams


class Params(ExperimentParams):
    way: Literal["raise", "input", "memory", "exit", "sys.exit", "lock"] = "raise"


def run(params, job):
    match params.way:
        case "raise":
            raise ZeroDivisionError("seven by nothing")
        case "input":
            raise InputError("The text is empty: type a few words.")
        case "memory":
            raise MemoryError
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit("had enough")
        case "lock":
            return threading.Lock()
