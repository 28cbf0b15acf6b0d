"""The whole model's Training, Ablation and Throughput views in Streamlit's own test harness, on the real runtime."""

import json

import numpy as np
import pytest

from engine.experiments import (
    _full_model_recorded,
    full_model,
    full_model_ablation,
    full_model_throughput,
    full_model_training,
)
from engine.experiments._full_model import SWITCHES
from engine.experiments._training_diary import Sample
from tests.benchmarks import full_model_runs
from tests.ui.lab_pages import finished, words
from ui.charts import full_model_runs as charts
from ui.full_model import ablation, throughput, training
from ui.labs import FULL_MODEL
from ui.prose import plain

SMALL = {"d_model": 32, "num_layers": 1, "num_heads": 2, "rank": 2, "batch_size": 2, "length": 32}
TRAINING, ABLATION, THROUGHPUT = "Training", "Ablation", "Throughput"


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens one of the views, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda view, **query: open_page(FULL_MODEL, SMALL | {"view": view} | query)


def press(app, key):
    app.button(key=key).click()
    return finished(app)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


class TestTraining:
    def test_nothing_runs_unasked_then_it_learns_and_speaks(self, lab):
        app = lab(TRAINING, training_steps=10, training_prompt="One day")
        assert "a link brings settings, not results" in words(app)
        press(app, "_full_model_training_train")
        found = app.session_state["_run_full_model_training_run"].result
        said = words(app)
        assert "All 10 steps were taken" in said
        assert "On: LoRA, 4-bit base, FlashAttention, MoE-LoRA." in said
        assert training.loss_sentence(found) in said
        assert training.speed_sentence(found) in said
        assert training.balance_sentence(found) in said
        assert "It goes on after “One day”" in said
        told = [sample.text.strip() for sample in reversed(found.samples)]
        assert [element.value.strip() for element in app.text] == told
        assert [metric.label for metric in app.metric] == ["Learning", "Model", "Memory of a step", "Tokens"]
        loss = spec(app, "full_model_training_loss")
        assert [trace["name"] for trace in loss["data"]] == ["learned text", "smoothed", "held-out text"]
        assert spec(app, "full_model_training_loads")["data"][0]["type"] == "heatmap"

    def test_a_switch_waits_for_the_button_and_without_mixtures_there_is_no_load(self, lab):
        app = lab(TRAINING, training_steps=10)
        press(app, "_full_model_training_train")
        app.toggle(key="full_model_moe").set_value(False)
        finished(app)
        assert "had other settings" in words(app)
        press(app, "_full_model_training_train")
        assert "Which experts the tokens go to" not in words(app)
        assert app.text_input(key="full_model_training_prompt").placeholder == "One day, Lily and Tom went to the"
        app.text_input(key="full_model_training_prompt").set_value("x" * 301)
        finished(app)
        assert "Prompt has 301 characters" in words(app) + "".join(error.value for error in app.error)
        assert "press “Train again”" not in words(app)  # which cannot be pressed

    @pytest.mark.parametrize(
        ("query", "said"),
        [
            ({"training_text": "no text"}, "Your text has 7 characters"),
            ({"training_prompt": "x" * 301}, "Prompt has 301 characters: give 300 at most."),
        ],
    )
    def test_what_cannot_be_learned_is_one_sentence_and_the_button_waits(self, lab, query, said):
        app = lab(TRAINING, **query)
        assert [said in error.value.replace("\\", "") for error in app.error] == [True]
        assert app.button(key="_full_model_training_train").disabled


class TestAblation:
    def test_rows_come_with_bars_numbers_and_a_sentence(self, lab):
        app = lab(ABLATION, ablation_steps=5, quantization="false", moe="false")
        said = "4 rows, made of what is switched on in the settings (LoRA, FlashAttention): nothing, each alone, all"
        assert said in words(app)
        press(app, "_full_model_ablation_run_start")
        found = app.session_state["_run_full_model_ablation_run"].result
        assert found.sentence in words(app)
        drawn = spec(app, "full_model_ablation_bars")
        assert drawn["data"][0]["y"] == [row.name for row in found.rows]
        assert app.table[0].value["On"].tolist() == ["nothing", "LoRA", "FlashAttention", "everything"]
        assert "embeddings, norms, base matrices in the rows nothing, FlashAttention;" in words(app)
        assert "Measured on" in words(app)

    def test_nothing_switched_on_is_one_sentence(self, lab):
        app = lab(ABLATION, lora="false", quantization="false", flash="false", moe="false")
        assert ["switch on one technique or more" in error.value for error in app.error] == [True]
        assert not [button for button in app.button if button.key == "_full_model_ablation_run_start"]


