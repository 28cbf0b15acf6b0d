"""The router lab in Streamlit's own test harness, on the real runtime and with short trainings."""

import base64
import dataclasses
import json
import re

import numpy as np
import pytest

from engine.experiments import router_collapse, router_cost, router_text, router_token
from engine.experiments._router_recorded import recorded_layer
from engine.experiments._router_sources import Typical, TypicalToken
from engine.moe.statistics import load_from_counts
from engine.runtime.jobs import LocalJob
from tests.ui.lab_pages import finished, words
from ui.charts import router_training
from ui.charts.router_training import Course
from ui.labs import ROUTER
from ui.page import NOTHING_TO_SHOW
from ui.router import collapse, cost, learned, predict, recorded, text, way
from ui.router.settings import COLLAPSE, COST, LEARNED, TEXT, WAY, YOURS

SHORT = {"text": "The cat sat.\n\n1 + 2 = 3"}
BRIEF = {"collapse_steps": "20", "collapse_experts": "4"}
SMALL = {
    "cost_tokens": "32",
    "cost_experts": "2",
    "cost_top_k": "1",
    "cost_most_experts": "4",
    "cost_d_model": "32",
    "cost_ffn_dim": "32",
}


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens the lab, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda **query: open_page(ROUTER, query)


@pytest.fixture(scope="module")
def brief():
    """A short training."""
    return router_collapse.run(router_collapse.Params(steps=20, experts=4), LocalJob())


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


def drawn(app, key):
    return {trace.get("name"): trace for trace in spec(app, key)["data"]}


def numbers(values):
    """What a trace holds, whether Plotly sends it as a list or as Base64."""
    if isinstance(values, dict):
        found = np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
        return found.reshape([int(part) for part in values["shape"].split(",")]) if "shape" in values else found
    return np.array(values, dtype=float)


def show(app, view):
    app.button_group(key="router_view").set_value(view)
    return finished(app)


def open_tab(app, name):
    app.query_params["router_tab"] = name
    app.session_state["router_tab"] = name
    return finished(app)


def train(app):
    app.button(key="_router_train").click()
    return finished(app)


def coloured(app):
    """The text with its coloured tokens."""
    return next(element.proto.body for element in app.get("html") if "router-text" in element.proto.body)


class TestWay:
    def test_it_opens_with_the_bars_of_one_token_and_says_where_it_goes(self, lab):
        app = lab()
        found = router_token.run(router_token.Params(), LocalJob())
        for trace, step in zip(spec(app, "router_way")["data"], found.stages, strict=True):
            np.testing.assert_allclose(numbers(trace["y"]), step.values)
        assert found.sentence in words(app)
        assert f":primary-badge[{found.token}]" in words(app)
        assert found.sentence in app.get_by_key("router_way").proto.alt

    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [
            ("number_input", "position", 20),
            ("slider", "experts", 5),
            ("slider", "top_k", 3),
            ("selectbox", "kind", "sigmoid"),
            ("selectbox", "kind", "expert choice"),
            ("selectbox", "kind", "random"),
            ("slider", "tilt", 3.0),
            ("button_group", "router", "clustered"),
            ("number_input", "layer", 1),
            ("number_input", "seed", 5),
            ("text_area", "text", "Once upon a time"),
        ],
    )
    def test_every_control_changes_the_way(self, lab, kind, key, value):
        app = lab()
        before = spec(app, "router_way")["data"]
        getattr(app, kind)(key=f"router_{key}").set_value(value)
        assert spec(finished(app), "router_way")["data"] != before

    def test_noise_has_a_control_where_there_is_noise(self, lab):
        app = lab(kind="noisy")
        before = spec(app, "router_way")["data"]
        app.slider(key="router_noise").set_value(3.0)
        assert spec(finished(app), "router_way")["data"] != before
        app.selectbox(key="router_kind").set_value("softmax")
        finished(app)
        assert not [slider for slider in app.slider if slider.key == "router_noise"]
        app.selectbox(key="router_kind").set_value("noisy")
        finished(app)
        assert app.slider(key="router_noise").value == 3.0

    def test_there_are_as_many_tokens_to_choose_as_the_text_has(self, lab):
        app = lab(**SHORT)
        found = app.session_state["_run_router_way_run"].result
        assert finished(app).number_input(key="router_position").max == len(found.tokens) - 1

    def test_a_refused_token_is_told(self, lab):
        said = words(lab(capacity_factor="0.01"))
        assert "no room left" in said.lower() or "had no room" in said

    def test_kinds_are_explained_without_their_sources(self):
        said = way.kind_sentence("expert choice")
        assert said == "Expert choice routing. Each expert takes its C most probable tokens."


