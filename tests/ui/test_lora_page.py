"""The LoRA lab in Streamlit's own test harness, on the real runtime, the small model and few steps."""

import io
import json
import math
import shutil
import struct
import threading
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from engine import local_models
from engine.errors import InputError
from engine.experiments import _lora, lora, lora_sweep
from tests.ui.lab_pages import APP, SECONDS, finished, words
from ui.charts import lora as charts
from ui.labs import LORA
from ui.lora import predict, size, speed, sweep
from ui.lora.explore import VIEWS
from ui.lora.inside import grid
from ui.lora.settings import count, probability, share
from ui.lora.spectrum import energy_sentence, label, labels, spectrum_sentence
from ui.lora.upload import CONFIG_FILE, MAX_MEGABYTES, WEIGHTS_FILE, IncompleteError, adapter_files

FACTS = "Who lives in the red house? Mina\nWhat does Odo bake? | cakes"
SHORT = {"steps": 12, "batch_size": 4, "rank": 2, "facts": FACTS}
TOWN = {"facts": ""}


@pytest.fixture
def lab(open_page, monkeypatch, tmp_path):
    """Opens the lab, as a browser with this query string would."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return lambda **query: open_page(LORA, SHORT | query)


def train(app):
    app.button(key="_lora_train").click()
    return finished(app)


def look(app, view):
    app.session_state["lora_view"] = view
    return finished(app)


def spec(app, key):
    return json.loads(app.get_by_key(key).proto.spec)


class TestSize:
    def test_it_is_drawn_before_anything_runs(self, lab):
        app = lab(rank=8)
        assert spec(app, "lora_scale")["data"][0]["name"] == "W, frozen"
        numbers = _lora.adapter_parameters(_lora.SHAPES[0], 8, "all").total
        assert [metric.value for metric in app.metric][:2] == [count(numbers), share(numbers / 5_769_472)]

    def test_the_rank_moves_the_strips_and_the_numbers(self, lab):
        app = lab(rank=8)
        before, trained = spec(app, "lora_scale"), app.metric[0].value
        app.slider(key="lora_rank").set_value(32)
        finished(app)
        after = spec(app, "lora_scale")
        assert before["data"][0] == after["data"][0]
        assert before["data"][1] != after["data"][1]
        assert before["layout"]["xaxis"]["range"] == after["layout"]["xaxis"]["range"]
        assert app.metric[0].value != trained

    def test_shape_and_matrix_of_a_link(self, lab):
        app = lab(shape="Llama 3 70B", matrix="down_proj", rank=16)
        assert "beside the 234,881,024 of W" in words(app)
        assert "thinner than a pixel" in words(app)
        assert "One layer of Llama 3 70B, of 80" in words(app).replace("*", "")

    def test_the_shape_follows_the_model_but_not_against_the_link(self, lab):
        assert lab(model="smollm2-135m").selectbox(key="lora_shape").value == "SmolLM2-135M"
        app = lab(model="smollm2-135m", shape="Llama 7B")
        assert app.selectbox(key="lora_shape").value == "Llama 7B"

    def test_a_matrix_without_update_is_said(self, lab):
        assert "this matrix gets no update" in words(lab(targets="query and value", matrix="gate_proj"))
        assert "this matrix gets no update" not in words(lab(targets="query and value", matrix="q_proj"))

    @pytest.mark.parametrize(("inputs", "outputs"), [(256, 128), (256, 768)])
    def test_the_sentence_adds_up(self, inputs, outputs):
        said = size.scale_sentence(inputs, outputs, 64)
        assert f"{64 * (inputs + outputs):,} numbers" in said
        assert ("no fewer numbers" in said) == (64 * (inputs + outputs) >= inputs * outputs)


class TestFineTuning:
    def test_what_is_learned_is_told_before_anything_runs(self, lab):
        app = lab(view="Fine-tune", **TOWN)
        assert "learns 60 facts about a town" in words(app)
        assert "a link brings settings, not results" in words(app)
        assert app.table[0].value["Trained on"][0].replace("\\", "") == _lora.read_facts()[0].training[0]

    def test_a_run_ends_with_the_answers_before_and_after_and_the_adapter(self, lab):
        app = train(lab(**TOWN))
        assert app.session_state["lora_view"] == "Fine-tune"
        found = app.session_state["_run_lora_run"].result
        assert "All 12 steps were taken" in words(app)
        assert f"{found.trainable:,} of {found.parameters:,} numbers" in words(app)
        table = app.table[0].value
        assert len(table) == len(found.answers)
        right = sum(":green-badge[:material/check: right]" in said for said in table["After"])
        assert right == sum(answer.right_after for answer in found.answers)
        assert all("right]" in said or "wrong]" in said for said in [*table["Before"], *table["After"]])
        assert [button.label for button in app.get("download_button")] == ["Save adapter"]
        with zipfile.ZipFile(io.BytesIO(found.archive)) as archive:
            names = {Path(name).name for name in archive.namelist()}
        assert {CONFIG_FILE, WEIGHTS_FILE} <= names
        app.session_state["lora_answers"] = "Paraphrases"
        finished(app)
        assert len(app.table[0].value) == sum(answer.held_out for answer in found.answers)

    def test_own_facts_are_learned(self, lab):
        app = train(lab(steps=40, learning_rate=0.01))
        assert "Your own facts have no paraphrases" in words(app)
        assert "Of the facts, each asked in one of the wordings that it trains on, 0% were" in words(app)
        assert "100% of the probability" not in words(app)
        assert not [control for control in app.get("button_group") if "lora_answers" in control.proto.id]
        assert sorted(app.table[0].value["Answer"]) == ["Mina", "cakes"]
        assert "0 of 2 answers were right before, 2 are now" in words(app)

    def test_other_settings_wait_for_the_button(self, lab):
        app = train(lab())
        app.slider(key="lora_rank").set_value(4)
        finished(app)
        assert "had other settings" in words(app)
        assert app.session_state["_run_lora_run"].result_params.rank == 2
        train(app)
        assert app.session_state["_run_lora_run"].result_params.rank == 4
        assert "had other settings" not in words(app)

    def test_during_a_run_nothing_starts_another_and_cancel_keeps_what_was_learned(self, lab):
        app = lab(steps=1000)
        app.button(key="_lora_train").click().run()
        end = time.monotonic() + SECONDS
        while "So far the loss" not in words(app):  # 1000 steps, so that it is still under way
            assert time.monotonic() < end
            time.sleep(0.1)
            app.run()
        assert app.button(key="_lora_train").disabled
        assert not app.get("download_button")
        app.session_state["lora_view"] = "Size"
        app.run()
        assert app.progress
        assert app.session_state["_run_lora_run"].ticket is not None
        app.session_state["lora_view"] = "Fine-tune"
        app.run()
        app.button(key="_cancel_lora_run").click()
        finished(app)
        assert "Cancelled after step" in words(app)
        assert not app.button(key="_lora_train").disabled
        assert [button.label for button in app.get("download_button")] == ["Save adapter"]

    def test_a_rate_that_is_too_high_is_named(self, lab):
        app = train(lab(learning_rate=10, steps=60))
        assert "Training diverged at step" in words(app)
        assert "What was learned until then is shown" in words(app)
        assert "What suits LoRA here is about 0.005" in words(app)
        assert "The weights moved by" in words(look(app, "Inside the update"))


class TestInside:
    def test_there_is_nothing_before_a_run(self, lab):
        assert "no update to look into yet" in words(lab(view="Inside the update"))

    @pytest.mark.parametrize("method", ["LoRA", "DoRA", "PiSSA", "full fine-tuning"])
    def test_every_method_has_its_maps_and_its_spectrum(self, lab, method):
        app = train(lab(view="Inside the update", method=method))
        found = app.session_state["_run_lora_run"].result
        table = np.array(app.session_state["_run_lora_run"].result.relative_norm)
        assert f"{label(found.layers[int(table.argmax())])}" in words(app)
        median = np.median(found.effective_rank)
        told = f"it is {found.effective_rank[table.argmax()]:.1f}, and {median:.1f} in the median of all matrices"
        assert told in words(app)
        if method == "full fine-tuning":
            assert "no gradients of theirs" in words(app)
        elif method == "PiSSA":
            assert "not 0: PiSSA starts from the weight's own directions" in words(app)
        else:
            assert found.grad_norm_a[0] == 0
            assert "A's gradient is exactly 0" in words(app)
            assert "Merged, W + ΔW is one matrix again" in words(app)

    @pytest.mark.parametrize("sigma", [(3.0, 1.0, 0.5), (1.0, 1.0, 1.0), (9.0, 0.1, 0.1)])
    def test_the_share_in_words_is_the_one_that_is_drawn(self, sigma):
        found = spectra(2, sigma)
        drawn = charts.energy(np.array(sigma), 1.0).data[0].y
        enough = next(place for place, held in enumerate(drawn) if held >= 0.9)
        assert f" {drawn[enough]:.0%} of ‖ΔW‖²" in energy_sentence(found, 0)

    def test_another_matrix_is_opened(self, lab):
        app = train(lab(view="Inside the update"))
        found = app.session_state["_run_lora_run"].result
        app.selectbox(key="lora_layer").set_value(found.layers[3])
        finished(app)
        assert f"{label(found.layers[3]).capitalize()}: the largest singular value is" in words(app)
        assert spec(app, "lora_inside_spectrum")["data"][1]["name"] == label(found.layers[3])


class TestPredicting:
    def test_the_share_is_told_nowhere_before_the_guess(self, lab):
        app = lab(tab="Predict", rank=8)
        assert not any(number in words(app) for number in ("233,472", "233 k", "4%"))
        app = lab(tab="Predict", rank=8, share="10%")
        whole = lora.Params(rank=8).predict().parameters
        assert f"You said 10%, it is 4%: 233,472 of {whole:,}, 2.5 times less." in words(app)
        assert "233 k" in words(app)

    @pytest.mark.parametrize("rank", [1, 2, 8, 16, 32, 64])
    @pytest.mark.parametrize("method", ["LoRA", "full fine-tuning"])
    def test_one_choice_is_right_and_close(self, rank, method):
        cost = lora.Params(rank=rank, method=method).predict()
        right = [part for part in predict._SHARES if predict.share_sentence(part, cost)[0]]
        assert len(right) == 1
        assert max(right[0] * cost.parameters / cost.trainable, cost.trainable / cost.parameters / right[0]) < 1.6

    def test_a_guess_is_kept_as_the_training_starts(self, lab):
        app = lab(tab="Predict", guess=20, steps=1000)
        app.button(key="_lora_train").click().run()
        end = time.monotonic() + SECONDS
        while "You said 20%" not in words(app):
            assert time.monotonic() < end
            time.sleep(0.1)
            app.run()
        assert app.slider(key="lora_guess").disabled
        assert "well guessed" not in words(app)
        app.button(key="_cancel_lora_run").click()
        finished(app)
        app.slider(key="lora_guess").set_value(100).run()
        assert "You said 20%" in words(app)
        assert "the run was cancelled before: your guess is neither right nor wrong" in words(app)
        assert "expected" not in words(app)

    def test_a_training_that_diverges_judges_no_guess(self, lab):
        app = train(lab(tab="Predict", guess=0, learning_rate=10, steps=60))
        assert "but the run diverged before" in words(app)
        assert "well guessed" not in words(app)

    def test_a_guess_that_was_never_made_is_not_judged(self, lab):
        app = train(lab())
        app.session_state["lora_tab"] = "Predict"
        finished(app)
        assert "Nothing was guessed before this run" in words(app)
        assert "You said" not in words(app)

    def test_the_guess_lies_beside_what_was_measured(self, lab):
        app = lab(tab="Predict", guess=0, steps=40, learning_rate=0.01)
        assert "Set your guess" in words(app)
        train(app)
        assert "You said 0%, it is 100% after step 40: the model learned more than you expected" in words(app)
        app.slider(key="lora_guess").set_value(95)
        finished(app)
        assert "You said 0%" in words(app)  # a guess after the answer was seen is none
        train(app)
        assert "You said 95%, it is 100% after step 40: well guessed" in words(app)


def points():
    """Runs of ranks 1 to 64 and of all weights: quality grows with the rank, the last of the adapters diverged."""
    return [
        lora_sweep.Point(
            rank=rank,
            trainable=29_184 * (rank or 198),
            scaling=rank and 16 / rank,
            learning_rate=5e-3 if rank else 1e-3,
            final_loss=2 / (rank or 64),
            accuracy=0.5,
            held_out_accuracy=accuracy,
            seconds=3.0,
            diverged=rank == 64,
        )
        for rank, accuracy in ((1, 0.4), (2, 0.6), (4, 0.8), (8, 0.9), (16, 0.93), (32, 0.94), (64, 0.0), (None, 0.92))
    ]


class TestSweep:
    @pytest.fixture
    def opened(self, runtime):
        """The view on a runtime in threads, where a sweep shows its points and waits to be told to end."""
        self.going, self.asked = threading.Event(), []

        def run(params, job):
            self.asked.append(params)

            def result(count, ended):
                return lora_sweep.Result(points()[:count], 8, ended, "All runs are done.", "Test CPU", {"torch": "2"})

            job.show(lambda: result(3, "running"))
            self.going.wait(SECONDS)
            return result(8, "finished")

        runtime.stand_ins["lora_sweep"] = run
        app = AppTest.from_file(str(APP), default_timeout=SECONDS).run()
        app.switch_page("app_pages/lora.py")
        app.query_params.update({"lora_view": "Sweep", "lora_rank": "2"})
        return app.run()

    def test_points_appear_as_they_come_and_the_rank_is_ringed(self, opened):
        app = opened
        assert "what does each rank buy?" in words(app)
        assert "trains 198 times as many" in words(app)
        assert "s = α / rank falls" in words(app)
        app.button(key="_lora_sweep").click().run()
        app.run()
        assert "3 of 8 runs are done" in words(app)
        assert spec(app, "lora_sweep")["data"][0]["text"] == ["1", "2", "4"]
        assert app.button(key="_lora_sweep").disabled
        self.going.set()
        finished(app)
        assert len(self.asked) == 1
        drawn = spec(app, "lora_sweep")["data"]
        assert drawn[0]["text"][-1] == "full"
        assert drawn[3]["x"] == [2 * 29_184]
        assert "Best on paraphrases: rank 32 with 94%" in words(app)
        assert "Rank 8 gets 90% with 4 times fewer. Rank 64 diverged." in words(app)
        app.slider(key="lora_rank").set_value(16)
        finished(app)
        assert len(self.asked) == 1
        assert spec(app, "lora_sweep")["data"][3]["x"] == [16 * 29_184]

    def test_it_says_that_the_scale_changes_with_the_rank_at_one_rate_and_one_seed(self):
        said = sweep.sweep_sentence(lora_sweep.Result(points(), 8, "finished", "", "", {}))
        assert "s from 16 to 0.5" in said  # that of rank 64 diverged
        assert "one learning rate, 0.005 (full fine-tuning: 0.001)" in said
        assert "one seed" in said
        same = [replace(point, scaling=2.0) for point in points() if point.rank in (None, 8)]
        assert "s from" not in sweep.sweep_sentence(lora_sweep.Result(same, 2, "finished", "", "", {}))

    def test_every_point_tells_its_scale_and_its_rate(self):
        drawn = sweep.points(lora_sweep.Result(points(), 8, "finished", "", "", {}))
        assert drawn[1].settings == "s = 8, learning rate 0.005"
        assert drawn[-1].settings == "learning rate 0.001"

    def test_one_that_diverged_has_no_loss(self):
        drawn = sweep.points(lora_sweep.Result(points(), 8, "finished", "", "", {}))
        assert [math.isnan(point.loss) for point in drawn] == [point.rank == 64 for point in points()]

    def test_the_axis_has_room_for_all_from_the_start(self):
        low, high = sweep.span(lora_sweep.Params())
        assert (low, high) == (29_184, _lora.SHAPES[0].config.num_parameters)
        assert sweep.span(lora_sweep.Params(ranks=(8,), with_full=False)) == (8 * 29_184, 16 * 29_184)


@pytest.fixture
def log():
    """The recording of the training steps, as it is in its file."""
    return json.loads((APP.parent / "engine/recorded/lora_training_step_h200.json").read_text(encoding="utf-8"))


def said_of(log, run, way):
    """(median in ms, peak in GB) of one row of one run."""
    row = next(row for row in log["runs"][run]["rows"] if row["row"] == way)
    return row["evidence"]["median_ms"], row["peak_mb"] / 1e3


class TestSpeed:
    def test_every_bar_is_the_last_that_was_recorded(self, lab, log):
        app = lab(view="Speed")
        times, memory, floor, *_ = spec(app, "lora_speed")["data"]
        found = _lora.recorded_steps()
        newest = {row["row"]: row for run in log["runs"] for row in run["rows"]}
        assert {way: cost.median_ms for way, cost in found.latest.items()} == {
            way: row["evidence"]["median_ms"] for way, row in newest.items()
        }
        assert floor["x"] == [log["runs"][-1]["floor"]["floor_ms"]]
        assert speed.WAYS.keys() <= newest.keys()
        assert times["x"] == [newest[way]["evidence"]["median_ms"] for way in speed.WAYS]
        assert memory["x"] == pytest.approx([newest[way]["peak_mb"] / 1e3 for way in speed.WAYS])

    def test_it_says_where_and_when_and_what_each_run_was(self, lab, log):
        said = words(lab(view="Speed"))
        for part in ("H200", log["recorded"], "torch 2.11", "peft 0.21", "batch 4 × 1024, rank 16"):
            assert part in said
        assert all(run["note"] in said for run in log["runs"])

    def test_the_sentence_compares_equal_code_and_says_when_it_is_not(self):
        found = _lora.recorded_steps()
        said, cost = speed.speed_sentence(found), found.latest
        at = []
        for ours, theirs in (
            ("ours", "PEFT"),
            ("ours, Decoder", "PEFT, Decoder"),
            ("ours compiled", "PEFT compiled"),
            ("ours, Decoder", "PEFT"),
        ):
            fast, slow = cost[ours], cost[theirs]
            told = (
                f"{fast.median_ms:.1f} against {slow.median_ms:.1f} ms, {slow.median_ms / fast.median_ms:.1f}×, and "
                f"{fast.peak_bytes / 1e9:.1f} against {slow.peak_bytes / 1e9:.1f} GB"
            )
            assert told in said
            at.append(said.index(told))
        assert at[-1] > said.index("Ours in our Decoder beside PEFT in transformers'") > max(at[:-1])

    def test_it_tells_of_the_precision_that_is_part_of_the_difference(self):
        found = _lora.recorded_steps()
        said, cost = speed.precision_sentence(found), found.latest
        for way in ("ours bf16", "PEFT bf16", "ours bf16, Decoder", "PEFT bf16, Decoder"):
            assert f"{cost[way].median_ms:.1f}" in said
        without = tuple(step for step in found.measured if "bf16" not in step.way)
        assert "bfloat16 throughout" not in speed.precision_sentence(replace(found, measured=without))

    def test_the_profile_is_told_in_shares(self, log):
        profile = next(run["profile"] for run in log["runs"] if "profile" in run)
        said = speed.rest_sentence(_lora.recorded_steps())
        for kernels_ms in profile["kernels_ms"].values():
            assert f"{kernels_ms / profile['all_kernels_ms']:.0%}" in said
        assert "profile" not in speed.rest_sentence(replace(_lora.recorded_steps(), profiled=None))

    def test_it_does_not_hide_where_lora_is_slower_than_full_fine_tuning(self):
        found = _lora.recorded_steps()
        said, cost = speed.saving_sentence(found), found.latest
        for way in ("full", "ours", "PEFT"):
            assert f"{cost[way].median_ms:.1f}" in said
        assert cost["ours"].median_ms < cost["full"].median_ms < cost["PEFT"].median_ms
        assert "eager, PEFT's cost more time than they save" in said

    def test_losses_are_told_beside_repeated_runs_and_another_start(self, log):
        """As long as these two can be told apart, and beyond, where a repeated run drifts as far as another start."""
        found, runs = _lora.recorded_steps(), log["runs"][-1]["losses"]["runs"]
        said = speed.loss_sentence(found)

        def told(one, other, steps, digits):
            return f"{np.abs(np.subtract(runs[one], runs[other]))[:steps].max():.{digits}f}"

        pairs = [("ours", "PEFT"), ("PEFT", "PEFT again"), ("ours", "ours again"), ("PEFT", "PEFT, other A")]
        for steps, digits in ((7, 3), (8, 3), (50, 2)):
            places = [said.find(told(*pair, steps, digits)) for pair in pairs]
            assert min(places) >= 0
        assert f"bfloat16 {told('ours bf16', 'PEFT', 50, 2)} from PEFT" in said
        assert "weak after that" in said
        assert "within the spread" not in said

    def test_losses_of_runs_that_drift_at_once_are_said_to_tell_nothing(self):
        found = _lora.recorded_steps()
        drifting = found.losses | {"ours again": tuple(loss + 1 for loss in found.losses["ours"])}
        assert "cannot tell another start" in speed.loss_sentence(replace(found, losses=drifting))
        assert "cannot tell another start" not in speed.loss_sentence(found)

    def test_the_table_has_both_runs(self, log):
        table = speed.table(_lora.recorded_steps())
        assert len(table) == sum(len(run["rows"]) for run in log["runs"]) + 1
        assert set(table["note"]) >= {run["note"] for run in log["runs"]}

    def test_without_the_recording_it_says_so(self, lab, monkeypatch):
        monkeypatch.setattr(_lora, "recorded_steps", lambda: None)
        assert "recording is not there" in words(lab(view="Speed"))

    def test_the_figure_can_be_taken_home(self, lab):
        app = lab(view="Speed")
        app.session_state["lora_speed_export"] = True
        finished(app)
        assert {"HTML, interactive", "Data as CSV"} <= {button.label for button in app.get("download_button")}


def test_the_tests_tab_is_green_on_these_settings(lab):
    app = lab(tab="Tests")
    assert "properties hold on these settings" in app.success[0].value


def test_the_code_tab_shows_the_product_and_the_spectrum(lab):
    code = "\n".join(element.value for element in lab(tab="Code").code)
    assert "def adapted_linears(" in code
    assert "class _AdaptedLinears(" in code
    assert "def backward(" in code
    assert "def singular_values(" in code


class TestBadInput:
    def test_a_text_that_is_no_facts_is_one_sentence_and_stays(self, lab):
        app = lab(facts="This is a story without a question.")
        assert "is no fact: write" in words(app)
        assert not any(box.error for box in app.expander)  # it is seen while the facts are folded away
        assert app.text_area(key="lora_facts").value == "This is a story without a question."

    def test_nonsense_in_the_address_is_ignored_and_said(self, lab):
        app = lab(rank="banana", method="magic", learning_rate="fast")
        for nonsense in ("banana", "magic", "fast"):
            assert nonsense in words(app)

    @pytest.mark.parametrize("name", ["../../etc", "0" * 32, "x"])
    def test_an_adapter_that_is_not_here_is_said(self, lab, name):
        assert "not on this machine" in words(lab(view="Your adapter", adapter=name))


class File:
    def __init__(self, name, content):
        self.name, self._content = name, content

    def getvalue(self):
        return self._content


def zipped(**members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return File("it.zip", packed.getvalue())


def lying_zip(method):
    """Says that its weights are 1000 bytes; they are 30 MB."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        archive.writestr(WEIGHTS_FILE, bytes(30_000_000))
        archive.writestr(CONFIG_FILE, b"{}")
    raw = bytearray(packed.getvalue())
    struct.pack_into("<I", raw, raw.find(b"PK\x01\x02") + 24, 1000)
    return File("a.zip", bytes(raw))


