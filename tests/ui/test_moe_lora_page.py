"""The MoE-LoRA lab in Streamlit's own test harness, on the real runtime, the small model and few steps."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engine.experiments import moe_lora, moe_lora_split
from engine.experiments._moe_lora import LEARNING_RATES, ROLES, TASK_NAMES, tried_rates
from engine.experiments._moe_lora_recorded import BASE, CAPTURED, CHOSEN, PEFT_BYTES, PEFT_MS, WHOLE, recorded_mixture
from engine.moe.tasks import read_tasks
from tests.ui.lab_pages import finished, words
from ui.labs import MOE_LORA
from ui.moe_lora import experts, predict, speed, training, two_inputs, verdict
from ui.moe_lora.explore import VIEWS
from ui.moe_lora.settings import EXPERTS, SPEED, SPLIT, TRAINING
from ui.prose import plain

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
        bold = [each.value for each in app.markdown if each.value.startswith("**After 10 steps")]
        assert bold == [f"**{plain(f'{verdict.winner_sentence(found)} {verdict.told_sentence(found)}')}**"]
        assert verdict.doubts(found) in words(app)
        assert words(app).count(verdict.TOLD) == 1
        assert training.tasks_sentence(found, training.LOSS) in words(app)
        lines = spec(app, "moe_lora_tasks")["data"]
        assert [line["name"] for line in lines] == found.tasks
        assert [line["name"] for line in spec(app, "moe_lora_runs")["data"]] == list(ROLES)
        assert len(spec(app, "moe_lora_routing")["data"]) == J
        numbers = app.table[0].value
        assert numbers["MoE-LoRA"].tolist()[J + 1] == f"{found.mixture.trainable:,}"
        assert len(app.table[2].value) == len(found.answers)
        assert training.rates_sentence(found) in words(app)
        assert training.rule_sentence(tried_rates()) in words(app)
        app.session_state["moe_lora_measure"] = "Right answers"
        finished(app)
        assert spec(app, "moe_lora_tasks")["layout"]["yaxis"]["title"]["text"] == "answers right"
        assert training.tasks_sentence(found, training.RIGHT) in words(app)
        assert training.runs_sentence(found, training.RIGHT) in words(app)
        assert training.tasks_sentence(found, training.LOSS) not in words(app)

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

    @pytest.mark.parametrize("query", [{"seed": "abc"}, {"steps": 99999999}])
    def test_what_it_says_of_a_control_that_is_folded_away_is_not(self, lab, query):
        app = lab(**query)
        assert len(app.warning) == 1
        assert sum(len(fold.warning) for fold in app.expander) == 0


class TestExperts:
    def test_they_come_after_the_training(self, lab):
        app = lab(view=EXPERTS)
        assert "There are no trained experts yet" in words(app)
        train(app)
        assert app.session_state["moe_lora_view"] == EXPERTS
        found = app.session_state["_run_moe_lora_run"].result
        assert "What breaks when an expert is switched off" in words(app)
        assert verdict.told_sentence(found) in words(app)
        assert words(app).count(verdict.TOLD) == 1
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
            ((0.5, 0.5, 0.5), f"{ROLES[0]} and {ROLES[1]} and {ROLES[2]} have equally many, the most right"),
            (
                (0.75, 0.5, 1.0),
                f"the most right answers to the 64 questions: {ROLES[2]} 64 ± 1; {ROLES[0]} 48 ± 3; {ROLES[1]} 32 ± 4.",
            ),
        ],
    )
    def test_the_verdict_follows_the_numbers(self, rights, said):
        assert said in verdict.winner_sentence(result(rights))
        assert "The comparison is complete once" in training.runs_sentence(result(rights[:1], ended="running"))

    @pytest.mark.parametrize("right", [0, 1, 16, 32, 51, 63, 64])
    def test_the_error_is_that_of_a_proportion(self, right):
        drawn = np.random.default_rng(right).beta(right + 1, 65 - right, 200_000)
        found = verdict.standard_error(right, 64)
        assert found > 0.9
        assert found == pytest.approx(64 * drawn.std(), rel=0.05)

    @pytest.mark.parametrize(
        ("rights", "said"),
        [
            ((0.5, 0.5, 0.5), "lie 0, no more than chance can make"),
            ((0.75, 0.5, 0.8125), "lie 4, no more than chance can make"),
            ((0.75, 0.5, 1.0), "lie 16, more than chance explains"),
        ],
    )
    def test_chance_is_held_against_the_difference(self, rights, said):
        assert said in verdict.doubts(result(rights))
        apart = abs(rights[1] - rights[2]) * 64
        decided = "more than chance explains" if apart >= 20 else "no more than chance can make"
        assert f"between the two LoRAs {apart:.0f}, {decided}" in verdict.doubts(result(rights))

    def test_a_curve_that_rises_is_not_called_done(self):
        said = verdict.doubts(result((0.5, 0.5, 0.0)))
        assert f"Since step 0 right answers still rose ({ROLES[0]} by 32; {ROLES[1]} by 32): not converged" in said
        assert "none of the three has gained a right answer" in verdict.doubts(result((0.0, 0.0, 0.0)))
        assert said.endswith("It is one seed.")

    def test_loss_and_answers_may_disagree(self):
        found = result((0.75, 0.5, 0.5))
        first, *rest = found.runs
        assert "gives the same order" in verdict.doubts(found)
        worse = replace(first, task_loss=first.task_loss + 1)
        assert "gives another order" in verdict.doubts(replace(found, runs=[worse, *rest]))

    @pytest.mark.parametrize(("share", "how"), [(0.09, "hardly"), (0.4, "partly"), (0.9, "clearly")])
    def test_experts_are_told_apart_as_far_as_they_are(self, share, how):
        found = result(information=np.stack([np.full(N, 0.065), np.full(N, share)]))
        said = verdict.told_sentence(found)
        assert f"Experts are {how} told apart by task" in said
        assert f"tells {share:.1%} of its task, 6.5% before the first step (mean over 12 projections)" in said

    def test_the_projection_that_comes_first_is_held_against_the_mean(self):
        information = np.tile(np.linspace(0.01, 0.12, N), (2, 1))
        information[0, 9] = 0.5
        said = training.routing_sentence(result(information=information), 9)
        assert "tells 10% of its task (50% before the first step), the mean over all 12 projections is 6%" in said
        assert "its untrained router tells most, and 2 of the others now tell more" in said
        assert "untrained" not in training.routing_sentence(result(information=information), 1)

    def test_captions_follow_what_is_drawn(self):
        found = result()
        first, *rest = found.runs
        table, right = first.task_loss.copy(), first.task_accuracy.copy()
        table[-1], right[-1] = (0.5, 0.2, 0.4, 0.9), (0.25, 0.5, 1.0, 0.75)
        found = replace(found, runs=[replace(first, task_loss=table, task_accuracy=right), *rest])
        by_loss, by_right = (training.tasks_sentence(found, measure) for measure in (training.LOSS, training.RIGHT))
        low, high = found.tasks[1], found.tasks[3]
        assert f"lowest is {low} with 0.2 nats" in by_loss
        assert f"highest {high} with 0.9" in by_loss
        assert f"most answers are right in {found.tasks[2]}, 100%" in by_right
        assert f"fewest in {found.tasks[0]}, 25%" in by_right
        assert "nats" not in by_right
        right[-1] = (0.25, 0.25, 1.0, 0.75)
        tie = f"fewest in {found.tasks[0]}, 25% (loss 0.5) and {found.tasks[1]}, 25% (loss 0.2)."
        assert tie in training.tasks_sentence(found, training.RIGHT)

    def test_a_loss_that_grew_is_told(self):
        found = result()
        first, *rest = found.runs
        table = first.task_loss.copy()
        table[:, 1] = 1.0, 1.5
        grown = replace(found, runs=[replace(first, task_loss=table), *rest])
        assert f"{found.tasks[1]} (1 after step 0, now 1.5)" in training.tasks_sentence(grown)
        assert "overfitting" not in training.tasks_sentence(found)
        table[:, 1] = 0.01, 0.03  # three times as much of hardly anything
        little = replace(found, runs=[replace(first, task_loss=table), *rest])
        assert "overfitting" not in training.tasks_sentence(little)

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
        [(0.5, 0.1, "in 4 of 4 tasks, in one seed"), (0.1, 0.5, "in 0 of 4 tasks"), (0.0, 0.0, "in 0 of 4 tasks")],
    )
    def test_favourites_matter_as_the_numbers_say(self, own, others, said):
        words = experts.favourites_sentence(replace(result(), anatomy=anatomy(own=own, others=others)))
        assert said in words
        assert ("Hardest hit" in words) == (max(own, others) > 0)
        assert "the same favourite in 100% of the projections" in words

    def test_favourites_are_counted_task_by_task(self):
        parts = anatomy(own=0.1, others=0.3)
        loss = parts.favourite_off_loss.copy()
        loss[3, 3] = 9.0  # one cell that outweighs all others in a mean
        words = experts.favourites_sentence(replace(result(), anatomy=replace(parts, favourite_off_loss=loss)))
        assert f"in 1 of 4 tasks ({TASK_NAMES[3]})" in words
        assert f"{TASK_NAMES[3]} without its own favourites, +8.00 nats a token" in words

    def test_hardest_hit_is_the_deepest_cell_of_either_map(self):
        parts = anatomy()
        off, favourites = parts.off_loss.copy(), parts.favourite_off_loss.copy()
        off[2, 0], off[1, 3], favourites[1, 2] = 1.47, 0.8, 2.22
        right = parts.off_accuracy.copy()
        right[0, 2] = 0.0  # by answers it would be this one
        found = replace(
            result(), anatomy=replace(parts, off_loss=off, favourite_off_loss=favourites, off_accuracy=right)
        )
        one, other = experts.off_sentence(found), experts.favourites_sentence(found)
        assert f"Hardest hit by loss, which the colour shows: {TASK_NAMES[0]} without expert 2, +0.47 nats" in one
        assert f"It falls in 1 of 12 cells, most {TASK_NAMES[3]} without expert 1, -0.20" in one
        assert f"colour shows: {TASK_NAMES[2]} without those of {TASK_NAMES[1]}, +1.22" in other

    def test_who_breaks_what_is_counted(self):
        parts = anatomy()
        right = parts.off_accuracy.copy()
        right[1, 2] = 0.25
        right[2] = 0.5
        words = experts.off_sentence(replace(result(), anatomy=replace(parts, off_accuracy=right)))
        assert "1 of the 3 experts breaks one task alone" in words
        assert "1 breaks several" in words
        assert "No task's loss grows" in experts.off_sentence(result())

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
    assert list(VIEWS) == [TRAINING, EXPERTS, SPLIT, SPEED]


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


def test_the_rates_of_the_runs_are_told_apart_only_where_they_differ():
    assert training.rates_sentence(result()) == "Learning rate of all runs: 0.01"
    first, *rest = result().runs
    said = training.rates_sentence(result(runs=[replace(first, learning_rate=0.2), *rest]))
    assert said.startswith("Learning rates: MoE-LoRA 0.2, LoRA, equal parameters 0.01")
    table = training.tries_table(tried_rates())
    for role, rate in LEARNING_RATES.items():
        chosen = [told.startswith("**") for told in table[role]]
        assert [f"{rate:g}"] == table["Learning rate"][chosen].tolist()


class TestSpeed:
    def changed(self, name, **values):
        """The record with another forward pass."""
        found = recorded_mixture().found
        return replace(found, forward=tuple(replace(each, **values) if each.name == name else each
                                            for each in found.forward))  # fmt: skip

    def test_the_record_is_labelled_and_told(self, lab):
        app = lab(view=SPEED)
        recorded = recorded_mixture()
        assert not app.exception
        assert f"Recorded on an NVIDIA H200 on {recorded.date}" in words(app)
        assert "not measured now" in words(app)
        assert speed.added_sentence(recorded.found) in words(app)
        assert speed.step_sentence(recorded.found) in words(app)
        rows = app.table[0].value
        for place, way in ((0, CAPTURED), (2, "")):
            timing = recorded.found.timing(BASE + way)
            for number in (f"{timing.median_ms:.3f} (", f"({timing.low_ms:.3f} to {timing.high_ms:.3f})"):
                assert number in rows["ms (spread)"].tolist()[place]
            assert rows["ms (spread)"].tolist()[place].endswith(f", {timing.runs} runs")
        assert rows["peak memory"].tolist()[0] == "—"
        assert len(app.table[1].value) == sum(map(len, recorded.found.steps.values()))

    def test_without_a_record_it_says_so(self, lab, monkeypatch):
        monkeypatch.setattr(speed, "recorded_mixture", lambda: None)
        assert "The recording is not there" in words(lab(view=SPEED))

    def test_what_is_added_is_the_difference_with_the_widest_spread(self):
        found = self.changed(WHOLE, median_ms=5.0, low_ms=4.0, high_ms=7.0)
        base = found.timing(BASE)
        added = found.added()
        assert added.median_ms == pytest.approx(5 - base.median_ms)
        assert (added.low_ms, added.high_ms) == (4 - base.high_ms, 7 - base.low_ms)

    @pytest.mark.parametrize(("times", "said"), [(1.5, "it is reached"), (2.0, "cannot tell"), (4.0, "it is missed")])
    @pytest.mark.parametrize("way", ["", CAPTURED])
    def test_the_target_is_judged_by_the_numbers(self, times, said, way):
        base = recorded_mixture().found.timing(BASE + way)
        whole = {"median_ms": times * base.median_ms, "low_ms": times * base.median_ms,
                 "high_ms": times * base.median_ms}  # fmt: skip
        captured, launched = speed.added_sentence(self.changed(WHOLE + way, **whole)).split("One by one")
        assert captured.startswith("As a CUDA graph")
        assert said in (captured if way else launched)

    def test_why_the_two_ways_differ_is_told_where_they_do(self):
        assert "They differ because the CPU launches" in speed.added_sentence(recorded_mixture().found)
        same = {field: getattr(recorded_mixture().found.timing(WHOLE + CAPTURED), field)
                for field in ("median_ms", "low_ms", "high_ms")}  # fmt: skip
        assert "They differ" not in speed.added_sentence(self.changed(WHOLE, **same))

    def test_a_row_without_its_kernels_is_told_as_well(self):
        found = recorded_mixture().found
        said = speed.step_sentence(found)
        known = [each.kernels_ms for forms in found.steps.values() for each in forms if each.name == CHOSEN]
        assert all(f"{time:.2f}" in said.split("kernels take")[1] for time in known)
        assert f"Each of {2 * next(iter(found.steps)).num_experts} separate parameters" in said
        size, forms = next(iter(found.steps.items()))
        bare = tuple(replace(each, kernels_ms=None) for each in forms)
        assert "kernels take" not in speed.step_sentence(replace(found, steps=found.steps | {size: bare}))
        assert speed.table([("one", bare[0]), ("other", forms[0])])["kernels, ms"].tolist()[0] == "—"
        assert "kernels, ms" not in speed.table([("one", bare[0])])

    @pytest.mark.parametrize(
        ("milliseconds", "peak", "said"),
        [
            (0.5 * PEFT_MS, 0.5 * PEFT_BYTES, "in time the target is reached, in memory it is reached"),
            (2 * PEFT_MS, 2 * PEFT_BYTES, "in time the target is missed, in memory it is missed"),
        ],
    )
    def test_the_step_is_judged_by_the_numbers(self, milliseconds, peak, said):
        found = recorded_mixture().found
        steps = {size: tuple(replace(each, median_ms=milliseconds, peak_bytes=peak) for each in forms)
                 for size, forms in found.steps.items()}  # fmt: skip
        assert said in speed.step_sentence(replace(found, steps=steps))
        first = next(iter(steps))
        slow = tuple(replace(each, median_ms=2 * PEFT_MS) for each in steps[first])
        quick = {size: tuple(replace(each, median_ms=1.0) for each in forms) for size, forms in steps.items()}
        assert "reached with 2 and 8 alone" in speed.step_sentence(replace(found, steps=quick | {first: slow}))
        assert all(CHOSEN in [each.name for each in forms] for forms in steps.values())
