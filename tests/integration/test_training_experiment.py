"""The training experiment in this process: what it learns, keeps and says."""

import io
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import experiments, llama
from engine.data import TokenBlocks
from engine.errors import InputError, JobCancelledError
from engine.experiments import _training, _training_text, training, training_tests
from engine.experiments._training_diary import MAP_PERIOD, fixed_batch
from engine.model import Decoder
from engine.pretraining.mixture import RepetitionMixture
from engine.pretraining.run import PROMPT, tell
from engine.runtime.jobs import LocalJob
from engine.trainer import Trainer, TrainerOptions, evaluate

TINY = {"num_layers": 1, "d_model": 32, "num_heads": 2, "batch_size": 2, "steps": 6}
GUESSING = math.log(training.VOCAB_SIZE)


def train(job=None, **values):
    return training.run(training.Params(**{**TINY, **values}), job or LocalJob())


@pytest.fixture(scope="module")
def result():
    return train(steps=60, learning_rate=0.01, random_share=0.0)


def test_it_learns(result):
    assert abs(result.held_out_loss[0] - GUESSING) < 0.3
    assert result.held_out_loss[-1] < result.held_out_loss[0] - 1
    assert result.loss[-5:].mean() < result.loss[:5].mean() - 1


def test_every_step_and_every_checkup_is_there(result):
    np.testing.assert_array_equal(result.step, np.arange(1, 61))
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        assert getattr(result, name).shape == (60,)
    assert result.checked[0] == 0
    assert result.checked[-1] == 60
    assert (np.diff(result.checked) > 0).all()
    for name in ("held_out_loss", "text_loss", "random_loss", "induction", "previous_token", "copied"):
        assert getattr(result, name).shape == result.checked.shape
    assert ((result.induction >= 0) & (result.induction <= 1)).all()


def test_the_samples_begin_with_the_prompt_and_change(result):
    assert [sample.step for sample in result.samples] == [0, 50, 60]
    assert all(sample.text.startswith("One day, Lily and Tom went to the") for sample in result.samples)
    assert result.samples[0].text != result.samples[-1].text


def test_a_text_of_ones_own_is_continued_from_words_that_are_held_out():
    learned = "the cat sat on the mat. " * 100
    found = train(text=learned + "a dog ran to its house, over hill and dale. " * 6, steps=1)
    assert found.prompt in "a dog ran to its house, over hill and dale. " * 6
    assert len(found.prompt.split()) >= 4
    assert all(sample.text.startswith(found.prompt) for sample in found.samples)
    assert all(len(sample.text) > len(found.prompt) for sample in found.samples)


def test_a_text_without_spaces_has_a_prompt_that_leaves_room():
    text = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FA5, 1500)))
    found = train(text=text, steps=1)
    assert 0 < len(found.prompt) <= 20
    assert "\N{REPLACEMENT CHARACTER}" not in found.prompt
    assert len(found.samples[0].text) > len(found.prompt)


def test_the_two_kinds_of_samples_are_fixed_and_apart():
    corpus = _training_text.read("", training.VOCAB_SIZE, training.BLOCK_SIZE)
    recipe = training._recipe(training.Params(**TINY), samples=100)
    text, again, random = (fixed_batch(corpus.learned, recipe, share) for share in (0.0, 0.0, 1.0))
    assert torch.equal(text.inputs, again.inputs)
    assert (text.targets >= 0).all()
    stream = corpus.learned.tolist()
    stream = " ".join(map(str, stream + stream[:64]))
    assert all(" ".join(map(str, row)) in stream for row in text.inputs[:5].tolist())
    assert (random.targets >= 0).float().mean() < 0.9  # the first round is not scored
    (row, place) = (random.targets >= 0).nonzero()[0].tolist()
    assert random.targets[row, place] in random.inputs[row, :place]


def test_reading_one_kind_makes_that_kind_cheaper(result):
    assert abs(result.text_loss[0] - GUESSING) < 0.3
    assert result.text_loss[-1] == pytest.approx(result.loss[-10:].mean(), abs=0.3)  # it reads nothing else
    assert result.random_loss[-1] > result.random_loss[0] - 0.3
    read = train(text="the cat sat on the mat. a dog ran. " * 60, steps=60, learning_rate=0.01)
    assert read.text_loss[-1] < read.random_loss[-1] - 2