class TestText:
    def test_tokens_load_and_map_are_those_of_the_experiment(self, lab):
        app = lab(view=TEXT, **SHORT)
        found = router_text.run(router_text.Params(**SHORT), LocalJob())
        assert coloured(app).count("class='token'") == len(found.tokens)
        np.testing.assert_array_equal(numbers(drawn(app, "router_load")["computed"]["y"]), found.load.load)
        np.testing.assert_allclose(numbers(spec(app, "router_map")["data"][0]["z"]), 8 * found.probs.T)
        assert "probability ÷ the fair share 1/8, up to the largest shown" in words(app)
        assert "sigmoid" not in words(app)
        assert found.sentence in words(app)
        assert found.router_sentence in words(app)

    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [
            ("slider", "experts", 3),
            ("slider", "top_k", 1),
            ("selectbox", "kind", "random"),
            ("number_input", "capacity_factor", 0.5),
            ("button_group", "router", "clustered"),
            ("slider", "tilt", 0.5),
        ],
    )
    def test_every_control_changes_the_load(self, lab, kind, key, value):
        app = lab(view=TEXT)
        before = spec(app, "router_load")["data"]
        getattr(app, kind)(key=f"router_{key}").set_value(value)
        assert spec(finished(app), "router_load")["data"] != before

    def test_dropped_tokens_are_struck_out_and_counted(self, lab):
        app = lab(view=TEXT, capacity_factor="0.4")
        found = app.session_state["_run_router_text_run"].result
        assert found.left_out.any()
        assert coloured(app).count("<s>") == found.left_out.sum()
        assert f"Struck out: {found.left_out.sum()} tokens" in words(app)
        refused = numbers(drawn(app, "router_load")["refused: no room left"]["y"])
        np.testing.assert_array_equal(refused, found.load.wanted - found.load.load)
        assert "it serves first choices before second ones, and earlier tokens before later ones" in words(app)

    def test_first_choices_are_served_first_and_then_earlier_tokens(self):
        found = router_text.run(router_text.Params(capacity_factor=0.4), LocalJob())
        free = router_text.run(router_text.Params(), LocalJob())
        for expert in range(8):
            wishes = [(rank, place) for place, own in enumerate(free.experts) for rank in np.flatnonzero(own == expert)]
            served = [place for _, place in sorted(wishes)[: found.capacity]]
            assert sorted(served) == np.flatnonzero(found.gates[:, expert]).tolist()

    def test_a_bias_sends_an_expert_more_tokens_and_leaves_probabilities_alone(self):
        plain, biased = (router_text.run(router_text.Params(tilted=6, tilt=tilt), LocalJob()) for tilt in (0, 2))
        assert biased.load.wanted[6] > plain.load.wanted[6]
        np.testing.assert_array_equal(biased.probs, plain.probs)

    def test_what_sigmoids_probabilities_are_is_said(self, lab):
        said = words(lab(view=TEXT, kind="sigmoid", **SHORT))
        assert "Of sigmoid routing it is a score divided by the sum of the token's scores." in said
        assert "that of the scores divided by their sum" in words(lab(kind="sigmoid", **SHORT))
        assert "scores" not in way.entropy_sentence(1.0, "softmax")

    def test_a_source_that_is_not_there_is_said_and_a_shorter_text_forgets_its_own(self, lab):
        app = lab(view=TEXT, source="9", **SHORT)
        assert "The link sets router_source to “9”, but it must be one of all, 1, 2. all is used instead." in words(app)
        app.selectbox(key="router_source").set_value("2")
        assert "The link sets" not in words(finished(app))

    def test_a_capacity_that_drops_almost_everything_is_told(self, lab):
        app = lab(view=TEXT, capacity_factor="0.01", **SHORT)
        assert not app.exception
        assert "refused" in words(app)

    def test_of_nothing_there_are_no_figures(self):
        found = router_text.run(router_text.Params(**SHORT), LocalJob())
        load = dataclasses.replace(
            load_from_counts([0, 0]), relative=np.full(2, np.nan), entropy=np.nan, entropy_share=np.nan,
            max_violation=np.nan, dropped_share=np.nan,
        )  # fmt: skip
        told = text.totals(dataclasses.replace(found, load=load))
        assert {value for _, value, _ in told} == {"–"}
        assert "nan" not in str(told)
        told = text.totals(dataclasses.replace(found, load=load_from_counts([3, 1])))
        assert [value for _, value, _ in told] == ["1.50 × fair", "0.56 nats", "0 of 2", "0%"]

    @pytest.mark.parametrize("factor", ["0.01", "0.8", ""])
    def test_there_is_one_fair_share_whatever_capacity_refuses(self, lab, factor):
        app = lab(view=TEXT, capacity_factor=factor)
        found = app.session_state["_run_router_text_run"].result
        fair = 2 * len(found.tokens) / 8
        np.testing.assert_allclose(drawn(app, "router_load")[f"fair share N·K/E, {fair:g} tokens"]["y"], fair)
        tiles = {metric.label: metric.value for metric in app.metric}
        assert tiles["Most wanted expert"] == f"{found.load.wanted.max() / fair:.2f} × fair"
        assert found.load.wanted.max() > 1.3 * fair
        assert ("dead: no token" in drawn(app, "router_load")) == (tiles["Wanted by no token"] != "0 of 8")

    def test_where_experts_choose_the_load_is_what_is_shared(self):
        load = load_from_counts([3, 3], [5, 3], experts_choose=True)
        assert text.fair_share(load, experts_choose=True) == (3.0, "mean load")
        assert text.fair_share(load, experts_choose=False)[0] == 4.0

    def test_one_source_is_looked_at_closely(self, lab):
        app = lab(view=TEXT, **SHORT)
        app.selectbox(key="router_source").set_value("2")
        finished(app)
        found = app.session_state["_run_router_text_run"].result
        own = found.probs[found.token_source == 1]
        np.testing.assert_allclose(numbers(spec(app, "router_map")["data"][0]["z"]), own.shape[1] * own.T)
        assert app.query_params["router_source"] == "2"
        linked = lab(view=TEXT, source="2", **SHORT)
        assert spec(linked, "router_map")["data"] == spec(app, "router_map")["data"]
        assert linked.selectbox(key="router_source").value == "2"
        app.text_area(key="router_text").set_value("One source")
        assert not finished(app).exception

    def test_settings_are_shared_with_the_way_and_kept_while_another_view_is_open(self, lab):
        app = lab(view=TEXT, **SHORT)
        app.slider(key="router_experts").set_value(5)
        finished(app)
        app = show(show(app, COST), WAY)
        assert app.slider(key="router_experts").value == 5
        assert app.text_area(key="router_text").value == SHORT["text"]

    def test_the_surest_and_the_most_doubtful_token_are_named(self):
        found = router_text.run(router_text.Params(**SHORT), LocalJob())
        probs = np.full((len(found.tokens), 2), 0.5)
        probs[1], probs[2] = (0.1, 0.9), (0.6, 0.4)
        said = text.map_sentence(dataclasses.replace(found, probs=probs), slice(0, 3))
        assert f"surest at “{found.tokens[1]}”, of which expert 1 gets 90%" in said
        assert f"most at “{found.tokens[0]}”, where no expert gets more than 50%" in said
        even = dataclasses.replace(found, probs=np.full_like(probs, 0.5))
        assert "prefers no expert" in text.map_sentence(even, slice(0, 3))


