"""Results are plain through and through: weighed to the byte, read-only once shared, and free of anybody's library."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from engine.runtime.results import SCALAR_BYTES, freeze, weigh


class Facts(BaseModel):
    steps: int = 3
    names: tuple[str, ...] = ("a", "bc")


@dataclass(frozen=True)
class Parts:
    array: np.ndarray
    by_name: dict
    facts: Facts


def parts():
    return Parts(np.zeros((4, 5), np.float32), {"inner": [np.ones(3), 1.5, None]}, Facts())


def test_arrays_weigh_their_bytes_wherever_they_lie():
    arrays = 4 * 5 * 4 + 3 * 8
    others = SCALAR_BYTES * 6 + len("inner") + len("a") + len("bc")  # inner, 1.5, None, 3, a, bc
    assert weigh(parts()) == arrays + others


def test_a_frozen_result_cannot_be_written_to():
    frozen = freeze(parts())
    for array in (frozen.array, frozen.by_name["inner"][0]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("alien", [torch.zeros(2), np.array([object()]), object()])
def test_what_is_not_plain_is_named_with_its_place(alien):
    with pytest.raises(TypeError, match=r"result\.by_name\['inner'\]"):
        weigh(Parts(np.zeros(1), {"inner": alien}, Facts()))