class TestThroughput:
    def test_points_come_for_writing_and_reading(self, lab):
        app = lab(THROUGHPUT)
        assert "batches of 1, 2 texts of 8, 16, 32 tokens" in words(app)
        press(app, "_full_model_throughput_run_start")
        found = app.session_state["_run_full_model_throughput_run"].result
        assert found.sentence in words(app)
        assert len(spec(app, "full_model_throughput_curves")["data"]) == 6
        before = spec(app, "full_model_throughput_curves")["layout"]["yaxis"]["title"]["text"]
        app.session_state["full_model_throughput_phase"] = throughput.PREFILL
        finished(app)
        assert spec(app, "full_model_throughput_curves")["layout"]["yaxis"]["title"]["text"] != before


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the benchmark writes of the smallest sizes."""
    path = tmp_path_factory.mktemp("record") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["full_model_runs", "--device", "cpu", "--small", "--json", str(path)])
        assert full_model_runs.main() == 0
    return path


class TestRecorded:
    """Below what is measured now, labelled, and there before anything is measured."""

    @pytest.fixture(autouse=True)
    def read(self, record, monkeypatch):
        monkeypatch.setattr(_full_model_recorded, "_RECORD", record)
        _full_model_recorded._runs.cache_clear()
        yield
        _full_model_recorded._runs.cache_clear()

    def test_an_ablation_is_there_before_the_button_is_pressed(self, lab):
        app = lab(ABLATION)
        said = words(app)
        assert "recorded" in said
        assert "not measured now" in said
        assert "A fresh model of 1 layers, 32 wide" in said
        found = _full_model_recorded.recorded_ablation(full_model.Params()).found
        assert plain(found.sentence) in [caption.value for caption in app.caption]
        assert spec(app, "full_model_ablation_recorded")["data"]
        assert not app.exception

    def test_a_throughput_follows_what_is_timed(self, lab):
        app = lab(THROUGHPUT)
        drawn = spec(app, "full_model_throughput_recorded")["data"]
        assert "not measured now" in words(app)
        assert "Recorded with LoRA, 4-bit base, FlashAttention, MoE-LoRA on, whatever is switched on here." in words(
            app
        )
        app.button_group(key="full_model_throughput_phase").set_value(throughput.PREFILL)
        finished(app)
        assert spec(app, "full_model_throughput_recorded")["data"] != drawn
        assert not app.exception

    def test_without_a_record_nothing_is_said_of_one(self, lab, monkeypatch, tmp_path):
        monkeypatch.setattr(_full_model_recorded, "_RECORD", tmp_path / "none.json")
        _full_model_recorded._runs.cache_clear()
        for view in (ABLATION, THROUGHPUT):
            app = lab(view)
            assert "recorded" not in words(app)
            assert not app.exception


def trained(**changes):
    made = {
        "step": np.arange(1, 5), "loss": np.full(4, 3.0), "tokens_per_second": np.full(4, 100.0),
        "checked": np.array([0, 2, 4]), "held_out_loss": np.array([6.0, 4.0, 3.5]),
        "mixtures": ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"),
        "load": np.array([[[1.0, 1.0], [1.2, 0.8]]] * 2 + [[[1.1, 0.9], [1.8, 0.2]]]), "prompt": "Once",
        "samples": (Sample(0, "Once"),), "guessing": 6.2, "learning": 10, "parameters": 100, "model_bytes": 400,
        "step_bytes": 4000, "learning_rate": 0.01, "steps": 8, "tokens_per_step": 64, "ended": "finished",
        "ending": "All 4 steps were taken.", "seconds": 1.0, "device": "CPU", "versions": {"torch": "2.13"},
    }  # fmt: skip
    return full_model_training.Result(**made | changes)


class TestSentences:
    def test_overfitting_is_named(self):
        assert "by heart" not in training.loss_sentence(trained())
        grown = training.loss_sentence(trained(held_out_loss=np.array([6.0, 3.0, 3.5])))
        assert "lower after step 2, 3.00" in grown

    def test_time_that_no_step_took_is_named(self):
        said = training.seconds_sentence(trained(seconds=86.4, tokens_per_second=np.full(4, 4.0)))
        assert said == "It took 86.4 s, 64 of them in steps, the rest for samples and held-out losses."

    def test_uneven_load_is_named_with_its_mixture(self):
        said = training.balance_sentence(trained())
        assert "most is 80%, in layer 0, up." in said
        assert "45% more than its fair share" in said
        assert "That is uneven" in said
        assert "That is uneven" not in training.balance_sentence(trained(load=np.full((3, 2, 2), 1.0)))

    def test_the_axis_stays_while_it_runs(self):
        assert training.span(trained(ended="running")) == (0, 8)
        assert training.span(trained()) == (0, 4)

    def test_tables_hold_every_number(self):
        found = trained()
        table = training.loads_table(found)
        assert len(table) == found.load.size
        np.testing.assert_array_equal(table["load over fair share"], found.load.ravel())
        assert training.short("layers.11.mlp.down_proj") == "layer 11, down"

    def test_a_row_says_its_losses_and_its_spread(self):
        row = full_model_ablation.Row(
            "LoRA", ("lora",), (6.0, 6.0), (4.0, 5.0), 10, 8, 20, 6, 1000, 10**6, 10**5, 10, ("norms",), 0.01
        )
        found = full_model_ablation.Result((row,), 10, "", (), "running", "", "CPU", {})
        assert ablation.numbers(found)["Loss, end"].tolist() == ["4.50\u00a0(4.00\u00a0to\u00a05.00)"]
        assert (ablation.bars(found)[0].low, ablation.bars(found)[0].high) == (500, 1250)
        exported = ablation.table(found).iloc[0]
        assert (exported["last loss, seed 1"], exported["lora"], exported["moe"]) == (5.0, True, False)

    def test_a_row_that_diverged_at_once_has_dashes_for_numbers(self):
        nan = float("nan")
        row = full_model_ablation.Row(
            "nothing", (), (6.0,), (nan,), nan, nan, nan, 0, nan, 0, 10**6, 10, ("norms",), 10
        )
        found = full_model_ablation.Result((row,), 4, "", (), "running", "", "CPU", {})
        shown = ablation.numbers(found).iloc[0]
        assert [shown[name] for name in ("Loss, end", "ms a step", "Tokens/s", "Step's peak")] == ["diverged", *"———"]
        assert charts.ablation(ablation.bars(found), 4).layout.xaxis2.range[1] > 0

    @pytest.mark.parametrize(
        ("on", "said"),
        [
            (["moe"], "2 rows, made of what is switched on in the settings (MoE-LoRA): nothing, each alone. "),
            (["lora", "moe", "flash"], "8 rows, made of what is switched on in the settings (LoRA, FlashAttention, "),
        ],
    )
    def test_the_rows_are_told_beforehand(self, on, said):
        switches = {name: name in on for name in SWITCHES}
        plan = ablation.plan_sentence(full_model_ablation.Params(**switches))
        assert plan.startswith(said)
        assert ("all but one" in plan) == (len(on) > 2)

    def test_a_faster_run_is_a_higher_speed(self):
        point = full_model_throughput.Point("decode", 4, 32, 10.0, 8.0, 20.0, 7, 400.0)
        found = full_model_throughput.Result((point,), 24, "", (), "running", "", "CPU", {})
        (latency,), (speed,) = throughput.lines(found, "decode")
        assert (latency.values, latency.low, latency.high) == ([10.0], [8.0], [20.0])
        assert (speed.values, speed.low, speed.high) == ([400.0], [200.0], [500.0])
        assert throughput.lines(found, "prefill") == [[], []]