class TestCollapse:
    def test_nothing_is_trained_unasked(self, lab):
        app = lab(view=COLLAPSE)
        assert "Nothing is trained yet" in words(app)
        assert "What can feed a collapse" in words(app)
        assert not app.progress

    def test_a_training_is_drawn_pinned_and_compared(self, lab):
        app = train(lab(view=COLLAPSE, **BRIEF))
        found = app.session_state["_run_router_run"].result
        heat = spec(app, "router_load_map")["data"][0]
        np.testing.assert_array_equal(numbers(heat["customdata"]), found.relative.T)
        assert found.sentence in words(app)
        assert found.course in words(app)
        app.button(key="_router_pin_set").click()
        finished(app)
        assert "A and B are the same" in words(app)
        app.selectbox(key="router_collapse_balancing").set_value("loss-free bias")
        finished(app)
        assert "had other settings" in words(app)
        assert "A and B are the same" not in words(app)
        assert "B is not trained with these settings yet" in words(app)
        train(app)
        assert "is not trained with these" not in words(app)
        assert "balancing none · B: balancing loss-free bias" in words(app)
        second = app.session_state["_run_router_run"].result
        for key, result in (("router_load_mapA", found), ("router_load_mapB", second)):
            np.testing.assert_array_equal(
                numbers(spec(app, key)["data"][0]["customdata"]), result.relative.T, err_msg=key
            )
        assert {"A: no balancing", "B: loss-free bias, rate 0.03"} <= set(drawn(app, "router_loss"))
        assert np.array(second.bias).any()
        told = collapse.trade([("A", found, None), ("B", second, None)])
        assert told in words(app)
        assert f"seen in the view “{LEARNED}”" in words(app)
        show(app, LEARNED)
        assert told in words(app)
        assert "seen in the view" not in words(app)
        for side, result in (("B", second), ("A", found)):
            app.button_group(key="router_learned_run").set_value(side)
            finished(app)
            counts = numbers(spec(app, "router_by_source")["data"][0]["customdata"])
            np.testing.assert_array_equal(counts, result.counts, err_msg=side)
            assert result.learned in words(app)
        show(app, COLLAPSE)
        app.button(key="_router_pin_clear").click()
        finished(app)
        assert drawn(app, "router_load_map")

    def test_a_pinned_run_of_a_link_is_trained_when_asked_for(self, lab):
        app = lab(view=COLLAPSE, pin='{"steps":20,"experts":4,"seed":3}')
        assert "has not been trained in this session" in words(app)
        app.button(key="_router_train_pinned").click()
        finished(app)
        assert app.session_state["_run_router_pinned_run"].result_params.seed == 3
        assert spec(app, "router_load_mapA")
        assert "has not been trained" not in words(app)

    def test_a_pinned_run_that_is_nonsense_is_ignored(self, lab):
        app = lab(view=COLLAPSE, pin='{"top_k":9,"experts":4}')
        assert "The link's pinned run A is ignored" in words(app)
        assert "Nothing is trained yet" in words(app)

    def test_one_expert_has_nothing_to_balance(self, lab):
        app = train(lab(view=COLLAPSE, collapse_experts="1", collapse_steps="10"))
        assert "it gets every token, which is always its fair share, so all of the map has the colour" in words(app)
        assert spec(app, "router_load_map")

    def test_a_rate_that_is_too_high_leaves_a_sentence(self, lab):
        app = train(lab(view=COLLAPSE, **BRIEF, collapse_learning_rate="10"))
        assert not app.exception
        found = app.session_state["_run_router_run"].result
        assert found.ending in words(app)

    def test_sentences_tell_both_runs_apart(self, brief):
        params = router_collapse.Params(steps=20, experts=4)
        better = dataclasses.replace(brief, held_out_loss=brief.held_out_loss - 0.25)
        runs = [("A: one", brief, params), ("B: two", better, params)]
        assert "0.250 less" in collapse.loss_sentence(runs)
        assert "0.250 more" in collapse.loss_sentence(runs[::-1])
        assert "the same" in collapse.loss_sentence([runs[0], runs[0]])
        shorter = dataclasses.replace(better, checked=better.checked[:-1], held_out_loss=better.held_out_loss[:-1])
        assert f"After step {shorter.checked[-1]} B pays" in collapse.loss_sentence([runs[0], ("B", shorter, params)])
        low, high = collapse.loss_range([brief, better])
        assert low < better.held_out_loss[-1] < brief.held_out_loss[-1] < high < brief.held_out_loss[0]
        assert len(collapse.table(brief)) == brief.relative.size

    def test_load_loss_and_what_experts_know_are_joined(self, brief):
        def ended(took, loss, told):
            relative, held_out, information = (
                brief.relative.copy(),
                brief.held_out_loss.copy(),
                brief.information.copy(),
            )
            relative[-1] = np.where(np.arange(4) < took, 4 / took, 0.05)
            held_out[-1], information[-1] = loss, told
            return dataclasses.replace(brief, relative=relative, held_out_loss=held_out, information=information)

        few, all_four = ended(1, 2.505, 1.31), ended(4, 2.486, 1.14)
        for runs in ([("A", few, None), ("B", all_four, None)], [("A", all_four, None), ("B", few, None)]):
            said = collapse.trade(runs)
            side = "A" if runs[0][1] is few else "B"
            assert f"in {side} 1 of 4 experts takes a tenth" in said
            assert f"So {side}, with 3 fewer experts at work, pays 0.019 nats more for a token" in said
            assert "its experts say 0.17 nats more about the source" in said
            assert "one seed; between two seeds alone losses differ by 0.02" in said
            assert not any(word in said for word in ("because", "therefore", "so that"))
        same = collapse.trade([("A", few, None), ("B", ended(1, 2.505, 1.4), None)])
        assert "So A, with as many experts at work, pays as much for a token" in same
        assert "say 0.09 nats less" in same
        alone = collapse.trade([("", few, None)])
        assert "1 of 4 experts takes" in alone
        assert "1.31 of 1.61 nats" in alone
        assert "So " not in alone

    def test_both_kinds_of_violation_are_told_by_name(self, brief):
        params = router_collapse.Params(steps=20, experts=4)
        since = brief.checked[-1] - brief.checked[-2]
        said = collapse.balance_sentence([("one", brief, params)])
        assert f"MaxVio {brief.max_violation[-1]:.2f} on held-out text" in said
        trained = f"{brief.trained_violation[-1]:.2f} on the tokens trained on in the last "
        assert trained + ("step" if since == 1 else f"{since} steps") in said

    def test_of_no_load_nothing_is_said_but_that(self, brief):
        gone = np.where(np.arange(len(brief.checked)) == len(brief.checked) - 1, np.nan, brief.max_violation)
        relative = np.where(np.isnan(gone)[:, None], np.nan, brief.relative)
        empty = dataclasses.replace(brief, max_violation=gone, relative=relative)
        params = router_collapse.Params(steps=20, experts=4)
        said = collapse.balance_sentence([("one", empty, params)])
        assert "One: no token goes to any expert" in said
        assert "nan" not in said
        assert predict.idle_experts(empty) == 4
        assert "no load" in router_collapse.describe_balance(empty.checked, relative, brief.trained_violation)
        assert router_collapse.describe_course(empty.checked, relative, brief.directions, params) == ""
        course = Course("one", empty.checked, empty.entropy, 1.4, gone, empty.trained_violation, empty.directions)
        assert np.isfinite(router_training.balance([course], 20).layout.yaxis2.range).all()

    def test_a_difference_is_put_beside_what_seeds_make(self, brief):
        params = router_collapse.Params(steps=20, experts=4)
        said = collapse.loss_sentence([("A: one", brief, params), ("B: two", brief, params)])
        assert f"seeds alone make {router_collapse.SEED_NOISE:g}" in said