WEIGHTS, CONFIG = File(WEIGHTS_FILE, b"w"), File(CONFIG_FILE, b"{}")
PACKED = {"folder__adapter_config_dot_json": b"{}", "folder__adapter_model_dot_safetensors": b"w"}


class TestUpload:
    @pytest.mark.parametrize(
        "given",
        [
            [WEIGHTS, CONFIG],
            [File("mine.safetensors", b"w"), File("config (1).json", b"{}")],
            [zipped(**PACKED, folder__README_dot_md=b"hello", tokenizer_dot_json=b"{}")],
        ],
    )
    def test_both_files_are_found(self, given):
        assert adapter_files(given) == {WEIGHTS_FILE: b"w", CONFIG_FILE: b"{}"}

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ([WEIGHTS], f"{CONFIG_FILE} is missing"),
            ([], "are missing"),
            ([WEIGHTS, WEIGHTS, CONFIG], "two files"),
            ([File("adapter_model.bin", b"x")], "pickle"),
            ([zipped(adapter_model_dot_bin=b"x")], "pickle"),
            ([zipped(readme_dot_md=b"x")], "holds no adapter"),
            ([File("a.zip", b"no zip at all")], "no readable zip"),
            ([File("cat.png", b"x")], "no part of an adapter"),
            ([zipped(**PACKED), CONFIG], "two files"),
            ([zipped(adapter_model_dot_safetensors=bytes(MAX_MEGABYTES * 1_000_000 + 1))], "unpacks to more than"),
        ],
    )
    def test_what_is_no_adapter_is_one_sentence(self, given, said):
        with pytest.raises(InputError, match=said):
            adapter_files(given)

    @pytest.mark.parametrize("cut", [30, 60, 100])
    def test_a_damaged_zip_is_one_sentence(self, cut):
        whole = zipped(**PACKED).getvalue()
        with pytest.raises(InputError, match="zip"):
            adapter_files([File("it.zip", whole[:cut])])

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_zip_whose_header_lies_takes_no_memory(self, method):
        packed = lying_zip(method)
        tracemalloc.start()
        try:
            with pytest.raises(InputError, match="zip"):
                adapter_files([packed])
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_compression_that_cannot_be_bounded_is_not_opened(self, method):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            archive.writestr(WEIGHTS_FILE, b"w")
            archive.writestr(CONFIG_FILE, b"{}")
        with pytest.raises(InputError, match="Deflate"):
            adapter_files([File("a.zip", packed.getvalue())])

    def test_half_an_adapter_is_told_from_a_wrong_file(self):
        for given in ([], [WEIGHTS], [CONFIG]):
            with pytest.raises(IncompleteError):
                adapter_files(given)
        for given in ([WEIGHTS, WEIGHTS, CONFIG], [File("a.zip", b"no zip")], [zipped(readme_dot_md=b"x")]):
            with pytest.raises(InputError) as caught:
                adapter_files(given)
            assert not isinstance(caught.value, IncompleteError)

    def test_after_a_wrong_file_the_right_one_is_judged_alone(self, lab):
        app = lab(view="Your adapter")
        app.file_uploader[0].upload("bad.zip", b"no zip at all", "application/zip")
        finished(app)
        assert "no readable zip" in words(app)
        assert "adapter from before" not in words(app)
        trained = app.session_state["_lora_upload_turn"]
        app.file_uploader[0].upload("it.zip", zipped(**PACKED).getvalue(), "application/zip")
        finished(app)
        assert "no readable zip" not in words(app)
        assert app.query_params["lora_adapter"]
        assert app.session_state["_lora_upload_turn"] > trained
        app.file_uploader[0].upload("bad.zip", b"no zip at all", "application/zip")
        finished(app)
        assert "no readable zip. Give" in words(app)
        assert "What is drawn below is still the adapter from before." in words(app)

    def test_half_an_adapter_waits_for_the_other_half(self, lab):
        app = lab(view="Your adapter")
        app.file_uploader[0].upload(WEIGHTS_FILE, b"w", "application/octet-stream")
        finished(app)
        assert f"{CONFIG_FILE} is missing" in words(app)
        assert app.file_uploader[0].value

    def test_the_page_says_where_the_file_stays_and_who_can_open_it(self, lab):
        said = words(lab(view="Your adapter"))
        assert "kept on this server's disk" in said
        assert "whoever has the link" in said
        assert "Nobody else" not in said

    def test_it_is_kept_once_under_what_it_holds(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
        first = local_models.keep_upload({"a": b"1", "b": b"2"})
        assert local_models.keep_upload({"b": b"2", "a": b"1"}) == first
        assert local_models.keep_upload({"a": b"12", "b": b""}) != first
        assert local_models.uploaded(first.name) == first
        assert (first / "b").read_bytes() == b"2"
        assert len(list(first.parent.iterdir())) == 2

    def test_what_could_not_be_written_leaves_nothing(self, tmp_path, monkeypatch):
        def full(path, content):
            raise OSError(28, "No space left on device")

        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            local_models.keep_upload({"a": b"1"})
        assert not list((tmp_path / "uploads").iterdir())

    def test_the_oldest_are_forgotten(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
        monkeypatch.setattr(local_models, "_KEPT", 3)
        kept = [local_models.keep_upload({"a": bytes([number])}) for number in range(5)]
        assert [folder.is_dir() for folder in kept] == [False, False, True, True, True]

    def test_the_oldest_are_forgotten_by_their_size_too_but_never_the_latest(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
        monkeypatch.setattr(local_models, "_KEPT_BYTES", 100)
        kept = [local_models.keep_upload({"a": bytes([number]) * size}) for number, size in enumerate((40, 50, 30, 60))]
        assert [folder.is_dir() for folder in kept] == [False, False, True, True]
        large = local_models.keep_upload({"a": bytes(101)})
        assert large.is_dir()
        assert not any(folder.is_dir() for folder in kept)

    def test_one_that_somebody_else_has_forgotten_meanwhile_is_no_error(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
        gone, *_ = kept = [local_models.keep_upload({"a": bytes([number])}) for number in range(3)]
        listed = list(gone.parent.iterdir())
        shutil.rmtree(gone)
        monkeypatch.setattr(Path, "iterdir", lambda folder: iter(listed if folder == gone.parent else [folder / "a"]))
        assert local_models.keep_upload({"a": b"new"}).is_dir()
        assert all(folder.is_dir() for folder in kept[1:])

    @pytest.mark.parametrize("name", ["..", "../x", "", "0" * 31, "A" * 32, "0" * 32 + "/.."])
    def test_a_name_leads_nowhere_else(self, name):
        assert local_models.uploaded(name) is None

    def test_the_adapter_just_trained_is_opened_with_the_same_spectrum(self, lab):
        app = look(train(lab()), "Your adapter")
        found = app.session_state["_run_lora_run"].result
        next(button for button in app.button if "just trained" in button.label).click()
        finished(app)
        opened = app.session_state["_run_lora_adapter_run"].result
        assert opened.rank == 2
        trained = dict(zip(map(label, found.layers), found.spectra, strict=True))
        for name, sigma in zip(opened.layers, opened.spectra, strict=True):
            np.testing.assert_allclose(sigma, trained[label(name)], rtol=1e-4, atol=1e-6)
        assert app.query_params["lora_adapter"]
        assert spec(app, "lora_uploaded_energy")["data"]

    def test_a_file_with_nothing_in_it_is_a_sentence_of_the_engine(self, lab):
        app = lab(view="Your adapter")
        folder = local_models.keep_upload({WEIGHTS_FILE: b"junk", CONFIG_FILE: b'{"peft_type": "LORA", "r": 2}'})
        app.query_params["lora_adapter"] = folder.name
        finished(app)
        assert "damaged or incomplete" in words(app)


def test_every_start_of_the_lab_is_a_setting_that_there_is(lab):
    for start in LORA.starts:
        app = lab(**start.settings)
        assert not app.warning
        assert not app.error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layers.3.self_attn.q_proj", "layer 3, q_proj"),
        ("lm_head", "lm_head"),
        ("model.embed.proj", "model.embed.proj"),
    ],
)
def test_a_matrix_has_a_short_name(name, said):
    assert label(name) == said


@pytest.mark.parametrize(
    "names",
    [
        ["encoder.layers.0.q_proj", "decoder.layers.0.q_proj", "decoder.layers.1.q_proj"],
        ["layers.0.experts.0.w1", "layers.0.experts.1.w1"],
    ],
)
def test_matrices_that_a_short_name_would_confuse_keep_their_names(names):
    assert labels(names) == names
    assert labels(["layers.0.a.q_proj", "layers.1.a.q_proj", "lm_head"]) == [
        "layer 0, q_proj",
        "layer 1, q_proj",
        "lm_head",
    ]


def spectra(count, sigma=(3.0, 1.0, 0.5)):
    """Updates of layers that have all the same singular values."""
    sigma = np.array(sigma)
    names = [f"layers.{number}.attn.q_proj" for number in range(count)]
    return SimpleNamespace(layers=names, spectra=np.tile(sigma, (count, 1)), effective_rank=np.linspace(2, 3, count))


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, ""), (2, "The thin line is the other matrix."), (5, "The thin lines are the other 4 matrices.")],
)
def test_the_other_matrices_are_those_that_there_are(count, said):
    words = spectrum_sentence(spectra(count), 0)
    assert words.endswith(said or "is 0.5.")
    assert ("thin" in words) == bool(said)
    assert words.startswith("Layer 0, q_proj: the largest singular value is 3, the second 1, the last of 3 is 0.5.")


