"""The router lab without torch: parameters, what is said of them, and the arithmetic on who gets what."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import InputError
from engine.experiments import _router, _router_languages, parse, router_collapse, router_cost, router_text
from engine.experiments._router_sources import (
    count_pairs,
    describe_information,
    entropy,
    find_typical,
    list_experts,
    mutual_information,
    specialise,
)
from engine.moe.kinds import KINDS
from engine.moe.statistics import load_from_counts

NAMES = ("token", "text", "collapse", "cost", "tests")


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_allowed_and_every_knob_is_explained(name):
    params = parse(f"router_{name}", {})
    assert params.memory_bytes() >= 0
    for field, info in type(params).model_fields.items():
        assert info.title, field
        assert info.description.endswith("."), field


def test_the_web_process_needs_no_torch_for_them():
    code = "import sys; from engine.experiments import parse\n"
    code += "".join(f"parse('router_{name}', {{}}).memory_bytes()\n" for name in NAMES)
    assert (
        subprocess.run([sys.executable, "-c", f"{code}sys.exit('torch' in sys.modules)"], check=False).returncode == 0
    )


def test_every_kind_of_routing_can_be_chosen():
    for kind in KINDS:
        assert parse("router_text", {"kind": kind}).kind == kind


@pytest.mark.parametrize("name", NAMES)
def test_more_experts_a_token_than_there_are_is_refused(name):
    with pytest.raises(InputError, match="take 5 experts of 4: choose at most 4"):
        parse(f"router_{name}", {"experts": 4, "top_k": 5})
    assert parse(f"router_{name}", {"experts": 1, "top_k": 1}).experts == 1


@pytest.mark.parametrize("text", ["", "  \n\n \t"])
@pytest.mark.parametrize("name", ["token", "text", "tests"])
def test_an_empty_text_is_refused(name, text):
    with pytest.raises(InputError, match="text is empty"):
        parse(f"router_{name}", {"text": text})


def test_a_bias_on_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="no expert 4 to bias: there are 4, 0 to 3"):
        parse("router_token", {"experts": 4, "tilted": 4})


def test_a_blank_line_begins_a_source():
    assert _router.split_sources("a b\nc\n\n\n d\n  \ne\n") == ["a b\nc", " d", "e"]
    assert len(_router.split_sources(_router.DEFAULT_TEXT)) == 4


def test_the_languages_are_the_same_on_every_call_and_what_they_claim():
    texts = _router_languages.write()
    assert texts == _router_languages.write()
    stories, backwards, sums, brackets, code = texts
    assert len(texts) == len(_router_languages.NAMES)
    assert min(map(len, texts)) > 50_000
    forwards = {word[::-1] for word in backwards.split()}
    assert len(forwards & set(stories.split())) > 500
    for line in sums.splitlines()[:200]:
        left, right = line.split(" = ")
        a, sign, b = left.split()
        assert int(right) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
    unclosed = []
    for sign in brackets:
        if sign in "([{<":
            unclosed.append(sign)
        else:
            assert unclosed.pop() + sign in ("()", "[]", "{}", "<>")
    compile(code, "code", "exec")


class TestInformation:
    def test_a_perfect_match_says_all_there_is(self):
        assert mutual_information(np.diag([5, 5, 5, 5])) == pytest.approx(math.log(4))

    def test_independent_tables_say_nothing(self):
        assert mutual_information(np.outer([1, 2, 3], [4, 5, 6])) == pytest.approx(0, abs=1e-12)
        assert mutual_information(np.zeros((2, 3), int)) == 0

    @pytest.mark.parametrize("seed", range(3))
    def test_it_follows_the_definition(self, seed):
        counts = np.random.default_rng(seed).integers(0, 9, (3, 5))
        joint = counts / counts.sum()
        rows, columns = joint.sum(1), joint.sum(0)
        expected = sum(
            joint[i, j] * math.log(joint[i, j] / (rows[i] * columns[j]))
            for i, j in np.ndindex(joint.shape)
            if joint[i, j]
        )
        assert mutual_information(counts) == pytest.approx(expected)

    @pytest.mark.parametrize("seed", range(5))
    def test_chance_is_taken_off(self, seed):
        generator = np.random.default_rng(seed)
        sources, tokens = generator.integers(0, 4, 200), np.arange(200)
        by_lot = specialise(sources, tokens, generator.integers(0, 16, 200), 4, 16)
        assert by_lot.raw > 0.07  # few tokens, many experts: it looks like something
        assert by_lot.excess < by_lot.raw / 2
        told = specialise(sources, tokens, sources, 4, 16)
        assert told.raw == pytest.approx(told.available)
        assert told.excess > 0.8 * told.raw

    def test_chance_keeps_the_assignments_of_a_token_together(self):
        sources, tokens, experts = np.arange(60) % 4, np.repeat(np.arange(60), 8), np.tile(np.arange(8), 60)
        everywhere = specialise(sources, tokens, experts, 4, 8)  # to all experts, whatever source a token is given
        assert everywhere.raw == everywhere.chance == pytest.approx(0, abs=1e-12)

    def test_what_is_said_holds_at_the_edges(self):
        none = specialise(np.zeros(4, int), np.zeros(0, int), np.zeros(0, int), 2, 3)
        assert "No token reaches" in describe_information(none, 2, 3)
        assert "one expert" in describe_information(none, 2, 1)
        assert "one source" in describe_information(none, 1, 3)
        same = specialise(np.array([0, 1] * 20), np.arange(40), np.zeros(40, int), 2, 3)
        assert "no more about its source than chance" in describe_information(same, 2, 3)

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_told_adds_up_as_it_is_told(self, seed):
        generator = np.random.default_rng(seed)
        sources = generator.integers(0, 4, 300)
        experts = np.where(generator.random(300) < 0.5, sources, generator.integers(0, 8, 300))
        said = describe_information(specialise(sources, np.arange(300), experts, 4, 8), 4, 8)
        beyond, counted, shuffled = map(float, re.findall(r"(\d\.\d\d)(?= nats about| as counted| with)", said))
        assert beyond == pytest.approx(counted - shuffled)

    def test_entropy_of_certainty_is_zero(self):
        assert entropy(np.array([7, 0])) == 0
        assert math.copysign(1, entropy(np.array([7, 0]))) == 1


LABELS = ["the", "the", "the", "the", "7", "7", "7", "("]
SOURCE = np.array([0, 0, 0, 0, 1, 1, 1, 1])


class TestTypical:
    def test_tokens_that_an_expert_gets_more_often_than_its_load(self):
        found = find_typical(LABELS, SOURCE, np.arange(8), np.array([0, 0, 0, 1, 1, 1, 1, 1]), 3)
        assert [one.label for one in found[0].tokens] == ["the"]
        assert found[0].tokens[0][1:] == (3, 0.75)
        assert (found[0].source, found[0].purity) == (0, 1.0)
        assert [one.label for one in found[1].tokens] == ["7"]  # the bracket is there once, which is typical of nothing
        assert (found[1].source, found[1].purity) == (1, 0.8)
        assert sum(one.load for one in found) == pytest.approx(1)

    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_a_token_that_always_goes_to_an_expert_has_a_share_of_one_whatever_k_is(self, top_k):
        tokens = np.repeat(np.arange(8), top_k)
        experts = np.where(np.repeat(SOURCE, top_k), 3, 0) + np.tile(np.arange(top_k), 8)
        for one in find_typical(LABELS, SOURCE, tokens, experts, 6):
            assert all(token.share == 1 for token in one.tokens)
            assert bool(one.tokens) == (one.expert % 3 < top_k)

    def test_a_token_of_which_an_expert_gets_less_than_a_fair_share_is_not_typical_of_it(self):
        labels, source = ["the"] * 20 + ["7"] * 20, np.repeat([0, 1], 20)
        for few, typical in ((2, False), (8, True)):  # of 20; a fair share of three experts is a third
            experts = np.repeat([0, 2, 1], [20 - few, few, 20])
            found = find_typical(labels, source, np.arange(40), experts, 3)[2]
            assert found.purity == 1
            assert bool(found.tokens) == typical

    def test_an_expert_without_tokens_has_none(self):
        dead = find_typical(LABELS, SOURCE, np.arange(8), np.zeros(8, int), 2)[1]
        assert (dead.load, dead.source, dead.purity, dead.tokens) == (0, -1, 0, ())

    def test_an_expert_that_gets_everything_has_nothing_typical(self):
        assert find_typical(LABELS, SOURCE, np.arange(8), np.zeros(8, int), 2)[0].tokens == ()


def test_experts_are_listed():
    assert list_experts((3,)) == "expert 3"
    assert list_experts((1, 4)) == "experts 1 and 4"
    assert list_experts((0, 2, 5)) == "experts 0, 2 and 5"
    assert list_experts(tuple(range(9))) == "experts 0, 1, 2, 3 and 5 more"


def test_pairs_are_counted():
    assert count_pairs(np.array([0, 1, 1]), np.array([2, 0, 0]), 2, 3).tolist() == [[0, 0, 1], [2, 0, 0]]


class TestLoadSentence:
    def say(self, counts, wanted=None, left_out=0, capacity=None, **settings):
        return router_text.describe_load(load_from_counts(counts, wanted), left_out, capacity, **settings)

    def test_a_tie_names_all(self):
        assert self.say([4, 4, 1]).startswith("Experts 0 and 1 are wanted by 4 tokens each, 1.33 times the fair share")

    def test_fair_is_fair(self):
        assert self.say([2, 2]) == "Every expert gets exactly its fair share, 2 tokens."

    def test_the_dead_are_named(self):
        assert self.say([5, 0, 0]).endswith("experts 1 and 2 by none.")
        assert self.say([5, 1, 0]).endswith("expert 2 by none.")

    def test_one_expert_has_no_competition(self):
        assert self.say([5]) == "There is one expert, which gets 5 tokens: there is nothing to choose."

    def test_everything_refused(self):
        assert "all 9 choices are refused" in self.say([0, 0], [4, 5], 9, 0)

    def test_refusals_are_counted(self):
        said = self.say([2, 2], [5, 3], 1, 2)
        assert "4 of 8 choices (50%) are refused, as an expert takes at most 2 tokens: it serves first choices" in said
        assert "1 token is computed by no expert" in said
        assert said.startswith("Expert 0 is wanted by 5 tokens, 1.25 times the fair share (MaxVio 0.25).")
        assert "nothing is refused" in self.say([2, 1], capacity=4)

    def test_expert_choice_leaves_tokens_over(self):
        assert "3 tokens are left over" in self.say([2, 2], [3, 4], 3, 2, expert_choice=True)
        assert "1 token is left over: no expert chose it" in self.say([2, 2], [3, 2], 1, 2, expert_choice=True)
        assert "Every token has" in self.say([2, 2], None, 0, 2, expert_choice=True)


class TestBalanceSentence:
    def say(self, *rows, trained=math.nan):
        rows = np.array(rows, float)
        return router_collapse.describe_balance(np.arange(len(rows)) * 10, rows, np.array([trained] * len(rows)))

    def test_before_the_first_step(self):
        said = self.say([1.5, 0.5])
        assert said.startswith("Before the first step expert 0 gets 1.50 times")
        assert "trained on" not in said

    def test_dead_and_short_experts_are_counted(self):
        said = self.say([1, 1, 1, 1], [0, 0.05, 0, 3.95], trained=2.5)
        assert "After 10 steps expert 3 gets 3.95 times" in said
        assert "(MaxVio 2.95); of the tokens trained on in the last 10 steps MaxVio is 2.50;" in said
        assert "2 of 4 experts get no token at all; 1 gets some" in said

    def test_ties_and_one_expert(self):
        assert "every expert gets exactly its fair share" in self.say([1, 1, 1])
        assert "experts 0 and 1 get 1.50 times the fair share each" in self.say([1.5, 1.5, 0])
        assert "nothing to balance" in self.say([1])

    def test_the_course_is_counted_from_the_run(self):
        params, fair = router_collapse.Params(experts=4), np.ones((3, 4))
        steps, rows = np.array([0, 10, 20]), np.array([[1, 1, 1, 1], [0, 0, 2, 2], [0, 0.5, 2, 1.5]])
        spread = np.array([9.0, 3.0, 4.0])
        said = router_collapse.describe_course(steps, rows, spread, params)
        assert (
            "0 of 4 experts got less than a tenth of a fair share before the first step, 2 after 10 and 1 after 20"
            in said
        )
        assert "Of 2 that went short at some checkup 1 has a tenth or more after 20" in said
        assert "of 2 without any token at some checkup 1 has some again." in said
        cured = router_collapse.describe_course(steps, np.vstack([rows[:2], fair[:1]]), spread, params)
        assert "Of 2 that went short at some checkup 2 have a tenth or more after 20" in cured
        assert "over 9.0 directions before the first step, over 3.0 after 10" in said
        assert "over 3.0 after 10 and over 4.0 after 20" in said
        assert "no expert goes short at the end" in cured
        assert "no expert goes short at the end" not in said
        assert "did not learn" not in said
        assert not any(word in said for word in ("so that", "because", "alone"))  # one run shows no cause
        assert "alike" not in router_collapse.describe_course(steps, rows, np.ones(3), params)
        frozen = params.model_copy(update={"freeze_router": True})
        assert router_collapse.describe_course(steps, rows, spread, frozen).endswith("did not learn in this run.")
        pushed = frozen.model_copy(update={"balancing": "loss-free bias"})
        assert router_collapse.describe_course(steps, rows, spread, pushed).endswith("only its bias moved.")
        assert "At no checkup" in router_collapse.describe_course(steps, fair, spread, params)
        assert router_collapse.describe_course(steps[:1], rows[:1], spread[:1], params) == ""
        assert router_collapse.describe_course(steps, fair[:, :1], spread, router_collapse.Params(experts=1)) == ""


class TestCostSentence:
    def say(self, mixture, dense):
        """Of a mixture and of two dense layers, each with its lowest and its highest time."""
        layers = (("mixture", mixture), ("equal parameters", dense), ("equal work", dense))
        points = tuple(
            router_cost.Point(
                axis="tokens", layer=layer, tokens=64, experts=8, parameters=1, flops=1, nbytes=1,
                median_ms=sum(ends) / 2, low_ms=ends[0], high_ms=ends[1], runs=9, predicted_ms=1.0, tflops=1.0,
            )
            for layer, ends in layers
        )  # fmt: skip
        return router_cost.describe_points(points, router_cost.Params(experts=8))

    @pytest.mark.parametrize("dense", [(1, 3), (5, 9), (3, 5), (1, 9), (4, 4)])
    def test_spreads_that_meet_show_no_difference(self, dense):
        said = self.say((3, 5), dense)
        assert said.count("the spreads overlap, so these runs show no difference") == 2
        assert "times as long" not in said

    def test_those_that_do_not_are_compared_whichever_takes_longer(self):
        slower, faster = self.say((3, 5), (6, 10)), self.say((3, 5), (1, 2))
        assert "overlap" not in slower + faster
        assert slower.count("takes 8 ms (6 to 10), 2 times as long") == 2
        assert faster.count("takes 1.5 ms (1 to 2), the mixture 2.7 times as long") == 2

    def test_spreads_stand_beside_the_times_and_equal_work_is_called_equal(self):
        said = self.say((3, 5), (6, 10))
        assert "takes 4 ms (3 to 5)" in said
        assert said.count("the dense layer computes as much") == 2
        assert "1 times" not in said


class TestCost:
    def test_all_three_layers_at_every_size(self):
        sizes = list(router_cost.Params(tokens=64, most_experts=8).sizes())
        assert {size.layer for size in sizes} == set(router_cost.LABELS)
        assert [size.tokens for size in sizes if (size.axis, size.layer) == ("tokens", "mixture")] == [16, 32, 64]
        assert [size.experts for size in sizes if (size.axis, size.layer) == ("experts", "mixture")] == [2, 4, 8]

    def test_the_dense_layers_are_equal_to_the_mixture(self):
        params = router_cost.Params(experts=8, top_k=2)
        for size in params.sizes():
            mixture, dense = (params.cost(size._replace(layer=layer)) for layer in ("mixture", size.layer))
            if size.layer == "equal parameters":
                assert dense.parameters == pytest.approx(mixture.parameters, rel=0.01)
            if size.layer == "equal work":
                assert dense.flops == pytest.approx(mixture.flops, rel=0.01)

    @pytest.mark.parametrize(
        ("low", "high", "touching"), [(1, 2, False), (1, 3, True), (4, 4.5, True), (5, 9, True), (5.1, 9, False)]
    )
    def test_spreads_overlap_from_either_side(self, low, high, touching):
        one, other = SimpleNamespace(low_ms=3, high_ms=5), SimpleNamespace(low_ms=low, high_ms=high)
        assert router_cost.overlap(one, other) == router_cost.overlap(other, one) == touching

    def test_fewer_experts_at_most_than_there_are_is_refused(self):
        with pytest.raises(InputError, match="Most experts is 4, fewer than the 8 experts"):
            parse("router_cost", {"experts": 8, "most_experts": 4})

    def test_more_of_anything_takes_more_memory(self):
        small = router_cost.Params().memory_bytes()
        assert router_cost.Params(direction="forward and backward").memory_bytes() > 1.5 * small
        assert router_cost.Params(dtype="bfloat16").memory_bytes() == pytest.approx(small / 2, rel=0.01)
