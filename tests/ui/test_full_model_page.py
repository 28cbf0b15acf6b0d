"""The whole model's lab in Streamlit's own test harness, on the real runtime and small sizes."""

import json
from dataclasses import replace

import pytest

from engine.experiments import full_model, full_model_step
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.full_model_step import Step
from engine.experiments.full_model_switches import Result
from engine.measure import Evidence
from tests.ui.lab_pages import finished, words
from ui.charts.memory import amount
from ui.full_model import measuring, predict, sentences
from ui.full_model.explore import VIEWS
from ui.full_model.predict import NONE
from ui.full_model.settings import BARS, SAVES, SLOWS
from ui.labs import FULL_MODEL

SMALL = {"d_model": 64, "batch_size": 2, "length": 32, "rank": 4}


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens the lab, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda **query: open_page(FULL_MODEL, SMALL | query)


def flip(app, name):
    toggle = app.toggle(key=f"full_model_{name}")
    toggle.set_value(not toggle.value)
    return finished(app)


def press(app, key):
    app.button(key=key).click()
    return finished(app)


def spec(app, key):
    return json.loads(app.get_by_key(f"full_model_{key}").proto.spec)


def annotations(app, key):
    return [note["text"].replace("\u00a0", " ") for note in spec(app, key)["layout"]["annotations"]]


def chosen(**changes):
    return full_model.compute(SwitchParams(**SMALL | changes)).chosen


def step(median=10.0, low=9.0, high=11.0, peak=1_000_000, on=(), rounds=None):
    found = Evidence(median, low, high, 5, "2 runs", "a device", "float32", "a step", {"torch": "2.13"})
    return Step(on, found, rounds or (median,), 100, 1000, 2000, peak, peak, 6.2, "a kernel", 1.0)