class TestLearned:
    def test_it_asks_for_a_training_and_shows_what_came_of_it(self, lab):
        app = lab(view=LEARNED, **BRIEF)
        assert "Nothing is trained yet" in words(app)
        train(app)
        found = app.session_state["_run_router_run"].result
        assert found.learned in words(app)
        np.testing.assert_allclose(numbers(spec(app, "router_by_source")["data"][0]["customdata"]), found.counts)
        assert all(name in words(app) for name in found.sources)

    def test_a_text_needs_no_training(self, lab):
        app = lab(view=LEARNED, learned_from=YOURS, **SHORT)
        found = app.session_state["_run_router_text_run"].result
        assert found.information_sentence in words(app)
        assert found.router_sentence in words(app)
        assert learned.UNTRAINED in words(app)
        assert not [button for button in app.button if button.key == "_router_train"]

    def test_the_busiest_come_first_and_the_dead_share_a_row(self):
        typical = (
            Typical(0, 0.0, -1, 0.0, ()),
            Typical(1, 0.25, 0, 0.5, ()),
            Typical(2, 0.75, 1, 0.996, (TypicalToken("␣[a]", 3, 0.0004),)),
            Typical(3, 0.0, -1, 0.0, ()),
        )
        table = learned.typical_table(typical, ("code", "sums"))
        assert list(table["expert"]) == ["2", "1", "0, 3"]
        told = table.iloc[0].tolist()
        assert told[2] == "mostly “sums”, 100%"
        assert table.iloc[1].tolist()[2] == "most often “code”, 50%"
        assert "<\u00a01%" in told[3]
        assert r"␣\[a\]" in told[3]
        assert table.iloc[2].tolist()[3] == "dead: not one token"

    def test_the_purest_source_is_named(self):
        said = learned.source_sentence(np.array([[5, 5], [1, 9]]), ("code", "sums"))
        assert said == "“sums” keeps most to one expert: 90% of it goes to expert 1."
        assert "same expert" in learned.source_sentence(np.array([[5]]), ("code",))
        assert "No token" in learned.source_sentence(np.zeros((1, 2), int), ("code",))


