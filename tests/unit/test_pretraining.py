"""Pretraining: what the small model reads, the recipe and its command line, and a whole run of a few steps."""

import datetime
import json
import lzma
import math
import re
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import llama
from engine.architecture import ModelConfig
from engine.data import IGNORED, TokenBlocks, pack
from engine.errors import InputError
from engine.generation import generate
from engine.head_statistics import induction_score, previous_token_score, probe_periods, repeated_random_tokens
from engine.pretraining import run as pretraining
from engine.pretraining.__main__ import main
from engine.pretraining.mixture import RepetitionMixture
from engine.pretraining.recipe import Recipe
from engine.pretraining.run import PROMPT, SEPARATOR, TELLING, examine, pretrain, read_stories, split_stories
from engine.trainer import TrainerOptions, evaluate

SEEDS = range(3)
VOCAB, LENGTH = 500, 40
STORYTELLER = Path(__file__).parents[2] / "engine" / "storyteller"
NAMES, THINGS = ["Lily", "Tom", "Mia", "Ben"], ["ball", "cake", "kite", "boat", "hat"]
STORIES = [
    f"One day, {name} and {other} found a {thing}. {name} gave the {thing} to {other}. They were happy."
    for name in NAMES
    for other in NAMES
    for thing in THINGS
    if name != other
]
TINY = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "vocab_size": 300,
    "max_seq_len": 64,
    "block_size": 32,
    "batch_size": 4,
    "min_period": 4,
    "probe_period": 10,
    "steps": 6,
    "evaluate_every": 4,
    "held_out_share": 0.1,
    "compile": False,
}


