"""The registry of experiments: finding them, parsing their parameters, saying what is wrong, making results plain."""

import base64
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import experiments
from engine.errors import InputError

ROOT = Path(__file__).parents[2]

LAB = '''"""Adds two numbers."""
from pydantic import Field, model_validator
from engine.experiments import ExperimentParams

class Params(ExperimentParams):
    left: int = Field(default=1, ge=-5, le=5)
    right: int = Field(default=2, ge=-5, le=5)
    exact: bool = True
    layers: list[int] = []

    @model_validator(mode="after")
    def _check(self):
        if self.left > self.right:
            raise ValueError(f"left is {self.left}, which is more than right ({self.right}): swap them.")
        return self

def run(params, job):
    return params.left + params.right
'''


SHIPPED = experiments.names()


@pytest.fixture(scope="module", autouse=True)
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labs")
    (folder / "adding.py").write_text(LAB)
    (folder / "silent.py").write_text("from engine.experiments import ExperimentParams as Params\nrun = print\n")
    (folder / "_private.py").write_text("")
    experiments.__path__.append(str(folder))
    yield folder
    experiments.__path__.remove(str(folder))
    for name in ("adding", "silent"):
        sys.modules.pop(f"engine.experiments.{name}", None)


def test_names_are_sorted_and_leave_private_modules_out():
    names = experiments.names()
    assert names == sorted(names)
    assert {"adding", "silent"} <= set(names)
    assert "_private" not in names


def test_every_shipped_experiment_is_complete():
    for name in SHIPPED:
        experiment = experiments.get(name)
        assert experiment.summary.endswith("."), name
        assert "\n" not in experiment.summary
        params = experiment.Params()
        assert params == experiments.parse(name, {})
        assert params == experiment.Params(**params.model_dump())  # how workers get them
        assert params.memory_bytes() >= 0
        assert params.time_limit > 0
        assert params.stop_grace > 0
        assert callable(experiment.run)


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.0, "2 s"), (0.5, "0.5 s"), (90, "90 s"), (900, "15 min"), (3600.0, "1 h"), (7200, "2 h")]
)
def test_durations_are_said_in_their_largest_whole_unit(seconds, said):
    assert experiments.duration(seconds) == said


def test_a_lab_without_a_docstring_has_an_empty_summary():
    assert experiments.get("silent").summary == ""


def test_folders_of_ones_own_are_searched(lab):
    code = "from engine import experiments; print(experiments.get('adding').summary)"
    environment = {**os.environ, "WORKBENCH_EXPERIMENTS": os.pathsep.join(["/nowhere", str(lab)])}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "Adds two numbers.\n"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(InputError, match=r"There is no experiment 'adds'; there are: .*adding.*\."):
        experiments.get("adds")


@given(ends=st.tuples(st.integers(-5, 5), st.integers(-5, 5)), exact=st.booleans(), layers=st.lists(st.integers()))
def test_text_and_values_parse_to_the_same(ends, exact, layers):
    model = experiments.get("adding").Params
    values = {"left": min(ends), "right": max(ends), "exact": exact, "layers": layers}
    text = {**{key: str(value) for key, value in values.items()}, "layers": ",".join(map(str, layers))}
    assert experiments.parse("adding", text) == experiments.parse("adding", values) == model(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"left": 9}, "left is 9: input should be less than or equal to 5."),
        ({"left": "x"}, "left is 'x': input should be a valid integer, unable to parse string as an integer."),
        ({"middle": 1}, "middle is 1: extra inputs are not permitted."),
        ({"left": 3, "right": 2}, "left is 3, which is more than right (2): swap them."),
        ({"exact": "perhaps"}, "exact is 'perhaps': input should be a valid boolean, unable to interpret input."),
        (
            {"layers": "1,2.5"},
            "layers.1 is '2.5': input should be a valid integer, unable to parse string as an integer.",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(values, message):
    with pytest.raises(InputError) as caught:
        experiments.parse("adding", values)
    assert str(caught.value) == message


def test_several_wrong_fields_are_all_named():
    with pytest.raises(InputError, match=r"left is 9: .*\. right is -9: .*\."):
        experiments.parse("adding", {"left": 9, "right": -9})


@pytest.mark.parametrize("values", [{"left": "x" * 24_000}, {"y" * 24_000: 1}, {"layers": ["z" * 24_000]}])
def test_a_long_input_is_not_repeated_in_full(values):
    with pytest.raises(InputError) as caught:
        experiments.parse("adding", values)
    message = str(caught.value)
    assert len(message) < 200
    assert any(letter * 30 in message for letter in "xyz")
    assert "…" in message


def test_parameters_cannot_be_changed():
    params = experiments.parse("adding", {})
    with pytest.raises(ValueError, match="frozen"):
        params.left = 3


@dataclasses.dataclass(frozen=True)
class Inner:
    values: np.ndarray
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    table: dict[int, np.float32]
    params: experiments.ExperimentParams


class Measured(experiments.ExperimentParams):
    loss: float


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_json_does_not_have_becomes_null(odd, dtype):
    result = Outer(
        Inner(np.array([[1, odd], [2, 3]], dtype), ()), {1: dtype(odd), 2: odd, 3: [odd, True]}, Measured(loss=odd)
    )
    plain = json.loads(json.dumps(experiments.to_plain(result), allow_nan=False))
    assert plain["inner"]["values"] == [[1, None], [2, 3]]
    assert plain["table"] == {"1": None, "2": None, "3": [None, True]}
    assert plain["params"] == {"loss": None}


@pytest.mark.parametrize("values", [np.array([True, False]), np.array(["a", "nan"]), np.arange(3), np.array([])])
def test_arrays_of_anything_else_stay_as_they_are(values):
    assert json.loads(json.dumps(experiments.to_plain(values), allow_nan=False)) == values.tolist()


@pytest.mark.parametrize("content", [b"", bytes(range(256))])
def test_bytes_come_back_from_base64(content):
    plain = json.loads(json.dumps(experiments.to_plain({"archive": content})))
    assert base64.b64decode(plain["archive"], validate=True) == content


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plain_results_are_json_and_keep_every_number(seed):
    values = np.random.default_rng(seed).normal(size=(3, 4))
    result = Outer(Inner(values, ("a", "b")), {1: np.float32(0.5)}, experiments.ExperimentParams())
    plain = json.loads(json.dumps(experiments.to_plain(result)))
    np.testing.assert_array_equal(np.array(plain["inner"]["values"]), values)
    assert plain["inner"]["names"] == ["a", "b"]
    assert plain["table"] == {"1": 0.5}
    assert plain["params"] == {}