class TestCost:
    def test_arithmetic_is_there_before_anything_runs(self, lab):
        app = lab(view=COST)
        params = router_cost.Params()
        lines = [line for _, panel in cost.forecast(params, "tokens") for line in panel]
        for trace, line in zip(spec(app, "router_forecast")["data"], lines, strict=True):
            assert trace["name"] == line.name
            np.testing.assert_allclose(trace["y"], line.y)
        assert "Nothing has run yet: this is arithmetic" in words(app)
        before = spec(app, "router_forecast")["data"]
        app.button_group(key="router_axis").set_value("experts")
        assert spec(finished(app), "router_forecast")["data"] != before

    def test_flops_are_those_of_the_formula_and_a_quarter_for_two_of_eight(self):
        params = router_cost.Params()
        flops = {line.name: line.y[-1] for line in cost.forecast(params, "tokens")[0][1]}
        size, width, inner = params.tokens, params.d_model, params.ffn_dim
        expected = size * (2 * width * params.experts + params.top_k * 6 * width * inner) / 1e9
        assert flops["Mixture of experts"] == pytest.approx(expected)
        assert flops["Mixture of experts"] / flops["Dense, equal parameters"] == pytest.approx(0.25, abs=0.01)
        assert "25% of what the dense layer of equal parameters does" in cost.forecast_sentence(params)

    @pytest.mark.parametrize(
        ("kind", "key", "value"),
        [("selectbox", "tokens", 4096), ("selectbox", "experts", 16), ("slider", "top_k", 4)],
    )
    def test_every_control_changes_the_arithmetic(self, lab, kind, key, value):
        app = lab(view=COST)
        before = spec(app, "router_forecast")["data"]
        getattr(app, kind)(key=f"router_cost_{key}").set_value(value)
        assert spec(finished(app), "router_forecast")["data"] != before

    def test_it_is_measured_when_asked_for_and_drawn_against_both(self, lab):
        app = lab(view=COST, **SMALL)
        app.button(key="_router_cost_run_start").click()
        finished(app)
        found = app.session_state["_run_router_cost_run"].result
        assert found.ended == "finished"
        assert found.sentence in words(app)
        assert "a bound only for sizes beyond the caches" in words(app)
        assert "Measured on" in words(app)
        line = drawn(app, "router_cost")["Mixture of experts"]
        own = [one for one in found.points if one.layer == "mixture" and one.axis == "tokens"]
        traces = [trace for trace in spec(app, "router_cost")["data"] if trace["name"] == "Mixture of experts"]
        assert traces[0]["y"] == [one.median_ms for one in own]
        assert traces[1]["y"] == [one.predicted_ms for one in own]
        assert traces[1]["line"]["dash"] == "dash"
        assert line["x"] == [16, 32]
        app.button_group(key="router_axis").set_value("experts")
        finished(app)
        assert drawn(app, "router_cost")["Mixture of experts"]["x"] == [1, 2, 4]
        assert len(cost.table(found)) == len(found.points)