def test_the_maps_are_of_the_head_that_looks_back_most(result):
    maps = result.head_maps.astype(np.float32)
    assert maps.shape == (2, 2 * MAP_PERIOD, 2 * MAP_PERIOD)
    assert maps.nbytes // 2 < 10_000  # float16; every partial result carries them
    np.testing.assert_allclose(maps.sum(-1), 1, atol=2e-3)
    assert not np.triu(maps, 1).any()
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    assert result.heads.shape == (len(result.checked), 2)
    assert (result.heads >= 0).all()
    assert (result.heads < [TINY["num_layers"], TINY["num_heads"]]).all()


def test_what_was_predicted_is_near_what_was_measured(result):
    predicted, measured = result.predicted, result.measured
    assert predicted.parameters == measured.parameters
    assert measured.flops == pytest.approx(predicted.flops, rel=0.1)
    assert 0.95 <= predicted.memory_bytes / measured.memory_bytes <= 1.1


@pytest.mark.parametrize(
    "values",
    [
        {"d_model": 256, "num_layers": 1},  # weights outweigh activations
        {"d_model": 128, "num_layers": 2, "num_heads": 4, "batch_size": 8},
        {"d_model": 64, "num_layers": 6},
        {"d_model": 64, "num_heads": 16, "batch_size": 64},
        {"d_model": 32, "num_heads": 1, "num_layers": 8, "batch_size": 32},
        {"d_model": 224, "num_heads": 7, "num_layers": 3, "batch_size": 16},
    ],
)
def test_memory_is_predicted_for_other_shapes(values):
    """Never much too low: the runtime refuses what does not fit."""
    found = train(**values, steps=2)
    assert 0.95 <= found.predicted.memory_bytes / found.measured.memory_bytes <= 1.1


def test_weighing_a_step_leaves_the_run_as_it_is():
    straight, found = _straight(random_share=0.6), train(random_share=0.6)
    np.testing.assert_array_equal(found.loss, straight.train_steps(TINY["steps"]))
    assert found.measured.memory_bytes > 0
    assert train(steps=1).measured.memory_bytes > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_random_samples_is_the_one_asked_for(share):
    other = _straight(random_share=abs(share - 0.5))
    found = train(random_share=share)
    np.testing.assert_array_equal(found.loss, _straight(random_share=share).train_steps(TINY["steps"]))
    assert (found.loss[1:] != other.train_steps(TINY["steps"])[1:]).any()


def _straight(random_share):
    """The trainer of the same run, put together here."""
    params = training.Params(**TINY)
    corpus = _training_text.read("", training.VOCAB_SIZE, training.BLOCK_SIZE)
    mixture = RepetitionMixture(
        corpus.learned,
        training.VOCAB_SIZE,
        training.BLOCK_SIZE,
        random_share=random_share,
        passage_share=0.0,
        min_period=12,
    )
    options = TrainerOptions(learning_rate=params.learning_rate, batch_size=params.batch_size, beta2=0.99)
    torch.manual_seed(params.seed)
    blocks = TokenBlocks(corpus.tested[: training.BLOCK_SIZE + 1][None])
    return Trainer(Decoder(params.architecture), mixture, options, held_out=blocks)


@pytest.mark.parametrize("seed", [1, 2])
def test_equal_seeds_train_alike_and_others_do_not(seed):
    one, again, other = train(seed=seed), train(seed=seed), train(seed=seed + 10)
    np.testing.assert_array_equal(one.loss, again.loss)
    assert [sample.text for sample in one.samples] == [sample.text for sample in again.samples]
    assert (one.loss != other.loss).all()


def test_every_step_is_reported_with_its_numbers():
    seen = []
    train(LocalJob(on_progress=seen.append))
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert {progress.total for progress in seen} == {6}
    assert seen[-1].numbers.keys() == {
        "loss",
        "held_out_loss",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "induction_score",
    }
    assert all(math.isfinite(number) for progress in seen for number in progress.numbers.values())


def test_what_it_has_learned_so_far_is_shown_and_grows():
    seen = []
    found = train(LocalJob(on_show=seen.append), steps=60)
    assert [len(partial.step) for partial in seen] == list(range(61))
    for partial in (seen[0], seen[7], seen[-1]):
        taken = len(partial.step)
        assert (partial.ended, partial.archive, partial.steps) == ("running", b"", 60)
        np.testing.assert_array_equal(partial.loss, found.loss[:taken])
        np.testing.assert_array_equal(partial.induction, found.induction[: len(partial.checked)])
        assert partial.samples == found.samples[: len(partial.samples)]
        assert partial.checked[-1] <= taken
        assert partial.measured.flops * 60 == found.measured.flops * taken
    assert [len(partial.samples) for partial in seen[49:51]] == [1, 2]


