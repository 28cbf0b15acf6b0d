"""The MoE-LoRA lab in Streamlit's own test harness, on the real runtime, the small model and few steps."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engine.experiments import moe_lora, moe_lora_split
from engine.experiments._moe_lora import ROLES, TASK_NAMES
from engine.moe.tasks import read_tasks
from tests.ui.lab_pages import finished, words
from ui.labs import MOE_LORA
from ui.moe_lora import experts, predict, training, two_inputs
from ui.moe_lora.explore import VIEWS
from ui.moe_lora.settings import EXPERTS, SPLIT, TRAINING

SHORT = {"steps": 10, "batch_size": 4, "rank": 2, "experts": 3, "targets": "query and value"}
J, N, E = 4, 12, 3


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens the lab, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda **query: open_page(MOE_LORA, SHORT | query)


def train(app):
    app.button(key="_moe_lora_train").click()
    return finished(app)


def look(app, view):
    app.session_state["moe_lora_view"] = view
    return finished(app)


def turn(app, tab):
    app.session_state["moe_lora_tab"] = tab
    return finished(app)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


def leg(role, right, steps=10, loss=0.5):
    checked = np.array([0, steps])
    table = np.array([np.zeros(J), np.full(J, right)])
    return moe_lora.Run(role, 2, 1000, 2000, 0.01, np.arange(1, steps + 1), np.full(steps, loss), checked,
                        np.array([np.full(J, 5.0), np.full(J, loss)]), table, 1.0)  # fmt: skip


def anatomy(experts=E, off=0.0, own=0.0, others=0.0):
    eye = np.eye(J)
    return moe_lora.Anatomy(
        spectra=np.tile(np.arange(1, experts + 1)[:, None], (N, 1, 2)).astype(float),
        similarity=np.tile(np.eye(experts), (N, 1, 1)),
        loss=np.ones(J),
        accuracy=np.full(J, 0.75),
        off_loss=np.ones((experts, J)) + off,
        off_accuracy=np.full((experts, J), 0.75),
        favourite=np.zeros((J, N), dtype=int),
        favourite_off_loss=1 + own * eye + others * (1 - eye),
        favourite_off_accuracy=np.full((J, J), 0.5),
    )


def result(rights=(0.5, 0.5, 0.5), experts=E, ended="finished", **changes):
    routing = np.full((2, J, N, experts), 1 / experts)
    found = moe_lora.Result(
        list(TASK_NAMES), [f"layers.{index}.self_attn.q_proj" for index in range(N)], experts, 1,
        [leg(role, right) for role, right in zip(ROLES, rights, strict=False)], routing, np.zeros((2, N)),
        anatomy(experts), [], 10, ended, "All 3 runs of 10 steps were made.", 3.0, 5_000_000, "CPU", {"torch": "2.13"},
    )  # fmt: skip
    return replace(found, **changes)


class TestTraining:
    def test_what_is_to_be_learned_is_told_before_anything_runs(self, lab):
        app = lab()
        assert "a link brings settings, not results" in words(app)
        assert app.table[0].value["Task"].tolist() == [task.name for task in read_tasks()]
        assert "Nobody tells it which task is which" in words(app)

    def test_a_run_shows_curves_routing_numbers_and_answers(self, lab):
        app = train(lab())
        found = app.session_state["_run_moe_lora_run"].result
        assert "All 3 runs of 10 steps were made" in words(app)
        lines = spec(app, "moe_lora_tasks")["data"]
        assert [line["name"] for line in lines] == found.tasks
        assert [line["name"] for line in spec(app, "moe_lora_runs")["data"]] == list(ROLES)
        assert len(spec(app, "moe_lora_routing")["data"]) == J
        numbers = app.table[0].value
        assert numbers["MoE-LoRA"].tolist()[J + 1] == f"{found.mixture.trainable:,}"
        assert len(app.table[1].value) == len(found.answers)
        app.session_state["moe_lora_measure"] = "Right answers"
        finished(app)
        assert spec(app, "moe_lora_tasks")["layout"]["yaxis"]["title"]["text"] == "answers right"

    def test_the_matrix_moves_the_map_and_stays_in_the_other_view(self, lab):
        app = train(lab())
        before = spec(app, "moe_lora_routing")["data"]
        other = app.selectbox(key="moe_lora_matrix").options[-1]
        app.selectbox(key="moe_lora_matrix").select(other)
        finished(app)
        assert spec(app, "moe_lora_routing")["data"] != before
        assert f"{other.capitalize()}, after step 10" in words(app)
        look(app, EXPERTS)
        assert app.selectbox(key="moe_lora_matrix").format_func(app.selectbox(key="moe_lora_matrix").value) == other

    def test_other_settings_wait_for_the_button(self, lab):
        app = train(lab())
        app.slider(key="moe_lora_rank").set_value(3)
        finished(app)
        assert "had other settings" in words(app)
        assert app.session_state["_run_moe_lora_run"].result_params.rank == 2

    def test_controls_that_were_away_come_back_as_they_were(self, lab):
        app = lab(seed=7)
        look(app, SPLIT)
        assert "moe_lora_rank" not in [slider.key for slider in app.slider]
        app.number_input(key="moe_lora_split_seed").set_value(3)
        finished(app)
        look(app, TRAINING)
        assert app.slider(key="moe_lora_rank").value == 2
        assert app.number_input(key="moe_lora_seed").value == 7
        look(app, SPLIT)
        assert app.number_input(key="moe_lora_split_seed").value == 3

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ({"experts": 2, "top_k": 4}, "choose at most 2"),
            ({"experts": 8, "rank": 16, "targets": "all"}, "choose fewer experts or a lower rank"),
        ],
    )
    def test_settings_that_make_no_sense_get_a_sentence_and_no_button(self, lab, query, sentence):
        app = lab(**query)
        assert [sentence in error.value for error in app.error] == [True]
        assert not [button for button in app.button if button.key == "_moe_lora_train"]
        assert not app.exception

    @pytest.mark.parametrize("query", [{"rank": "many"}, {"kind": "expert choice"}, {"bias_rate": "7"}, {"steps": -3}])
    def test_a_link_that_makes_no_sense_is_told_and_opens(self, lab, query):
        app = lab(**query)
        assert len(app.warning) == 1
        assert "is used instead" in app.warning[0].value


class TestExperts:
    def test_they_come_after_the_training(self, lab):
        app = lab(view=EXPERTS)
        assert "There are no trained experts yet" in words(app)
        train(app)
        assert app.session_state["moe_lora_view"] == EXPERTS
        found = app.session_state["_run_moe_lora_run"].result
        assert "What breaks when an expert is switched off" in words(app)
        by_expert, by_task = (spec(app, f"moe_lora_{key}")["data"][0] for key in ("off", "favourites"))
        assert by_expert["y"] == by_task["y"] == found.tasks
        assert by_expert["zmax"] == by_task["zmax"]
        assert len(spec(app, "moe_lora_spectra")["data"]) == E
        for key in ("similarity", "information"):
            assert spec(app, f"moe_lora_{key}")["data"][0]["type"] == "heatmap"


class TestTwoInputs:
    def test_it_is_there_at_once_and_says_who_takes_what(self, lab):
        app = lab(view=SPLIT)
        found = app.session_state["_run_moe_lora_split_run"].result
        assert found.apart
        assert f"A takes expert {found.chosen[-1, 0]}, B expert {found.chosen[-1, 1]}" in words(app)
        assert len(spec(app, "moe_lora_split_chart")["layout"]["yaxis3"]) > 0

    def test_without_the_bias_they_stay_together(self, lab):
        app = lab(view=SPLIT, split_bias_rate="0")
        assert "both take expert" in words(app)
        assert "there is no bias" in words(app)

    def test_other_seeds_are_counted(self, lab):
        app = lab(view=SPLIT, split_others=2, split_rounds=60, split_seed=0)
        assert "Of seeds 0 to 2, 3 of 3 end on different experts" in words(app)


class TestPredict:
    def test_nothing_is_given_away_before_a_guess(self, lab):
        app = train(lab())
        turn(app, "Predict")
        said = words(app)
        assert "Nothing was guessed before this run" in said
        found = app.session_state["_run_moe_lora_run"].result
        assert f"{found.runs[1].mean_accuracy[-1]:.0%} right at" not in said
        assert "answers most." not in said
        with pytest.raises(KeyError):
            app.get_by_key("moe_lora_guess_chart")

    def test_a_guess_made_before_the_run_is_judged_after_it(self, lab):
        app = lab()
        turn(app, "Predict")
        app.button_group(key="moe_lora_winner").set_value(ROLES[0])
        app.slider(key="moe_lora_top_share").set_value(35)
        finished(app)
        train(app)
        said = words(app)
        assert f"You said {ROLES[0]}. Right answers to 64 questions" in said
        assert "You said 35%" in said
        assert [line["name"] for line in spec(app, "moe_lora_guess_chart")["data"]] == list(ROLES)


def test_the_code_is_the_engines_own(lab):
    app = lab()
    turn(app, "Code")
    headers = [header.value for header in app.header]
    assert "MoELoRALayer" in headers
    assert "SelectionBias" in headers
    assert not app.exception


def test_every_property_holds_on_the_page(lab):
    app = lab()
    turn(app, "Tests")
    held, of = app.success[0].value.split(" properties")[0].split(" of ")
    assert held == of
    assert int(of) >= 12
    assert not app.error


class TestSentences:
    @pytest.mark.parametrize(
        ("rights", "said"),
        [
            ((0.5, 0.5, 0.5), "as many as the LoRA of equal parameters and as many as the LoRA of equal FLOPs"),
            ((0.75, 0.5, 1.0), "16 more than the LoRA of equal parameters and 16 fewer than the LoRA of equal FLOPs"),
        ],
    )
    def test_the_verdict_follows_the_numbers(self, rights, said):
        assert said in training.verdict(result(rights))
        assert training.verdict(result(rights[:1], ended="running")).startswith("The comparison is complete once")

    @pytest.mark.parametrize(
        ("rights", "guessed", "right", "said"),
        [
            ((0.5, 0.75, 0.25), ROLES[1], True, "Nobody answers more."),
            ((0.5, 0.5, 0.25), ROLES[1], True, "It shares the first place."),
            ((0.5, 0.75, 0.25), ROLES[0], False, "LoRA, equal parameters answers most."),
            ((0.5, 0.75, 0.75), ROLES[0], False, "equal parameters and LoRA, equal FLOPs answer most."),
        ],
    )
    def test_the_winner_is_who_answers_most(self, rights, guessed, right, said):
        judged, words = predict.winner_sentence(result(rights), guessed)
        assert judged is right
        assert words.endswith(said)

    @pytest.mark.parametrize(("guessed", "right"), [(33, True), (40, True), (60, False), (0, False)])
    def test_the_share_is_judged_by_its_distance(self, guessed, right):
        judged, words = predict.share_sentence(result(), guessed)
        assert judged is right
        assert "33% of what a task's tokens choose" in words

    def test_one_expert_has_nothing_to_compare(self):
        found = result(experts=1)
        assert training.routing_sentence(found, 0) == "There is one expert: it gets every token."
        assert "one expert" in experts.off_sentence(found)
        assert "one expert" in experts.favourites_sentence(found)
        assert "one expert" in experts.similarity_sentence(found, 0)
        assert "one expert" in experts.information_sentence(found)
        assert "its one expert" in experts.spectra_sentence(found, 0)

    @pytest.mark.parametrize(
        ("own", "others", "said"),
        [(0.5, 0.1, "its own matter more"), (0.1, 0.5, "its own matter no more"), (0.0, 0.0, "its own matter no more")],
    )
    def test_favourites_matter_as_the_numbers_say(self, own, others, said):
        words = experts.favourites_sentence(replace(result(), anatomy=anatomy(own=own, others=others)))
        assert said in words
        assert ("Hardest hit" in words) == (max(own, others) > 0)
        assert "the same favourite in 100% of the projections" in words

    def test_who_breaks_what_is_counted(self):
        parts = anatomy()
        right = parts.off_accuracy.copy()
        right[1, 2] = 0.25
        right[2] = 0.5
        words = experts.off_sentence(replace(result(), anatomy=replace(parts, off_accuracy=right)))
        assert "Hardest hit: Backwards without expert 1, from 75% to 25% right" in words
        assert "1 of the 3 experts breaks one task alone" in words
        assert "1 breaks several" in words
        assert "No task loses a right answer" in experts.off_sentence(result())

    def test_an_idle_expert_is_named(self):
        spectra = anatomy().spectra.copy()
        spectra[:, 1] = 0
        found = replace(result(), anatomy=replace(anatomy(), spectra=spectra))
        assert "expert 1 got no token and learned nothing" in experts.spectra_sentence(found, 0)
        spectra[:] = 0
        assert experts.spectra_sentence(found, 0).endswith("no expert has learned anything.")

    @pytest.mark.parametrize("step", [0, 10])
    def test_the_start_is_told_as_the_start(self, step):
        found = result()
        if not step:
            first = replace(
                found.mixture,
                checked=found.mixture.checked[:1],
                task_loss=found.mixture.task_loss[:1],
                task_accuracy=found.mixture.task_accuracy[:1],
            )
            found = replace(found, runs=[first], routing=found.routing[:1], information=found.information[:1])
        assert ("Before the first step" in training.tasks_sentence(found)) == (step == 0)
        assert ("before the first step:" in training.routing_sentence(found, 0)) == (step == 0)

    @pytest.mark.parametrize("others", [[], [3, None], [None]])
    def test_seeds_are_counted_as_they_are(self, others):
        found = moe_lora_split.Result(
            np.zeros((3, 2, 2)), np.zeros((3, 2)), np.array([[0, 0], [0, 1], [0, 1]]), np.ones((3, 2)), 0.0, others
        )
        words = two_inputs.others_sentence(found, moe_lora_split.Params(seed=2))
        parted = 1 + sum(other is not None for other in others)
        assert f"Of seeds 2 to {2 + len(others)}, {parted} of {1 + len(others)}" in words
        assert "a fresh router would part about 50%" in words
        alike = two_inputs.others_sentence(found, moe_lora_split.Params(seed=2, similarity=0.5))
        assert "a fresh router would part about 33%" in alike

    def test_tables_hold_every_number(self):
        found = result()
        assert len(training.checkups(found)) == 3 * 2 * J
        assert len(training.shares_table(found)) == 2 * J * N * E
        assert training.shares_table(found)["share"].sum() == pytest.approx(2 * J * N)
        assert len(experts.spectra_table(found)) == N * E * 2
        assert len(experts.off_table(found.tasks, ["0"], np.ones((J, 1)), np.ones((J, 1)))) == J


def test_all_views_are_listed_once():
    assert list(VIEWS) == [TRAINING, EXPERTS, SPLIT]


def test_smollm2_is_said_to_take_longer(lab):
    app = lab(model="smollm2-135m")
    assert "On two CPU cores SmolLM2 takes about" in words(app)


def test_a_run_that_went_wrong_is_told_and_has_no_experts(lab, monkeypatch):
    app = lab(view=EXPERTS)
    found = result(rights=(0.5,), ended="diverged", anatomy=None, ending="Training diverged at step 4 of 10.")
    monkeypatch.setattr("ui.run.watch", lambda name, params, draw, **_: draw(found, params))
    app.session_state["_moe_lora_started"] = moe_lora.Params(**SHORT)
    assert "diverged at step 4 of 10. Its experts were not looked into" in words(finished(app))
    assert "diverged at step 4 of 10" in words(look(app, TRAINING))