class TestRecorded:
    def test_it_is_labelled_as_recorded_and_follows_the_direction(self, lab):
        app = lab(view=COST)
        said = words(app)
        layer = recorded_layer("forward")
        assert "H200, recorded" in said
        assert f"Recorded on an NVIDIA H200 on {layer.date}" in said
        assert "not measured now" in said
        assert recorded.sentence(layer) in said
        even = drawn(app, "router_recorded")["even load"]
        assert numbers(even["x"])[0] == pytest.approx(layer.found.way("ours").tflops)
        app.selectbox(key="router_cost_direction").set_value("forward and backward")
        finished(app)
        both = recorded_layer("forward and backward")
        assert recorded.sentence(both) in words(app)
        assert "target" not in recorded.sentence(both)

    def test_without_a_record_the_page_goes_without(self, lab, monkeypatch):
        monkeypatch.setattr(recorded, "recorded_layer", lambda direction: None)
        app = lab(view=COST)
        assert not app.exception
        assert "recorded" not in words(app)

    @pytest.mark.parametrize(("tflops", "said"), [(499.0, "500 is missed"), (501.0, "500 is reached")])
    def test_the_target_is_judged_by_the_number(self, tflops, said):
        layer = recorded_layer("forward")
        ways = tuple(dataclasses.replace(way, tflops=tflops) if way.name == "ours" else way for way in layer.found.ways)
        changed = dataclasses.replace(layer, found=dataclasses.replace(layer.found, ways=ways))
        assert said in recorded.sentence(changed)

    def test_an_uneven_load_is_called_faster_only_where_the_times_show_it_and_never_explained(self):
        layer = recorded_layer("forward")

        def said(low, high, tflops=600.0):
            ways = [way for way in layer.found.ways if (way.name, way.load) != ("ours", "uneven")]
            ours = layer.found.way("ours", "uneven")
            ways.append(dataclasses.replace(ours, low_ms=low, high_ms=high, tflops=tflops))
            return recorded.sentence(dataclasses.replace(layer, found=dataclasses.replace(layer.found, ways=ways)))

        even = layer.found.way("ours")
        assert "it is 600 (the spreads of the two overlap: these runs do not show" in said(1.0, even.low_ms)
        assert "it is 600 (faster, and these times do not say why)" in said(1.0, 0.9 * even.low_ms)
        assert "it is 100; " in said(9.0, 10.0, tflops=100.0)

    def test_a_bar_that_is_missing_is_explained(self):
        layer = recorded_layer("forward")
        why = "which transformers' block does not take: it has no such bar"
        assert why in recorded.sentence(layer)
        ways = tuple(way for way in layer.found.ways if "transformers" not in way.name)
        assert why not in recorded.sentence(
            dataclasses.replace(layer, found=dataclasses.replace(layer.found, ways=ways))
        )

    def test_a_loop_whose_spread_touches_is_no_slower(self):
        found = recorded_layer("forward").found
        ours = found.way("ours")

        def with_loop(low, high):
            ways = [way for way in found.ways if way.name != "loop, our rows"]
            loop = dataclasses.replace(ours, name="loop, our rows", low_ms=low, high_ms=high, tflops=123.0)
            return recorded.parts_sentence(dataclasses.replace(found, ways=(*ways, loop)))

        assert "show no difference" in with_loop(ours.high_ms, 2 * ours.high_ms)
        assert "it is 123 TFLOP/s with a loop" in with_loop(1.1 * ours.high_ms, 2 * ours.high_ms)

    def test_errors_are_told_where_they_differ(self):
        found = recorded_layer("forward").found
        assert "rounds logits" in recorded.error_sentence(found)
        alike = tuple(dataclasses.replace(way, error=0.004) for way in found.ways)
        assert recorded.error_sentence(dataclasses.replace(found, ways=alike)) == ""
        none = tuple(way for way in found.ways if "transformers" not in way.name)
        fewer = dataclasses.replace(found, ways=none)
        assert recorded.error_sentence(fewer) == ""
        assert {bar.label for bar in recorded.bars(fewer)} < set(recorded.LABELS.values())

    def test_whiskers_are_the_speeds_of_the_ends_of_the_spread(self):
        for bar in recorded.bars(recorded_layer("forward").found):
            assert bar.low <= bar.value <= bar.high