def arguments(**changes):
    return [part for name, value in (TINY | changes).items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text(f"\n{SEPARATOR}\n".join(STORIES) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a run of six steps."""
    out = tmp_path_factory.mktemp("out") / "tiny"
    assert main(["--text", str(text), "--out", str(out), "--device", "cpu", *arguments()]) == 0
    return out


def mixture(random_share=0.0, passage_share=0.0, min_period=4, count=1000):
    """Over a text whose tokens are 1000, 1001, … in a row, so that each says where it comes from."""
    return RepetitionMixture(
        torch.arange(1000, 1000 + count, dtype=torch.int32),
        VOCAB,
        LENGTH,
        random_share=random_share,
        passage_share=passage_share,
        min_period=min_period,
    )


def samples(dataset, seed, count=200):
    """Whole samples (B, T + 1) and the targets of a batch (B, T)."""
    indices = torch.arange(count) % len(dataset)
    inputs, targets = dataset.batch(indices, torch.Generator().manual_seed(seed))
    last = dataset.batch(indices, torch.Generator().manual_seed(seed)).targets[:, -1:]
    return torch.cat([inputs, last], dim=1), targets


def period_of(sample):
    """The smallest P of at least 4 with sample[j] = sample[j − P] throughout, or None."""
    candidates = range(4, LENGTH // 2 + 1)
    return next((period for period in candidates if torch.equal(sample[period:], sample[:-period])), None)


class TestMixture:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_text_is_windows_of_the_stream_all_of_it_scored(self, seed):
        whole, targets = samples(mixture(), seed)
        steps = whole.diff(dim=1)
        assert ((steps == 1) | (steps == 1 - 1000)).all()  # the stream goes round
        assert torch.equal(targets, whole[:, 1:])

    def test_windows_start_anywhere_and_cover_the_stream(self):
        dataset = mixture()
        assert len(dataset) == 1000 // LENGTH
        starts = {int(whole[0]) for seed in range(60) for whole in samples(dataset, seed, len(dataset))[0]}
        assert len(starts) > 700

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_passage_is_text_said_again_and_scored(self, seed):
        whole, targets = samples(mixture(passage_share=1.0), seed)
        periods = [period_of(sample) for sample in whole]
        assert None not in periods
        for sample, period in zip(whole, periods, strict=True):
            steps = sample[:period].diff()
            assert ((steps == 1) | (steps == 1 - 1000)).all()
        assert torch.equal(targets, whole[:, 1:])

    @pytest.mark.parametrize("seed", SEEDS)
    def test_random_tokens_are_scored_exactly_where_the_context_foretells_them(self, seed):
        """A target can be known once the token before it has been seen, which in turn says what came after it."""
        whole, targets = samples(mixture(random_share=1.0), seed)
        assert whole.max() < VOCAB
        for sample, target in zip(whole, targets, strict=True):
            period = period_of(sample)
            foretold = torch.arange(LENGTH) >= period  # then the token read at this place was read P places ago too
            assert torch.equal(target != IGNORED, foretold)
            assert torch.equal(target[foretold], sample[1:][foretold])

    def test_random_tokens_are_spread_over_the_vocabulary(self):
        whole, _ = samples(mixture(random_share=1.0), 0, 2000)
        counts = whole[:, :4].flatten().bincount(minlength=VOCAB)
        assert (counts - 16).abs().max() < 6 * 4  # 8000 draws, a mean of 16 and σ = 4

    @pytest.mark.parametrize("seed", SEEDS)
    def test_periods_reach_from_the_smallest_to_half_a_sample(self, seed):
        whole, _ = samples(mixture(random_share=1.0), seed, 1000)
        periods = {period_of(sample) for sample in whole}
        assert periods == set(range(4, LENGTH // 2 + 1))

    @pytest.mark.parametrize(("random_share", "passage_share"), [(0.2, 0.3), (0.0, 0.1), (0.5, 0.5)])
    def test_shares_are_kept(self, random_share, passage_share):
        """Each count within 4 σ of its binomial mean."""
        whole, _ = samples(mixture(random_share, passage_share), 1, 3000)
        kinds = [("random" if sample[0] < VOCAB else "passage") if period_of(sample) else "text" for sample in whole]
        expected = {"random": random_share, "passage": passage_share, "text": 1 - random_share - passage_share}
        for kind, share in expected.items():
            assert abs(kinds.count(kind) - 3000 * share) <= 4 * math.sqrt(3000 * share * (1 - share)) + 1e-6

    def test_equal_generators_draw_equal_samples(self):
        dataset = mixture(0.3, 0.3)
        assert torch.equal(samples(dataset, 5)[0], samples(dataset, 5)[0])
        assert not torch.equal(samples(dataset, 5)[0], samples(dataset, 6)[0])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"count": LENGTH}, r"has 40 tokens, a sample needs 41"),
            ({"random_share": 0.7, "passage_share": 0.4}, r"\(0\.7\) and passage_share \(0\.4\) must not exceed 1"),
            ({"min_period": 21}, r"min_period \(21\) must be at most half of the block size \(40\)"),
        ],
    )
    def test_what_leaves_no_choice_is_one_sentence(self, changes, words):
        with pytest.raises(InputError, match=words):
            mixture(**changes)


class TestStories:
    def test_are_read_from_a_file_or_an_xz_file_without_the_space_around_them(self, tmp_path):
        content = f"\n One. \n{SEPARATOR}\n{SEPARATOR}\nTwo,\n\ncafé.\n{SEPARATOR}\n"
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        (tmp_path / "a.txt.xz").write_bytes(lzma.compress(content.encode()))
        assert read_stories(tmp_path / "a.txt") == read_stories(tmp_path / "a.txt.xz") == ["One.", "Two,\n\ncafé."]

    def test_what_cannot_be_read_is_one_sentence(self, tmp_path):
        whole = lzma.compress(f"One.\n{SEPARATOR}\nTwo.".encode() * 100)
        (tmp_path / "half.xz").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "other.xz").write_bytes(b"One.")
        (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
        for name in ("half.xz", "other.xz", "latin.txt", "missing.txt", "."):
            with pytest.raises(InputError, match="cannot be read: give a UTF-8 text file"):
                read_stories(tmp_path / name)

    def test_a_single_story_is_one_sentence(self, tmp_path):
        (tmp_path / "one.txt").write_text("One.")
        with pytest.raises(InputError, match="has 1 stories, give 2 or more"):
            read_stories(tmp_path / "one.txt")

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("share", "expected"), [(0.1, 6), (0.0001, 1), (0.9999, 59)])
    def test_each_is_either_trained_on_or_held_out_in_its_order(self, seed, share, expected):
        training, held_out = split_stories(STORIES, share, seed)
        assert len(held_out) == expected
        assert sorted(training + held_out) == sorted(STORIES)
        assert training == [story for story in STORIES if story in training]
        assert held_out == [story for story in STORIES if story in held_out]

    def test_which_are_held_out_follows_from_the_seed(self):
        assert split_stories(STORIES, 0.2, 0) == split_stories(STORIES, 0.2, 0)
        assert split_stories(STORIES, 0.2, 0) != split_stories(STORIES, 0.2, 1)


class TestCommandLine:
    def refuse(self, capsys, text, out, given, words):
        assert main(["--text", str(text), "--out", str(out), "--device", "cpu", *given]) == 2
        said = capsys.readouterr().err.strip()
        assert words in said
        assert "\n" not in said

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"steps": 0}, "steps is '0'"),
            ({"batch_size": "many"}, "batch_size is 'many'"),
            ({"num_heads": 3}, "num_heads is 3: it must divide d_model, which is 16"),
            ({"block_size": 128}, "block_size is 128: it must be at most max_seq_len, which is 64"),
            ({"probe_period": 33}, "probe_period is 33: twice of it must be at most max_seq_len, which is 64"),
            ({"max_seq_len": 1024, "probe_period": 301}, "probe_period is 301: it must be at most vocab_size"),
            ({"random_share": 0.9, "passage_share": 0.2}, "must not exceed 1 together"),
            ({"vocab_size": 200, "probe_period": 20}, "vocab_size is 200: give at least 257"),
            ({"held_out_share": 0.001}, "a block needs 33"),
        ],
    )
    def test_what_makes_no_sense_is_one_sentence_before_anything_is_written(
        self, capsys, text, tmp_path, changes, words
    ):
        self.refuse(capsys, text, tmp_path / "out", arguments(**changes), words)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("device", ["abacus", "cuda:77"])
    def test_a_device_that_is_not_there_is_one_sentence(self, capsys, text, tmp_path, device):
        given = [*arguments(), "--device", device]
        self.refuse(capsys, text, tmp_path / "out", given, f"The device {device} cannot be used here")

    @pytest.mark.parametrize("minutes", ["0", "-3", "nan"])
    def test_no_time_is_one_sentence(self, capsys, text, tmp_path, minutes):
        self.refuse(
            capsys, text, tmp_path / "out", [*arguments(), "--minutes", minutes], f"minutes is {float(minutes):g}"
        )

    def test_a_missing_text_is_one_sentence(self, capsys, tmp_path):
        self.refuse(capsys, tmp_path / "none.txt", tmp_path / "out", [], "none.txt cannot be read")

    def test_starts_as_documented(self):
        done = subprocess.run(
            [sys.executable, "-m", "engine.pretraining", "--help"], capture_output=True, text=True, check=True
        )
        assert "--text" in done.stdout


class TestRun:
    def test_leaves_a_model_that_transformers_and_we_open_alike(self, trained):
        theirs, ours = AutoModelForCausalLM.from_pretrained(trained), llama.read(trained)
        tokenizer = AutoTokenizer.from_pretrained(trained)
        ids = torch.tensor([tokenizer(STORIES[0]).input_ids])
        with torch.no_grad():
            torch.testing.assert_close(theirs.float()(ids).logits, ours(ids), atol=1e-4, rtol=1e-4)
        assert (ours.config.num_layers, ours.config.d_model, ours.config.max_seq_len) == (2, 16, 64)

    def test_the_held_out_loss_follows_from_the_files_alone(self, trained):
        log = json.loads((trained / "log.json").read_text())
        stories = read_stories(trained / "heldout.txt")
        blocks = pack(stories, AutoTokenizer.from_pretrained(trained), 32)
        assert len(stories) == log["stories"]["held out"] == 6
        assert log["stories"]["training"] == 54
        assert len(blocks) * 32 == log["tokens"]["held out"]
        loss = evaluate(llama.read(trained), blocks, TINY["batch_size"])
        assert loss == pytest.approx(log["final"]["held_out_loss"], rel=1e-9)
        assert not set(stories) & set(split_stories(STORIES, 0.1, 0)[0])

    def test_the_log_has_every_step_and_look_and_the_best_is_kept(self, trained):
        log = json.loads((trained / "log.json").read_text())
        assert len(log["steps"]) == 6
        assert all(math.isfinite(number) for step in log["steps"] for number in step)
        looks = {look["step"]: look["held_out_loss"] for look in log["checkups"]}
        assert list(looks) == [0, 4, 6]
        assert looks[0] == pytest.approx(math.log(300), rel=0.05)
        assert log["kept"] == min(looks, key=looks.get)
        assert log["final"]["held_out_loss"] == pytest.approx(looks[log["kept"]], rel=1e-2)
        assert log["recipe"]["model"]["d_model"] == 16
        assert log["sample"].startswith(PROMPT)

    def test_the_card_says_what_was_measured(self, trained):
        log, card = (json.loads((trained / "log.json").read_text()), (trained / "README.md").read_text())
        for fact in (
            f"{log['final']['held_out_loss']:.3f} nats a token",
            f"{log['final']['induction']['score']:.2f}, layer {log['final']['induction']['layer']}",
            f"{log['device']}, {datetime.date.fromisoformat(log['date'])}, ",
            f"torch {torch.__version__}",
            "6 steps of 4 × 32 tokens",
            "Apache-2.0",
            "54 stories",
        ):
            assert fact in card

    def test_runs_again_to_the_same_weights(self, text, trained, tmp_path):
        again = tmp_path / "again"
        assert main(["--text", str(text), "--out", str(again), "--device", "cpu", *arguments()]) == 0
        assert (again / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
        assert (again / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()

    def test_when_the_time_is_up_what_was_learned_is_written(self, text, tmp_path):
        recipe = Recipe(
            model=ModelConfig(d_model=16, num_layers=1, num_heads=2, vocab_size=300, max_seq_len=64),
            options=TrainerOptions(batch_size=2),
            block_size=32,
            min_period=4,
            probe_period=10,
            held_out_share=0.1,
        )
        log = pretrain(recipe, text, tmp_path, minutes=1e-9, say=lambda line: None)
        assert log.stopped_early
        assert len(log.steps) == 1
        assert [look.step for look in log.checkups] == [0, 1]
        assert (tmp_path / "README.md").read_text().count("nan") == 0

    def test_keeps_the_weights_of_the_lowest_held_out_loss(self, text, tmp_path, monkeypatch):
        """The third look of four is made the best one: the file holds the weights of its step."""
        looks, states = iter([4.0, 3.0, 1.0, 2.0, 1.5]), []
        original = pretraining.examine

        def examine(model, *rest):
            states.append({name: weight.clone() for name, weight in model.state_dict().items()})
            checkup = original(model, *rest)
            object.__setattr__(checkup, "held_out_loss", next(looks))
            return checkup

        monkeypatch.setattr(pretraining, "examine", examine)
        given = arguments(steps=6, evaluate_every=2, learning_rate=0.01)
        assert main(["--text", str(text), "--out", str(tmp_path), "--device", "cpu", *given]) == 0
        assert json.loads((tmp_path / "log.json").read_text())["kept"] == 4
        for name, weight in llama.read(tmp_path).state_dict().items():
            torch.testing.assert_close(weight, states[2][name], atol=1e-6, rtol=2**-11)


class TestExamination:
    def test_finds_the_best_heads_among_all(self, trained):
        """Scored again from the definition, head by head, over three periods."""
        model, recipe = llama.read(trained), Recipe(probe_period=12, model={"vocab_size": 300})
        stories = read_stories(trained / "heldout.txt")
        found = examine(model, pack(stories, AutoTokenizer.from_pretrained(trained), 32), recipe, 3)
        probes = {period: repeated_random_tokens(300, period, 8, seed=1) for period in (6, 9, 12)}
        maps = {period: model.attention_maps(probe).mean(1) for period, probe in probes.items()}
        scores = {
            "induction": lambda head, p: sum(head[q, q - p + 1] for q in range(p, 2 * p)) / p,
            "previous_token": lambda head, p: sum(head[q, q - 1] for q in range(1, 2 * p)) / (2 * p - 1),
        }
        for name, score in scores.items():
            best = getattr(found, name)
            values = {
                (layer, head): sum(score(maps[period][layer, head], period).item() for period in maps) / 3
                for layer in range(2)
                for head in range(2)
            }
            assert max(values, key=values.get) == (best.layer, best.head)
            assert values[best.layer, best.head] == pytest.approx(best.score, abs=1e-6)
        assert found.step == 3

    def test_copying_is_counted_in_the_second_round(self, storyteller, trained):
        """The storyteller copies, a model of a few steps does not."""
        held_out = TokenBlocks(torch.randint(4096, (2, 33)))
        assert examine(storyteller, held_out, Recipe(), 0).copied > 0.95
        recipe = Recipe(probe_period=12, model={"vocab_size": 300})
        little = examine(llama.read(trained), TokenBlocks(held_out.ids % 300), recipe, 0)
        assert little.copied < 0.2

    @pytest.mark.parametrize("longest", [8, 10, 32, 50])
    def test_a_head_that_looks_equally_far_back_is_no_induction_head(self, longest):
        for back in range(1, longest + 1):
            total = 0.0
            for period in probe_periods(longest):
                weights = torch.zeros(2 * period, 2 * period)
                query = torch.arange(2 * period)
                weights[query, (query - back).clamp(min=0)] = 1.0
                total += induction_score(weights, period)
            assert total / 3 <= 1 / 3 + 1e-6


@pytest.fixture(scope="module")
def storyteller():
    return llama.read(STORYTELLER)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORYTELLER)


@pytest.fixture(scope="module")
def record():
    return json.loads((STORYTELLER / "log.json").read_text(encoding="utf-8"))


class TestStoryteller:
    """The model that is shipped: what it can do, and that its record tells the truth."""

    def test_is_small_and_loads_in_under_three_tenths_of_a_second(self, storyteller):
        def load():
            began = time.perf_counter()
            llama.read(STORYTELLER)
            AutoTokenizer.from_pretrained(STORYTELLER)
            return time.perf_counter() - began

        assert min(load() for _ in range(3)) < 0.3
        assert (STORYTELLER / "model.safetensors").stat().st_size < 16e6
        assert (STORYTELLER / "heldout.txt").stat().st_size <= 200_000
        assert 4e6 < storyteller.config.num_parameters < 8e6
        assert storyteller.config.max_seq_len >= 256

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("period", [25, 50, 100])
    def test_has_induction_and_previous_token_heads(self, storyteller, seed, period):
        probe = repeated_random_tokens(storyteller.config.vocab_size, period, 4, seed=100 + seed)
        maps = storyteller.attention_maps(probe).mean(1)
        assert induction_score(maps, period).max() > 0.5
        assert previous_token_score(maps).max() > 0.5

    @pytest.mark.parametrize("seed", SEEDS)
    def test_says_a_second_time_what_it_has_read_once(self, storyteller, seed):
        """Random tokens cost 8.3 nats each at first and next to nothing when they come again."""
        ids = repeated_random_tokens(storyteller.config.vocab_size, 50, 4, seed=200 + seed)
        with torch.no_grad():
            losses = F.cross_entropy(storyteller(ids)[:, :-1].mT, ids[:, 1:], reduction="none")  # (4, 99)
        assert losses[:, :49].mean() > 8
        assert losses[:, 50:].mean() < 1

    def test_continues_a_story_in_simple_english(self, storyteller, tokenizer):
        """Only words that stories know, in sentences, without going round in circles."""
        known = set(re.findall(r"[a-z]+", (STORYTELLER / "heldout.txt").read_text(encoding="utf-8").lower()))
        ids = torch.tensor([tokenizer(PROMPT).input_ids] * 8)
        random = torch.Generator().manual_seed(0)
        told = generate(storyteller, ids, 80, TELLING, end_token=tokenizer.eos_token_id, generator=random)
        stories = tokenizer.batch_decode(told, skip_special_tokens=True)
        assert all(story.startswith(PROMPT) for story in stories)
        words = [re.findall(r"[a-z]+", story[len(PROMPT) :].lower()) for story in stories]
        runs = [tuple(said[start : start + 4]) for said in words for start in range(len(said) - 3)]
        spoken = list(chain.from_iterable(words))
        assert len(spoken) > 8 * 20
        assert sum(word in known for word in spoken) > 0.95 * len(spoken)
        assert len(set(runs)) > 0.75 * len(runs)
        assert all(re.search(r"[.!?]", story) for story in stories)

    @pytest.mark.slow
    def test_the_held_out_loss_is_that_of_its_record(self, storyteller, tokenizer, record):
        blocks = pack(read_stories(STORYTELLER / "heldout.txt"), tokenizer, record["recipe"]["block_size"])
        loss = evaluate(storyteller, blocks)
        assert loss == pytest.approx(record["final"]["held_out_loss"], rel=1e-4)
        assert loss < 1.7
        assert f"{loss:.3f} nats a token" in (STORYTELLER / "README.md").read_text(encoding="utf-8")

    def test_comes_from_the_recipe_that_the_command_line_starts_with(self, record):
        assert Recipe(**record["recipe"]) == Recipe()
        assert len(record["steps"]) == Recipe().steps
        assert not record["stopped_early"]

    def test_the_record_shows_when_induction_formed(self, record):
        scores = [look["induction"]["score"] for look in record["checkups"]]
        assert scores[0] < 0.1
        assert scores[-1] > 0.9
        assert record["final"]["induction"]["score"] > 0.9