class TestBars:
    def test_a_flip_moves_both_bars_and_leaves_a_ghost(self, lab):
        app = lab()
        every = ", ".join(SWITCHES.values())
        assert annotations(app, "memory")[0] == f"<b>As set: {every}</b>"
        assert f"computed: {amount(chosen().memory.peak.total)}".replace("\u00a0", " ") in words(app)
        assert annotations(app, "speed").count("not measured") == 5
        flip(app, "quantization")
        assert annotations(app, "memory")[0] == "<b>As set: LoRA, FlashAttention, MoE-LoRA</b>"
        assert f"computed: {amount(chosen(quantization=False).memory.peak.total)}".replace("\u00a0", " ") in words(app)
        assert annotations(app, "speed").count("not measured") == 4
        assert any(f"4-bit base {word}" in words(app) for word in ("makes a step", "adds about", "takes off about"))

    def test_what_was_measured_is_shown_again_and_measured_again_if_asked_for(self, lab):
        app = flip(flip(lab(), "moe"), "moe")
        steps = dict(app.session_state["_full_model_steps"])
        assert len(steps) == 2
        press(app, "_full_model_measure_again")
        again = app.session_state["_full_model_steps"]
        assert [again[key] == value for key, value in steps.items()].count(False) == 1

    def test_every_switch_is_measured_at_a_button(self, lab):
        app = press(lab(), "_full_model_measure_all")
        assert "not measured" not in annotations(app, "speed")
        assert len(app.session_state["_full_model_steps"]) == 2 + len(SWITCHES)
        assert "—" not in app.dataframe[0].value.to_string()
        assert len(spec(app, "memory")["data"][-1]["x"]) == 6
        assert "All were timed in 5 turns" in words(app)
        assert "range of 5 turns" in words(app)
        assert "With everything off it takes" in words(app)

    def test_the_table_has_the_numbers_of_every_combination(self, lab):
        table = lab(flash="false").dataframe[0].value
        assert table["combination"].tolist() == [
            "As set", "without LoRA", "without 4-bit base", "with FlashAttention", "without MoE-LoRA", "everything off",
        ]  # fmt: skip
        found = full_model.compute(SwitchParams(**SMALL, flash=False))
        assert table["training FLOPs/token"].tolist()[0] == f"{found.chosen.flops.step:,.0f}"
        assert table["numbers"].tolist()[0] == f"{found.chosen.total.total:,}"
        assert table["learn"].tolist()[-1] == f"{found.off.total.learning:,}"

    def test_pinned_it_stays_beside_what_comes(self, lab):
        app = flip(press(lab(), "_full_model_pin_set"), "lora")
        assert "A, pinned" in annotations(app, "memory")
        assert "A: lora on · B: lora off" in words(app)

    @pytest.mark.parametrize(
        ("query", "sentence"),
        [
            ({"num_heads": 5}, "must divide Width"),
            ({"experts": 2, "top_k": 4}, "choose at most 2"),
            ({"d_model": 32, "rank": 64}, "at most 32"),
        ],
    )
    def test_settings_that_make_no_sense_get_one_sentence(self, lab, query, sentence):
        app = lab(**query)
        assert [sentence in error.value for error in app.error] == [True]
        assert not app.get("plotly_chart")

    @pytest.mark.parametrize("query", [{"rank": "many"}, {"begin": "gpt"}, {"batch_size": "-3"}])
    def test_a_link_that_makes_no_sense_is_told_and_opens(self, lab, query):
        app = lab(**query)
        assert len(app.warning) == 1
        assert "is used instead" in app.warning[0].value

    def test_what_takes_too_long_for_a_processor_is_predicted_and_not_measured(self, lab):
        app = lab(d_model=512, num_layers=12, batch_size=16, length=128)
        assert "times less in all" in words(app)
        assert "A run sets aside" in words(app)
        assert annotations(app, "speed").count("not measured") == 6
        assert "has not been measured yet" in words(app)

    def test_no_result_is_called_previous_that_is_not_on_the_page(self, lab):
        app = lab()
        app.slider(key="full_model_d_model").set_value(512)
        app.slider(key="full_model_num_layers").set_value(12)
        app.slider(key="full_model_batch_size").set_value(64)
        finished(app)
        assert annotations(app, "speed")[-1] == "not measured"
        assert "previous result" not in words(app)
        assert "the bars are what is predicted of them" in words(app)
        asked = full_model_step.Params(**SMALL | {"d_model": 512, "num_layers": 12, "batch_size": 64})
        assert f"sets aside {amount(asked.memory_bytes())}".replace("\u00a0", " ") in words(app)

    def test_the_storyteller_has_its_own_sizes(self, lab):
        app = lab(begin="storyteller", batch_size=1)
        assert "full_model_d_model" not in [slider.key for slider in app.slider]
        assert f"{chosen(begin='storyteller', batch_size=1).total.learning:,}" in app.dataframe[0].value.to_string()
        app.segmented_control(key="full_model_begin").set_value("fresh")
        finished(app)
        assert app.slider(key="full_model_d_model").value == SMALL["d_model"]


