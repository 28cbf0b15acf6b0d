"""The catalogue says what the models are: every fact is checked against the model itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import catalogue, checkpoints
from engine.experiments.attention import Params

ROOT = Path(__file__).parents[2]


def test_needs_no_torch():
    program = "import sys, engine.catalogue; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_names_are_unique_and_the_default_comes_first():
    names = [model.name for model in catalogue.MODELS]
    assert len({*names}) == len({model.label for model in catalogue.MODELS}) == len(names)
    assert names[0] == catalogue.DEFAULT == Params().model


@pytest.mark.parametrize("name", catalogue.INSTALLED)
def test_what_is_called_installed_is_found_without_a_network(name, tmp_path, monkeypatch):
    import torch

    def write_record(name, path, target, *_):  # in the place of a conversion, which takes its time
        target.mkdir()
        (target / checkpoints._RECORD).write_text('{"type": "Q4_1", "bits": 4, "block_size": 32}')

    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoints, "_convert", write_record)
    assert checkpoints.find(name, "cpu", torch.float32).folder.is_dir()


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (catalogue.MODELS[0], catalogue.STORYTELLER),
        (catalogue.MODELS[1], catalogue.SMOLLM2_Q4),  # the same shape from either source
        (catalogue.MODELS[2], catalogue.MINILM),
    ],
)
def test_facts_are_true(model, weights):
    from engine import pretrained

    loaded = pretrained.load(weights)
    assert loaded.kind == model.kind
    assert f"{loaded.num_layers} layers of {loaded.num_heads} heads" in model.facts
    size = f"{loaded.num_parameters / 1e6:.2g} M"
    assert size in model.label or f"{loaded.num_parameters / 1e6:.0f}M" in model.label
