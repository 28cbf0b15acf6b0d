"""The experiments of the router lab in this process: what they say agrees with what the router does."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.errors import InputError, JobCancelledError
from engine.experiments import _router, router_cost, router_tests, router_text, router_token
from engine.moe.kinds import KINDS
from engine.moe.routing import ExpertRouter
from engine.runtime.jobs import LocalJob
from engine.runtime.results import weigh

SMALL = {"d_model": 32, "ffn_dim": 32, "tokens": 64, "most_experts": 8, "runs": 3}
SETTINGS = [
    {"kind": kind, "top_k": top_k, "capacity_factor": factor, "router": router}
    for kind in KINDS
    for top_k, factor, router in ((2, None, "fresh"), (1, 0.5, "clustered"), (8, 1.25, "fresh"))
]


def read(**values):
    return router_text.run(router_text.Params(**values), LocalJob())


def follow(**values):
    return router_token.run(router_token.Params(**values), LocalJob())


class TestText:
    @pytest.mark.parametrize("values", SETTINGS)
    def test_the_tables_agree_with_each_other(self, values):
        found = read(**values)
        N, E = found.probs.shape
        assert len(found.tokens) == len(found.token_source) == N
        np.testing.assert_allclose(found.probs.sum(1), 1, atol=1e-5)
        table = np.zeros((N, E), bool)
        for token, row in enumerate(found.experts):
            chosen = row[row >= 0]
            assert len(set(chosen)) == len(chosen)
            assert (row[len(chosen) :] == -1).all()
            assert (np.diff(found.gates[token, chosen]) <= 0).all()
            table[token, chosen] = True
        np.testing.assert_array_equal(table.sum(0), found.load.load)
        np.testing.assert_array_equal(found.counts.sum(0), found.load.load)
        np.testing.assert_array_equal(found.left_out, ~table.any(1))
        assert not (table & found.dropped).any()
        assert not found.gates[~table].any()
        assert int(found.load.wanted.sum()) == table.sum() + found.dropped.sum()
        if found.capacity is not None:
            assert found.load.load.max() <= found.capacity
        assert sum(one.load for one in found.typical) == pytest.approx(1)
        weigh(found)

    def test_each_source_is_read_on_its_own(self):
        together, alone = read(text="One day\n\nTom ran"), read(text="Tom ran")
        np.testing.assert_allclose(together.probs[together.token_source == 1], alone.probs, atol=1e-5)
        assert together.sources == ("One day", "Tom ran")

    def test_a_clustered_router_goes_more_by_source_than_a_fresh_one(self):
        fresh, clustered = ([read(router=kind, seed=seed) for seed in range(3)] for kind in ("fresh", "clustered"))
        assert np.mean([one.information for one in clustered]) > 1.3 * np.mean([one.information for one in fresh])
        assert all("no router" in one.router_sentence for one in fresh + clustered)

    def test_random_routing_knows_no_source(self):
        assert np.mean([read(kind="random", seed=seed).information for seed in range(5)]) < 0.02

    def test_everything_dropped_is_shown(self):
        found = read(capacity_factor=0.01)
        assert found.capacity == 0
        assert found.left_out.all()
        assert (found.experts == -1).all()
        assert "all 376 choices are refused" in found.sentence
        assert "No token reaches" in found.information_sentence

    def test_one_expert(self):
        found = read(experts=1, top_k=1)
        assert (found.experts == 0).all()
        np.testing.assert_allclose(found.gates, 1)
        assert "nothing to choose" in found.sentence

    def test_fewer_tokens_than_experts(self):
        found = read(text="a", experts=64, router="clustered")
        assert found.experts.shape == (1, 2)
        assert "only 1 token to find centres in" in found.router_sentence

    def test_the_same_seed_gives_the_same_noise(self):
        one, same, other = (read(kind="noisy", seed=seed).gates for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()

    @pytest.mark.parametrize("module", [router_text, router_token, router_tests])
    def test_a_layer_that_does_not_exist(self, module):
        with pytest.raises(InputError, match="There is no layer 6: storyteller has 6 of them, 0 to 5"):
            module.run(module.Params(layer=6), LocalJob())

    def test_too_much_text(self):
        with pytest.raises(InputError, match=f"the lab shows up to {_router.MAX_TOKENS}"):
            read(text="one two three " * 200)

    def test_hidden_states_that_are_no_numbers_are_named(self, monkeypatch):
        real = _router.read

        def broken(params, job):
            reading = real(params, job)
            reading.x[2, 3] = float("nan")
            return reading

        monkeypatch.setattr(_router, "read", broken)
        with pytest.raises(InputError, match=r"given 1 of 188 tokens that are not finite"):
            read()

    def test_a_cancelled_run_stops(self):
        job = LocalJob()
        job.cancelled = True
        with pytest.raises(JobCancelledError):
            router_text.run(router_text.Params(), job)


class TestToken:
    @pytest.mark.parametrize("values", SETTINGS)
    @pytest.mark.parametrize("position", [0, 60])
    def test_the_way_ends_where_the_text_says(self, values, position):
        way, text = follow(**values, position=position), read(**values)
        assert way.token == text.tokens[position]
        chosen = [expert for expert in text.experts[position] if expert >= 0]
        assert sorted(way.chosen) == sorted(chosen)
        np.testing.assert_allclose(way.stages[-1].values, text.gates[position], atol=1e-6)
        assert way.refused == tuple(np.flatnonzero(text.dropped[position])) or values["kind"] == "expert choice"
        for stage in way.stages:
            assert stage.values.shape == (8,)
            assert stage.note.endswith(".")
        pickle.loads(pickle.dumps(way))

    def test_the_stages_are_those_of_the_kind(self):
        names = {kind: [stage.name for stage in follow(kind=kind).stages] for kind in KINDS}
        assert names == {
            "softmax": ["logits", "scores", "bias", "choice", "gates"],
            "sigmoid": ["logits", "scores", "bias", "choice", "gates"],
            "noisy": ["logits", "noise", "scores", "bias", "choice", "gates"],
            "expert choice": ["logits", "scores", "rank", "choice", "gates"],
            "random": ["logits", "choice", "gates"],
        }

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
    def test_every_stage_follows_from_those_before(self, kind):
        for position in (0, 17, 90):
            way = follow(kind=kind, position=position, tilted=2, tilt=0.4)
            logits, scores, biased, choice, gates = (stage.values for stage in way.stages)
            expected = 1 / (1 + np.exp(-logits)) if kind == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            base = scores if kind == "sigmoid" else logits
            np.testing.assert_allclose(biased - base, 0.4 * (np.arange(8) == 2), atol=1e-12)
            winners = np.argsort(-biased)[:2]
            assert set(np.flatnonzero(~np.isnan(choice))) == set(winners) == set(way.chosen)
            np.testing.assert_allclose(gates[winners], scores[winners] / scores[winners].sum(), atol=1e-5)

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
    @pytest.mark.parametrize("top_k", [2, 5, 8])
    def test_the_note_of_the_gates_shows_what_is_divided(self, kind, top_k):
        for position, factor in ((0, None), (17, 0.5), (187, 1.0)):
            way = follow(kind=kind, top_k=top_k, position=position, capacity_factor=factor)
            what = "score" if kind == "sigmoid" else "probability"
            assert what in way.stages[-1].formula
            if not way.chosen:
                continue
            part, whole, gate = map(
                float, re.search(rf"{what} (.*) ÷ (\S+) .*= (\d\.\d\d)", way.stages[-1].note).groups()
            )
            assert part / whole == pytest.approx(gate, abs=0.006)
            assert gate == round(way.gates[0], 2)
            assert f"gate {gate:.2f}" in way.sentence

    def test_the_margin_is_that_of_the_numbers_on_the_bars(self):
        for position in range(0, 188, 9):
            choice = follow(position=position).stages[3]
            bars = np.round(follow(position=position).stages[2].values, 2)
            least = bars[~np.isnan(choice.values)].min()
            margin = least - bars[np.isnan(choice.values)].max()
            told = f"lower by {margin:.2f}" if round(margin, 2) else "lower by less than 0.01"
            assert told in choice.note

    def test_a_bias_moves_the_choice_and_never_the_gates_of_who_stays(self):
        plain, pushed = follow(top_k=1, tilted=1), follow(top_k=1, tilted=1, tilt=5.0)
        assert plain.chosen != (1,)
        assert pushed.chosen == (1,)
        assert pushed.gates[0] == pytest.approx(plain.stages[1].values[1])
        assert f"expert 1 instead of expert {plain.chosen[0]}" in pushed.stages[2].note

    def test_kinds_without_a_bias_say_so(self):
        for kind in ("random", "expert choice"):
            assert f"{kind} routing has none" in follow(kind=kind, tilt=1.0).sentence

    def test_a_token_that_nobody_takes(self):
        way = follow(capacity_factor=0.01)
        assert way.chosen == way.gates == ()
        assert len(way.refused) == 2
        assert "had no room left. What the layer adds to it is exactly 0" in way.sentence

    def test_all_experts_and_one_expert(self):
        assert "All experts are chosen" in follow(experts=3, top_k=3, kind="softmax").stages[3].note
        assert "There is one expert" in follow(experts=1, top_k=1).sentence

    def test_a_token_that_does_not_exist(self):
        with pytest.raises(InputError, match=r"no token 9: the text has \d+ of them"):
            follow(text="Tom ran", position=9)


class TestChecks:
    @pytest.mark.parametrize("values", SETTINGS)
    @pytest.mark.parametrize("seed", [0, 1])
    def test_all_properties_hold(self, values, seed):
        found = router_tests.run(router_tests.Params(**values, seed=seed), LocalJob())
        assert [check.name for check in found.checks if not check.passed] == []
        assert len(found.checks) >= 8

    @pytest.mark.parametrize("values", [{"text": "a"}, {"experts": 1, "top_k": 1}, {"capacity_factor": 0.01}])
    def test_they_hold_at_the_edges(self, values):
        found = router_tests.run(router_tests.Params(**values), LocalJob())
        assert all(check.passed for check in found.checks)

    def test_a_bias_that_weighs_is_found(self, monkeypatch):
        right = ExpertRouter.select

        def wrong(router, logits):
            indices, scores = right(router, logits)
            return indices, scores + router.selection_bias

        monkeypatch.setattr(ExpertRouter, "select", wrong)
        found = router_tests.run(router_tests.Params(), LocalJob())
        assert "The bias never weighs" in [check.name for check in found.checks if not check.passed]

    def test_a_choice_of_the_least_probable_is_found(self, monkeypatch):
        right = ExpertRouter.select
        monkeypatch.setattr(ExpertRouter, "select", lambda router, logits: (right(router, -logits)[0], logits))
        found = router_tests.run(router_tests.Params(), LocalJob())
        assert "The K most probable" in [check.name for check in found.checks if not check.passed]


class TestCost:
    @pytest.mark.parametrize("direction", ["forward", "forward and backward"])
    def test_every_size_is_measured_and_shown(self, direction):
        shown, reports = [], []
        found = router_cost.run(
            router_cost.Params(**SMALL, direction=direction), LocalJob("cpu", reports.append, shown.append)
        )
        assert len(found.points) == found.total == 18
        assert [len(draft.points) for draft in shown] == list(range(1, 19))
        assert [report.step for report in reports] == list(range(19))
        for point in found.points:
            assert 0 < point.low_ms <= point.median_ms <= point.high_ms
            assert point.tflops == pytest.approx(point.flops / point.median_ms / 1e9)
            longer = max(point.flops / found.peak_flops, point.nbytes / found.bandwidth)
            assert point.predicted_ms == pytest.approx(1e3 * longer)
        assert found.ended == "finished"
        assert re.match(r"At 64 tokens the mixture of 8 experts takes [\d.]+ ms \([\d.]+ to [\d.]+\)\.", found.sentence)
        weigh(found)

    def test_flops_are_what_pytorch_counts(self):
        params = router_cost.Params(**SMALL)
        for size in params.sizes():
            layer, x = router_cost._make(params, size), torch.randn(size.tokens, params.d_model)
            assert sum(parameter.numel() for parameter in layer.parameters()) == params.cost(size).parameters
            if size.layer != "mixture":  # grouped products are not counted
                with FlopCounterMode(display=False) as counter:
                    layer(x)
                assert counter.get_total_flops() == params.cost(size).flops

    def test_a_cancelled_run_keeps_its_points(self):
        def on_progress(progress):
            job.cancelled = progress.step == 4

        job = LocalJob("cpu", on_progress)
        found = router_cost.run(router_cost.Params(**SMALL), job)
        assert len(found.points) == 4
        assert (found.ended, found.ending) == ("cancelled", "Cancelled after 4 of 18 points, which are shown.")


def test_results_reach_a_process_without_torch():
    results = [read(), follow(), router_tests.run(router_tests.Params(), LocalJob())]
    code = "import sys, pickle; pickle.load(sys.stdin.buffer); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], input=pickle.dumps(results), check=False).returncode == 0