@pytest.mark.parametrize("end", ["finished", "cancelled"])
def test_the_model_that_was_trained_can_be_taken_home(end, tmp_path):
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", end == "cancelled" and progress.step == 3)
    found = train(job, d_model=64)
    with zipfile.ZipFile(io.BytesIO(found.archive)) as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.iterdir()
    ours = llama.read(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tell(ours, tokenizer, PROMPT, 8)
    assert told.startswith(PROMPT)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    corpus = _training_text.read("", training.VOCAB_SIZE, training.BLOCK_SIZE)
    held_out = TokenBlocks(corpus.tested.unfold(0, training.BLOCK_SIZE + 1, training.BLOCK_SIZE))
    assert evaluate(ours, held_out) == pytest.approx(found.held_out_loss[-1], abs=0.01)  # in bfloat16


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_induction_head_forms_in_the_default_run():
    """Not before a third of the steps, then within some fifty: the lab is there to show the moment."""
    found = training.run(training.Params(), LocalJob())
    assert found.induction[found.checked <= 150].max() < 0.2
    assert found.copied[found.checked <= 150].max() < 0.2
    assert found.induction[-1] > 0.7
    query = np.arange(MAP_PERIOD, 2 * MAP_PERIOD)
    before, now = found.head_maps[:, query, query - MAP_PERIOD + 1].mean(-1)
    assert before < 0.1
    assert now == pytest.approx(found.induction[-1], abs=0.2)
    assert found.random_loss[-1] < 1 < found.text_loss[-1]
    assert found.copied[-1] > 0.8
    assert found.held_out_loss[-1] < 2.6


def test_a_cancelled_run_returns_what_it_learned():
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", progress.step == 3)
    found = train(job)
    assert found.ended == "cancelled"
    assert "after step 3 of 6" in found.ending
    assert found.step.tolist() == [1, 2, 3]
    assert found.checked[-1] == 3
    assert found.samples[-1].step == 3


def test_a_training_has_time_to_end_its_step():
    """The largest step of the largest model takes tens of seconds on two cores; a checkup and a sample follow it."""
    assert 60 <= training.Params.stop_grace <= 120


def test_a_run_at_its_time_limit_returns_what_it_learned_and_says_so():
    job = LocalJob()

    def look(progress):
        job.cancelled = job.timed_out = progress.step == 3

    job._on_progress = look
    found = train(job)
    assert found.ended == "timed out"
    assert found.ending.startswith("Stopped at its limit of 1 h, after step 3 of 6")
    assert found.archive
    assert found.step.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("steps", "taken"), [(2, 1), (1, 0)])
def test_a_run_cancelled_before_the_step_that_is_weighed_has_no_memory_figure(steps, taken):
    job = LocalJob()
    job._on_show = lambda partial: setattr(job, "cancelled", len(partial.step) == taken)
    found = train(job, steps=steps)
    assert len(found.step) == taken
    assert found.measured.memory_bytes == 0


def test_a_run_cancelled_before_its_first_step_is_the_fresh_model():
    job = LocalJob()
    job.cancelled = True
    found = train(job)
    assert found.ended == "cancelled"
    assert found.step.tolist() == []
    assert found.checked.tolist() == [0]


def test_a_diverging_rate_names_the_step_and_keeps_what_was_learned():
    found = train(learning_rate=10, steps=40)
    assert found.ended == "diverged"
    assert f"diverged at step {len(found.step) + 1} of 40" in found.ending
    assert np.isfinite(found.loss).all()
    assert len(found.step) > 0


