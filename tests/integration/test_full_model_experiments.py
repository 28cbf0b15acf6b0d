"""The experiments behind the whole model's bars, as a page or the command line runs them."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch

from engine import generation
from engine.errors import DoesNotFitError, InputError
from engine.experiments import full_model, full_model_step, full_model_switches, full_model_tests, parse
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments._on_workers.full_model_step import Trial, build
from engine.runtime.jobs import LocalJob

pytestmark = pytest.mark.usefixtures("no_kernel_is_chosen")

SMALL = {"d_model": 64, "num_layers": 2, "num_heads": 4, "batch_size": 2, "length": 32, "rank": 4, "experts": 3}
EVERY = [dict(zip(SWITCHES, states, strict=True)) for states in itertools.product((False, True), repeat=4)]


def named(switches):
    return "+".join(name for name, on in switches.items() if on) or "nothing"


class TestPrediction:
    def test_a_switch_is_worth_what_it_is_worth_from_either_side(self):
        params = full_model.Params(**SMALL)
        on = full_model.run(params, LocalJob())
        for name in SWITCHES:
            off = full_model.run(params.model_copy(update={name: False}), LocalJob())
            assert on.worth(name) == off.worth(name)
            assert on.worth(name) == (on.chosen, off.chosen)
        assert on.off == full_model.compute(params.model_copy(update=dict.fromkeys(SWITCHES, False))).chosen

    def test_what_each_switch_is_for(self):
        found = full_model.compute(SwitchParams(d_model=256, num_layers=4, moe=False))
        for name in ("quantization", "flash"):
            on, off = found.worth(name)
            assert on.memory.peak.total < off.memory.peak.total
        on, off = full_model.compute(SwitchParams(quantization=False)).worth("lora")
        assert on.total.learning < off.total.learning
        on, off = found.worth("quantization")
        assert on.model_bytes["weights"] < off.model_bytes["weights"]
        assert on.model_bytes["scales"] > off.model_bytes["scales"] == 0
        on, off = found.worth("moe")
        assert on.total.total > off.total.total

    def test_the_storyteller_lets_its_adapters_learn_alone(self):
        fresh, pretrained = (full_model.compute(SwitchParams(begin=begin)).chosen for begin in ("fresh", "storyteller"))
        assert fresh.parameters["embeddings"].learning
        assert not pretrained.parameters["embeddings"].learning
        assert pretrained.total.learning == sum(pretrained.parameters[part].total for part in ("adapters", "routers"))

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"num_heads": "5"}, "must divide Width"),
            ({"top_k": "5", "experts": "4"}, "choose at most 4"),
            ({"d_model": "32", "rank": "64"}, "lora_rank is 64"),
            ({"length": "8"}, "8"),
        ],
    )
    def test_what_does_not_fit_together_gets_one_sentence(self, values, words):
        with pytest.raises(InputError, match=words) as error:
            parse("full_model", values)
        assert "\n" not in str(error.value)


class TestStep:
    @pytest.mark.parametrize("switches", EVERY, ids=named)
    def test_the_memory_of_every_combination_is_predicted(self, switches):
        step = full_model_step.run(full_model_step.Params(**SMALL, **switches, top_k=1), LocalJob())
        assert abs(step.error) < 0.04
        assert step.on == tuple(name for name, on in switches.items() if on)
        assert step.model_bytes == sum(
            full_model.compute(SwitchParams(**SMALL, **switches)).chosen.model_bytes.values()
        )
        assert 5 < step.loss < 8  # of a fresh model on random tokens of 512, ln 512 = 6.24
        assert 0 < step.evidence.low_ms <= step.evidence.median_ms <= step.evidence.high_ms
        assert step.tokens_per_second == pytest.approx(64 / step.evidence.median_ms * 1e3)

    def test_at_the_default_sizes_it_is_exact(self):
        step = full_model_step.run(full_model_step.Params(), LocalJob())
        assert abs(step.error) < 1e-4

    def test_the_storyteller_takes_steps_too(self):
        params = full_model_step.Params(begin="storyteller", batch_size=1, length=32)
        step = full_model_step.run(params, LocalJob())
        assert abs(step.error) < 0.04
        assert step.model_bytes == sum(full_model.compute(params).chosen.model_bytes.values())

    def test_nothing_is_compared_within_a_measurement(self, monkeypatch):
        compared = []
        monkeypatch.setattr("engine.flash.choice._tried", lambda *args: compared.append(args))
        for _ in range(3):  # more than 32 calls of one kind
            full_model_step.run(full_model_step.Params(**SMALL, moe=False, quantization=False), LocalJob())
        assert not compared

    def test_a_processor_is_not_kept_busy_by_a_move_of_a_control(self):
        large = full_model_step.Params(d_model=512, num_layers=12, batch_size=64, length=256)
        with pytest.raises(DoesNotFitError, match="times less in all"):
            full_model_step.run(large, LocalJob())

    @pytest.mark.parametrize("begin", ["fresh", "storyteller"])
    @pytest.mark.parametrize("switches", EVERY, ids=named)
    def test_every_combination_at_the_first_settings_is_quick_enough(self, begin, switches):
        full_model_step.check_time(SwitchParams(begin=begin), "cpu", **switches)

    def test_it_is_told_by_how_much_it_is_too_slow(self, monkeypatch):
        params = SwitchParams(begin="storyteller")
        monkeypatch.setattr(full_model_step, "SLOW", 2.3e11)
        with pytest.raises(DoesNotFitError, match=r"up to 230: .* length, about 2% less in all\.$"):
            full_model_step.check_time(params, "cpu")
        full_model_step.check_time(params, "cuda")

    def test_memory_is_asked_for_before_the_start(self):
        params = full_model_step.Params(**SMALL)
        peak = full_model.compute(params).chosen.memory.peak.total
        plain = 4 * params.architecture().num_parameters
        assert peak + plain < params.memory_bytes() < 1.3 * (peak + 2 * plain)
        assert params.memory_bytes() < full_model_step.needed_bytes(params)

    def test_on_a_gpu_nothing_is_counted_that_only_waits_for_the_collector(self, monkeypatch):
        class Cycle:
            def __init__(self):
                self.itself = self

        waiting = weakref.ref(Cycle())
        trial = object.__new__(Trial)
        trial._device, trial._on_cuda = "cuda", True
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 0 if waiting() is None else 1)
        assert trial._allocated() == 0


@pytest.fixture
def quickly(monkeypatch):
    """Few steps of each combination."""
    monkeypatch.setattr(full_model_switches, "_SECONDS", 0.0)


@pytest.mark.usefixtures("quickly")
class TestSwitches:
    def test_all_are_flipped_alone_and_timed_in_turns(self):
        reports, params = [], full_model_switches.Params(**SMALL, lora=False)
        found = full_model_switches.run(params, LocalJob(on_progress=reports.append))
        assert found.is_complete
        assert [report.step for report in reports] == list(range(reports[0].total))
        assert found.off.on == ()
        for name in SWITCHES:
            on, off = found.worth(name)
            assert set(on.on) - set(off.on) == {name}
            assert found.chosen in (on, off)
            assert len(found.flipped[name].rounds) == len(found.chosen.rounds) > 1
            assert "rounds" in found.flipped[name].evidence.warmup
            assert abs(found.flipped[name].error) < 0.04

    def test_stopped_it_has_nothing(self):
        job = LocalJob()
        job.cancelled = True
        found = full_model_switches.run(full_model_switches.Params(**SMALL), job)
        assert not found.is_complete

    def test_each_of_them_must_be_quick_enough(self):
        large = full_model_switches.Params(d_model=512, num_layers=12, batch_size=64, length=256)
        with pytest.raises(DoesNotFitError, match="GFLOP"):
            full_model_switches.run(large, LocalJob())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict.fromkeys(SWITCHES, False),
        {"quantization": False, "lora": False, "seed": 5, "experts": 16, "top_k": 1},  # some experts have no token
        {"begin": "storyteller", "length": 32, "experts": 16, "top_k": 1},
    ],
    ids=str,
)
def test_all_properties_hold(changes):
    checks = full_model_tests.run(full_model_tests.Params(**SMALL | changes), LocalJob()).checks
    assert len(checks) == 12
    assert [check.name for check in checks if not check.passed] == []


def test_a_property_that_does_not_hold_is_told(monkeypatch):
    right = full_model.predict

    def wrong(*args, **kwargs):
        made = right(*args, **kwargs)
        return replace(made, model_bytes=made.model_bytes | {"weights": 0})

    monkeypatch.setattr(full_model, "predict", wrong)
    checks = full_model_tests.run(full_model_tests.Params(**SMALL), LocalJob()).checks
    assert [check.name for check in checks if not check.passed] == ["And the bytes"]


def test_an_expert_that_had_tokens_must_move(monkeypatch):
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self: None)
    checks = full_model_tests.run(full_model_tests.Params(**SMALL, top_k=1), LocalJob()).checks
    assert "What learns moves" in [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("tied", [False, True])
def test_other_words_with_a_cache_are_told_unless_they_are_as_good(monkeypatch, tied):
    model = build(full_model_tests.Params(**SMALL), "cpu")
    if tied:
        model.lm_head.weight.data[:] = model.lm_head.weight[0].clone()
    right = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *args: (right(*args) + 1) % 512)
    check = full_model_tests._generated(model, torch.randint(512, (2, 48)))
    assert check.passed == tied