class TestPredict:
    def test_the_answer_is_not_there_before_the_guess(self, lab):
        app = lab(tab="Predict")
        assert "Which gate does it get?" in words(app)
        assert not app.get("plotly_chart")
        assert "is chosen" not in words(app)

    @pytest.mark.parametrize(("guess", "said"), [(predict.SMALLER, "Right"), (predict.LARGER, "Not quite")])
    def test_a_guess_is_told_right_or_wrong_with_the_numbers(self, lab, guess, said):
        app = lab(tab="Predict")
        app.button_group(key="router_gate_guess0").set_value(guess)
        finished(app)
        assert said in words(app)
        assert re.search(r"its gate is 0\.\d+ beside 0\.\d+", words(app))
        assert drawn(app, "router_gate_chart")

    def test_another_token_is_another_question(self, lab):
        app = lab(tab="Predict")
        before = words(app)
        app.button_group(key="router_gate_guess0").set_value(predict.EQUAL)
        finished(app)
        app.button(key="_router_next").click()
        finished(app)
        assert words(app) != before
        assert not app.get("plotly_chart")

    def test_the_verdict_is_made_of_the_gates(self):
        found = router_token.run(router_token.Params(**SHORT, position=1), LocalJob())
        first, second = found.chosen
        even = dataclasses.replace(found, gates=(0.5, 0.5))
        assert predict.judge_gate(found, first).truth == predict.LARGER
        assert predict.judge_gate(found, second).truth == predict.SMALLER
        assert predict.judge_gate(even, second).truth == predict.EQUAL
        assert predict.judge_gate(found, 99).truth == predict.NOT_CHOSEN

    def test_a_guess_lies_beside_what_the_training_did(self, lab):
        app = lab(tab="Predict", **BRIEF)
        app.slider(key="router_idle_guess").set_value(4)
        finished(app)
        train(app)
        idle = predict.idle_experts(app.session_state["_run_router_run"].result)
        assert f"You said 4, it is {idle} of 4 after step 20" in words(app)
        assert "wrong" in words(app) or idle == 4
        app.slider(key="router_idle_guess").set_value(idle)
        finished(app)
        assert "You said 4" in words(app)  # a guess after the answer was seen is none
        train(app)
        assert f"You said {idle}, it is {idle} of 4 after step 20: right." in words(app)

    def test_a_guess_that_was_never_made_is_not_judged(self, lab):
        app = open_tab(train(lab(view=COLLAPSE, **BRIEF)), "Predict")
        assert "Nothing was guessed before this run" in words(app)
        assert "You said" not in words(app)

    def test_who_goes_short_is_counted_with_the_dead(self, brief):
        relative = np.array([[1.0, 1, 1, 1], [3.9, 0.1, 0.0, 0.05]])
        assert predict.idle_experts(dataclasses.replace(brief, relative=relative)) == 2