class TestGuesses:
    def test_they_are_judged_by_what_is_measured_after_them(self, lab):
        app = lab(tab="Predict")
        app.segmented_control(key=SAVES).set_value("FlashAttention")
        app.segmented_control(key=SLOWS).set_value("LoRA")
        finished(app)
        press(app, "_full_model_guess_start")
        assert words(app).count("You said") == 2
        assert "You said FlashAttention. Measured:" in words(app)

    def test_both_are_made_before_it_is_measured(self, lab):
        app = lab(tab="Predict")
        assert app.button(key="_full_model_guess_start").disabled
        app.segmented_control(key=SAVES).set_value("FlashAttention")
        assert finished(app).button(key="_full_model_guess_start").disabled
        app.segmented_control(key=SLOWS).set_value(NONE)
        assert not finished(app).button(key="_full_model_guess_start").disabled

    def test_of_a_measurement_without_guesses_nothing_is_told(self, lab):
        app = press(lab(), "_full_model_measure_all")
        app.session_state["full_model_tab"] = "Predict"
        finished(app)
        assert "Nothing was guessed before this measurement" in words(app)
        flip(app, "lora")
        assert "The settings have changed since this measurement" in words(app)

    def pairs(self, **changes):
        alike = {name: (step(), step()) for name in SWITCHES}
        return alike | changes

    def test_who_saves_most_is_who_saves_most(self):
        pairs = self.pairs(flash=(step(peak=5), step(peak=9)), lora=(step(peak=3), step(peak=5)))
        assert predict.memory_answer(pairs, "FlashAttention")[0]
        right, said = predict.memory_answer(pairs, "LoRA")
        assert not right
        assert said.endswith("It is FlashAttention.")
        costly = {name: (step(peak=9), step(peak=5)) for name in SWITCHES}
        assert predict.memory_answer(costly, NONE) == (True, predict.memory_answer(costly, NONE)[1])
        assert not predict.memory_answer(costly, "LoRA")[0]

    def in_turns(self, *times):
        return step(sorted(times)[len(times) // 2], min(times), max(times), rounds=times)

    def test_who_slows_most_does_in_every_turn(self):
        quick = self.in_turns(10, 11, 10)
        far = {
            "quantization": (self.in_turns(15, 16, 15), quick),
            "lora": (self.in_turns(9, 9, 9), self.in_turns(20, 21, 20)),
            "flash": (self.in_turns(11, 12, 11), quick),
        }
        assert predict.speed_answer(far, "4-bit base")[0]
        right, said = predict.speed_answer(far, "LoRA")
        assert right is False
        assert said.endswith("It is 4-bit base.")
        assert predict.speed_answer({"lora": far["lora"]}, NONE)[0]

    @pytest.mark.parametrize("guessed", [NONE, "4-bit base", "FlashAttention"])
    def test_what_cannot_be_told_apart_grades_nobody(self, guessed):
        close = {
            "quantization": (self.in_turns(12, 9, 13), self.in_turns(10, 10, 10)),
            "flash": (self.in_turns(8, 8, 8), self.in_turns(10, 10, 10)),
        }
        right, said = predict.speed_answer(close, guessed)
        assert right is None
        assert "4-bit base adds about 2 ms, which is within the spread" in said
        assert said.endswith(
            "cannot tell whether it is 4-bit base or none of them: your guess is neither right nor wrong."
        )

    def test_stopped_it_is_neither_right_nor_wrong(self):
        assert not Result(None, {}, None).is_complete


class TestSentences:
    def test_the_prediction_is_held_against_the_measurement(self):
        found = full_model.compute(SwitchParams())
        total = found.chosen.memory.peak.total
        same = replace(step(peak=total), predicted_bytes=total)
        assert "as predicted" in sentences.memory_sentence(found, same)
        assert "3.0% off the prediction" in sentences.memory_sentence(
            found, replace(same, predicted_bytes=round(0.97 * total))
        )
        assert "measured" not in sentences.memory_sentence(found, None)

    def test_the_largest_effect_comes_first(self):
        found = full_model.compute(SwitchParams(length=256))
        said = sentences.memory_sentence(found, None).partition("as they are set, ")[2]
        effects = {name: abs(sentences.saved_bytes(found, name)) for name in SWITCHES}
        assert said.startswith(SWITCHES[max(effects, key=effects.__getitem__)])
        assert sentences.memory_effect(0) == "changes nothing"
        assert sentences.memory_effect(-2_000_000).startswith("costs 2")

    @pytest.mark.parametrize("moment", chosen().memory.moments, ids=lambda moment: moment.name)
    def test_every_moment_has_its_place_in_the_sentence(self, moment):
        said = sentences.when(moment)
        assert said.split(" the ")[0] in ("in", "at", "while")
        assert said.startswith("while") or said.endswith(moment.name)

    def test_what_four_bits_save_by_themselves_and_by_what_they_freeze(self):
        alone = dict.fromkeys(SWITCHES, False)
        on, off = full_model.compute(SwitchParams(**alone)).worth("quantization")
        said = sentences.four_bits_sentence(on, off).replace("\u00a0", " ")
        assert (
            "the weights themselves are 1.38 MB smaller; what is frozen does without optimizer state 3.21 MB, " in said
        )
        assert said.endswith("only embeddings and norms, 66,176 numbers instead of 467,584.")
        assert said in sentences.memory_sentence(full_model.compute(SwitchParams(**alone)), None).replace("\u00a0", " ")
        assert "and that is all" in sentences.four_bits_sentence(
            *full_model.compute(SwitchParams()).worth("quantization")
        )
        adapted = full_model.compute(SwitchParams(lora=False)).worth("quantization")
        assert "embeddings" not in sentences.four_bits_sentence(*adapted)
        wide = full_model.compute(SwitchParams(d_model=512, batch_size=1, length=16)).worth("quantization")
        assert "smaller, but the rest of a step takes 2.37 MB more" in sentences.four_bits_sentence(*wide).replace(
            "\u00a0", " "
        )

    @pytest.mark.parametrize(
        ("runs", "rounds", "ends"),
        [
            (5, None, (9, 11, "spread of 5 runs")),
            (10, None, (9, 11, "10th to 90th percentile")),
            (50, (12.0, 8.0, 10.0), (8, 12, "range of 3 turns")),
        ],
    )
    def test_percentiles_are_of_many_runs(self, runs, rounds, ends):
        timed = step(10, 9, 11, rounds=rounds)
        timed = replace(timed, evidence=replace(timed.evidence, runs=runs))
        assert sentences.spread(timed) == ends
        assert f"({ends[2]} {ends[0]} to {ends[1]})" in sentences.speed_sentence(timed, {})

    def test_everything_off_is_compared_too(self):
        slow = step(20, 19, 21, on=("lora", "moe"))
        said = sentences.speed_sentence(slow, {"moe": step(15, 13, 20)}, step(10, 9, 11))
        assert "MoE-LoRA adds about 5 ms, which is within the spread" in said
        assert "With everything off it takes 10 ms: what is on makes a step 2.00 times slower." in said

    def test_four_bits_are_said_to_take_time_where_they_do(self):
        slow, quick = step(20, 19, 21, on=("quantization",)), step(10, 9, 11)
        said = sentences.speed_sentence(slow, {"quantization": quick})
        assert "4-bit base makes a step 2.00 times slower" in said
        assert "4 bits take time" in said
        assert "Not all were timed in turns" in said
        alike = sentences.speed_sentence(step(10, 9, 11, on=("quantization",)), {"quantization": step(10.5, 9, 12)})
        assert "4-bit base takes off about 0.5 ms, which is within the spread" in alike
        assert "4 bits take time" not in alike
        faster = sentences.speed_sentence(quick, {"quantization": slow, "lora": None})
        assert "4-bit base makes a step 2.00 times slower" in faster
        assert "LoRA" not in faster
        assert "flip it back" in sentences.speed_sentence(slow, dict.fromkeys(SWITCHES))
        assert "1.50 times faster" in sentences.speed_effect(step(10, 9, 11), step(15, 14, 16))


@pytest.mark.parametrize(
    ("on", "off", "said"),
    [
        ((20.0, 12.0, 11.0), (19.0, 10.0, 9.0), "slower"),  # though the machine was busy in the first turn
        ((9.0, 8.0, 10.0), (11.0, 12.0, 13.0), "faster"),
        ((9.0, 8.0, 14.0), (11.0, 12.0, 13.0), "takes off about 3 ms, which is within the spread"),
    ],
)
def test_what_was_timed_in_turns_is_compared_turn_by_turn(on, off, said):
    one = step(sorted(on)[1], 1.0, 100.0, on=("lora",), rounds=on)
    other = step(sorted(off)[1], 1.0, 100.0, rounds=off)
    assert said in sentences.speed_effect(one, other)
    assert "timed in 3 turns" in sentences.speed_sentence(one, {"lora": other})


def test_the_properties_hold_on_the_settings(lab):
    app = lab(tab="Tests")
    assert "12 of 12 properties hold on these settings." in words(app)


def test_the_code_is_the_engines_own(lab):
    assert "def optimize" in "".join(block.value for block in lab(tab="Code").code)


def test_bars_are_the_first_view():
    assert next(iter(VIEWS)) == BARS


def test_settings_of_different_experiments_are_compared_by_switches_and_sizes():
    params = full_model.Params(**SMALL)
    assert measuring.settings_of(params) == SwitchParams(**SMALL)
    assert measuring.settings_of(params, lora=False) == SwitchParams(**SMALL, lora=False)