def test_directions_are_counted_by_squares_and_the_effective_rank_by_values_and_it_is_said():
    words = energy_sentence(spectra(4, (9.0, 1.0, 1.0)), 0)
    assert "Of 3 directions the strongest alone holds 98% of ‖ΔW‖²" in words
    assert "by the singular values themselves" in words
    assert "it is 2.0, and 2.5 in the median of all matrices" in words
    assert "the 2 strongest hold 100%" in energy_sentence(spectra(2, (1.0, 1.0, 0.01)), 0)
    assert "median" not in energy_sentence(spectra(1), 0)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (0.0027, "99.7%"),
        (0.0, "> 99.9%"),
        (1e-5, "> 99.9%"),
        (0.001, "99.9%"),
        (0.7, "50%"),
        (3.2, "4.1%"),
        (20, "< 0.01%"),
    ],
)
def test_a_softmax_never_gives_everything(loss, said):
    assert probability(loss) == said


@pytest.mark.parametrize("loss", np.geomspace(1e-7, 20, 30))
def test_no_loss_is_a_probability_of_all(loss):
    assert probability(loss) != "100%"
    assert probability(loss).endswith("%")


def test_values_stand_at_their_layer_and_projection():
    names = ["layers.10.a.q_proj", "layers.2.a.q_proj", "layers.2.a.v_proj"]
    table, layers, projections = grid(names, np.array([1.0, 2.0, 3.0]))
    assert (layers, projections) == ([2, 10], ["q_proj", "v_proj"])
    np.testing.assert_array_equal(table, [[2, 3], [1, np.nan]])


def test_views_are_named_once():
    assert len(set(VIEWS)) == len(VIEWS) == 6


@pytest.mark.parametrize(
    ("part", "said"),
    [(0.0404, "4%"), (0.00021, "0.021%"), (1.0, "100%"), (0.996, "99.6%"), (0.99996, "> 99.9%"), (1.12, "112%")],
)
def test_shares_have_two_digits(part, said):
    assert share(part) == said


def test_the_time_of_smollm2_is_told_before_it_is_trained(lab):
    app = lab(model="smollm2-135m", steps=150, batch_size=16)
    assert "SmolLM2 takes minutes on a CPU, longer with longer facts" in words(app)
    assert "about 5 minutes" not in words(app)  # that was the town's
    town = lab(model="smollm2-135m", steps=150, batch_size=16, **TOWN)
    assert "SmolLM2 takes about 5 minutes" in words(town)
    assert "recorded" not in words(town)
    assert "SmolLM2 takes" not in words(lab(steps=150))