class TestBadInput:
    def test_heads_that_do_not_divide_the_width(self):
        with pytest.raises(InputError, match="Heads is 3: it must divide Width, which is 64"):
            experiments.parse("training", {"num_heads": "3"})

    def test_a_head_of_odd_width(self):
        with pytest.raises(InputError, match=r"head_dim is 1\b|even"):
            experiments.parse("training", {"d_model": "33", "num_heads": "11"})

    def test_a_text_shorter_than_its_blocks(self):
        with pytest.raises(InputError, match="each part needs 65"):
            train(text="word " * 200)

    @pytest.mark.parametrize("text", ["Hello.", "x" * 634, "é" * 310])
    def test_a_text_whose_characters_are_too_few_is_refused_before_anything_runs(self, text):
        with pytest.raises(InputError, match=f"has {len(text)} characters: .* sample of 64 tokens, so paste 1,500"):
            experiments.parse("training", {"text": text})

    @pytest.mark.parametrize("text", ["", "  ", "x" * 640, "é" * 320])
    def test_a_text_that_may_be_long_enough_is_not(self, text):
        assert experiments.parse("training", {"text": text}).text == text.strip()

    def test_blanks_around_a_text_are_no_part_of_it(self):
        text = "the cat sat on the mat. " * 120
        assert training.Params(text=text + " " * 3000) == training.Params(text=text)

    def test_spaces_alone_are_no_text(self):
        assert train(text="   ", steps=1).training_tokens == train(steps=1).training_tokens


def test_a_short_text_takes_smaller_batches_and_says_what_they_hold():
    found = train(text="the cat sat on the mat. " * 120, batch_size=32, steps=2)
    assert found.tokens_per_step == found.training_tokens // 64 * 64
    whole = training.Params(**{**TINY, "batch_size": 32, "steps": 2}).predict(found.samples_to_learn)
    assert found.predicted == whole
    assert whole.flops < training.Params(**{**TINY, "batch_size": 32, "steps": 2}).predict().flops
    assert found.measured.flops == pytest.approx(found.predicted.flops, rel=0.1)


@pytest.mark.parametrize("documents", [["0123456789" * 50], ["a" * 130, "b" * 250, "c" * 120], ["a" * 460, "b" * 40]])
def test_the_last_tenth_of_the_characters_is_held_out(documents):
    learned, tested = _training_text.split(documents)
    assert "".join(learned) + "".join(tested) == "".join(documents)
    assert len("".join(tested)) == 50
    assert all(learned)
    assert all(tested)


def test_the_tokenizer_has_not_seen_what_is_held_out():
    seen, unseen = "the cat sat on the mat. " * 200, "zqzqzqzq" * 60
    corpus = _training_text.read(seen + unseen, training.VOCAB_SIZE, training.BLOCK_SIZE)
    assert len(corpus.tokenizer) <= training.VOCAB_SIZE
    assert "zq" not in corpus.tokenizer.get_vocab()
    assert corpus.characters_per_token < 1.5 < len(seen) / len(corpus.learned)


def test_the_recorded_run_is_the_shipped_model_s():
    found = _training.recorded_run()
    assert found.tokens_per_step > 1000
    assert found.text_share == pytest.approx(0.8)
    assert found.checked[0] == 0
    assert found.checked[-1] == found.step[-1] == len(found.loss)
    assert found.held_out_loss[-1] < 2
    assert found.induction[0] < 0.1
    assert found.induction[-1] > 0.9
    assert re.fullmatch(r"H200, recorded 20\d\d-\d\d-\d\d", found.provenance)


@pytest.mark.parametrize("seed", [0, 1])
def test_its_properties_hold(seed):
    found = training_tests.run(training_tests.Params(**{**TINY, "seed": seed}), LocalJob())
    assert len(found.checks) == 5
    assert all("depth, width, heads and seed of this page" in check.must for check in found.checks)
    assert sum("learning rate of its own, 0.004" in check.must for check in found.checks) == 2
    assert all(check.passed for check in found.checks), found.checks


def test_the_checks_are_no_long_job_and_can_be_cancelled():
    assert training_tests.Params.lane == "short"
    assert training_tests.Params.time_limit <= 60
    job = LocalJob()
    job._on_progress = lambda progress: setattr(job, "cancelled", progress.step == 3)
    with pytest.raises(JobCancelledError):
        training_tests.run(training_tests.Params(**TINY), job)


def test_a_property_that_does_not_hold_is_seen(monkeypatch):
    monkeypatch.setattr(training_tests, "_fresh", lambda params, device: _loud(params))
    found = training_tests.run(training_tests.Params(**TINY), LocalJob())
    assert not next(check for check in found.checks if "guesses" in check.name).passed


def _loud(params):
    from engine.model import Decoder

    model = Decoder(params.architecture)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(4)
    return model


def test_its_modules_need_no_torch_before_they_run():
    code = (
        "import sys; from engine.experiments import _training, _training_text, training, training_tests; "
        "training.Params().predict(); "
        "_training.recorded_run(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