class TestWrongInput:
    def test_more_experts_a_token_than_there_are_is_said_in_the_link_and_prevented_on_the_page(self, lab):
        app = lab(experts="4", top_k="9")
        assert len(app.warning) == 1
        assert "must be a whole number from 1 to 4" in words(app)
        app.slider(key="router_top_k").set_value(4)
        app.slider(key="router_experts").set_value(2)
        finished(app)
        assert app.slider(key="router_top_k").value == 2
        assert not app.error

    def test_one_expert_takes_everything(self, lab):
        app = lab(experts="1", top_k="5", view=TEXT, **SHORT)
        assert "There is one expert" in words(app)
        assert not app.error
        app = show(app, WAY)
        assert "There is one expert" in words(app)
        app.slider(key="router_experts").set_value(6)
        assert finished(app).slider(key="router_top_k").value == 5

    @pytest.mark.parametrize("view", [WAY, TEXT])
    def test_an_empty_text_is_one_sentence_and_a_way_out(self, lab, view):
        app = lab(view=view)
        app.text_area(key="router_text").set_value("  ")
        finished(app)
        assert "The text is empty: type a few words." in words(app)
        assert NOTHING_TO_SHOW in words(app)
        app.text_area(key="router_text").set_value("Once")
        finished(app)
        assert not app.error

    def test_a_token_beyond_the_text_is_named(self, lab):
        assert "There is no token 200" in words(lab(position="200", **SHORT))

    def test_a_layer_that_the_model_lacks_is_named(self, lab):
        assert "There is no layer 40" in words(lab(layer="40"))

    def test_a_text_that_is_too_long_is_named_and_kept(self, lab):
        app = lab(view=TEXT)
        long = "cat dog " * 400
        app.text_area(key="router_text").set_value(long)
        finished(app)
        assert "shorten it" in words(app)
        assert app.text_area(key="router_text").value == long

    def test_nonsense_in_the_address_is_named(self, lab):
        app = lab(experts="many", kind="banana", capacity_factor="-3")
        assert len(app.warning) == 3
        assert spec(app, "router_way")

    def test_a_view_that_does_not_exist_opens_the_first_and_is_said(self, lab):
        app = lab(view="Nowhere")
        assert app.button_group(key="router_view").value == WAY
        assert spec(app, "router_way")
        assert "The link sets the view to “Nowhere”, but it must be one of One token's way, A text," in words(app)


def test_the_tests_tab_is_green(lab):
    assert re.search(r"(\d+) of \1 properties hold", words(lab(tab="Tests", **SHORT)))


def test_the_code_tab_shows_the_router_and_what_balances_it(lab):
    app = lab(tab="Code")
    shown = "\n".join(code.value for code in app.code)
    for definition in ("class ExpertRouter", "def auxiliary_loss", "class MoEFeedForward", "class BalancedTrainer"):
        assert definition in shown


def test_a_training_goes_on_in_other_views_with_its_progress(lab):
    app = lab(view=COLLAPSE, collapse_steps="3000")
    app.button(key="_router_train").click().run()
    app.button_group(key="router_view").set_value(WAY).run()
    assert not app.exception
    assert app.progress
    app.button(key="_cancel_router_run").click()
    finished(app)
    assert app.session_state["_run_router_run"].result.ended == "cancelled"


def test_the_legend_of_the_text_counts_changes_of_the_first_expert():
    found = router_text.run(router_text.Params(**SHORT), LocalJob())
    experts = np.full((len(found.tokens), 1), 2)
    experts[3:] = 1
    load = load_from_counts([0, len(found.tokens) - 3, 3])
    still = dataclasses.replace(found, experts=experts, load=load, left_out=np.zeros(len(experts), bool))
    assert f"changes 1 of {len(found.tokens) - 1} times" in text.legend_sentence(still)
    assert "Struck out" not in text.legend_sentence(still)
