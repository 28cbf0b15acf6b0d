"""The attention lab's experiments on SmolLM2 and on the storyteller: what the page says is what the model does."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch

from engine import head_statistics, pretrained, tracing
from engine.catalogue import DEFAULT, MINILM, SMOLLM2_Q4, STORYTELLER
from engine.errors import InputError
from engine.experiments import (
    _attention,
    attention,
    attention_effect,
    attention_fused,
    attention_head,
    attention_tests,
    parse,
)
from engine.experiments._attention import MAX_TOKENS
from engine.runtime.jobs import LocalJob
from tests.tiny_models import save

MARY = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def overview():
    return attention.run(attention.Params(text=MARY, model=SMOLLM2_Q4), LocalJob())


def head(**values):
    return attention_head.run(attention_head.Params(**{"text": MARY, "model": SMOLLM2_Q4, **values}), LocalJob())


def effect(**values):
    return attention_effect.run(attention_effect.Params(**{"text": MARY, "model": SMOLLM2_Q4, **values}), LocalJob())


class TestOverview:
    def test_every_head_of_every_layer(self, overview):
        assert overview.attention.shape == (30, 9, 14, 14)
        np.testing.assert_allclose(overview.attention.astype(np.float32).sum(-1), 1, atol=5e-3)
        assert not np.triu(overview.attention, 1).any()
        assert overview.tokens[:2] == ["When", "␣Mary"]

    def test_the_known_heads_have_their_names(self, overview):
        """The probe shows layer 16, head 0 on the previous token, and layer 18, head 6 as the best of induction."""
        assert overview.roles[16][0] == overview.roles[11][1] == "previous token"
        assert overview.roles[18][6] == "induction"
        assert overview.on_probe["induction"][18, 6] > 0.8
        assert overview.on_probe["previous token"][16, 0] > 0.8
        assert "layer 18, head 6" in overview.sentence

    def test_untrained_attention_has_no_such_heads(self):
        found = attention.run(attention.Params(text=MARY, model=SMOLLM2_Q4, weights="untrained"), LocalJob())
        assert found.attention.shape == (1, 9, 14, 14)
        assert found.on_probe["induction"].max() < 0.3
        assert found.on_probe["previous token"].max() < 0.3

    def test_every_statistic_is_the_one_that_it_is_called(self, overview):
        model = pretrained.load(SMOLLM2_Q4)
        seen = tracing.trace(model, model.encode(MARY)).attention
        for name, statistic in (
            ("entropy", head_statistics.entropy),
            ("mean distance", head_statistics.mean_distance),
            ("previous token", head_statistics.previous_token_score),
            ("first token", head_statistics.first_token_mass),
        ):
            np.testing.assert_allclose(overview.on_text[name], statistic(seen), atol=1e-5)
        assert overview.on_probe["first token"][16, 0] < 0.2 < 0.8 < overview.on_probe["previous token"][16, 0]

    def test_the_fused_difference_is_said_and_small(self, overview):
        assert "differ by at most" in overview.fused_sentence


class TestHead:
    def test_a_change_everywhere_reaches_the_untrained_layer_too(self):
        settings = {"weights": "untrained", "layer": 0, "head": 3, "temperature": 4.0}
        one, every = head(**settings), head(**settings, reach="every head")
        np.testing.assert_allclose(one.weights, every.weights, atol=1e-6)
        assert not np.allclose(one.layer_mean, every.layer_mean, atol=1e-3)

    def test_without_a_change_it_is_the_map_of_the_overview(self, overview):
        found = head(layer=16, head=0)
        np.testing.assert_allclose(found.weights, overview.attention[16, 0], atol=1e-3)
        np.testing.assert_array_equal(found.weights, found.untouched)
        assert not found.difference.any()
        np.testing.assert_allclose(found.layer_mean, overview.attention[16].astype(np.float32).mean(0), atol=1e-3)
        assert found.sentence.startswith("Layer 16, head 0 puts 80% of its mass on the previous token.")

    def test_the_stages_follow_from_each_other(self):
        found = head(layer=3, head=4, temperature=2.0)
        np.testing.assert_allclose(found.scores, found.query @ found.key.T, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.scaled, found.scores * found.scale / 2, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.output, found.weights @ found.value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("layer", [0, 16, 29])
    def test_a_change_to_one_head_is_what_the_changed_model_computes(self, layer):
        """The short cut (stages from untouched queries and keys) against a full pass with the intervention in it."""
        model = pretrained.load(SMOLLM2_Q4)
        change = tracing.Intervention(temperature=0.5, layer=layer, head=2)
        full = tracing.trace(model, model.encode(MARY), change).attention[layer, 2]
        np.testing.assert_allclose(head(layer=layer, head=2, temperature=0.5).weights, full, atol=1e-6)

    def test_a_change_everywhere_reaches_what_the_head_reads(self):
        here = head(layer=16, head=0, mask="sliding window", window=2)
        everywhere = head(layer=16, head=0, mask="sliding window", window=2, reach="every head")
        assert not np.allclose(here.query, everywhere.query)
        assert (np.tril(everywhere.weights, -2) == 0).all()

    @pytest.mark.parametrize("drop", [0, 5, 13])
    def test_a_dropped_token_is_gone_and_the_rest_is_compared(self, drop):
        found = head(layer=16, head=0, drop=drop)
        assert len(found.tokens) == 13
        assert len(found.untouched_tokens) == 14
        assert np.isnan(found.difference[drop]).all()
        assert np.isnan(found.difference[:, drop]).all()
        kept = np.delete(np.arange(14), drop)
        np.testing.assert_allclose(
            found.difference[np.ix_(kept, kept)] + found.untouched[np.ix_(kept, kept)], found.weights, atol=1e-6
        )

    @pytest.mark.parametrize("values", [{"mask": "sliding window", "window": 40}, {"mask": "causal"}])
    def test_a_mask_that_changes_nothing_says_so(self, values):
        assert "it changes nothing" in head(**values).note
        assert not head(**values).difference.any()

    @pytest.mark.parametrize("values", [{}, {"mask": "sliding window", "window": 3}, {"mask": "prefix LM"}])
    def test_a_mask_that_changes_something_says_nothing(self, values):
        assert head(**values).note == ""

    def test_the_mean_of_the_layer_holds_the_changed_head(self):
        """Against a full pass with the same intervention in it, and not equal to the untouched mean."""
        model = pretrained.load(SMOLLM2_Q4)
        ids = model.encode(MARY)
        change = tracing.Intervention(temperature=3.0, layer=5, head=2)
        found = head(layer=5, head=2, temperature=3.0)
        np.testing.assert_allclose(found.layer_mean, tracing.trace(model, ids, change).attention[5].mean(0), atol=1e-6)
        assert not np.allclose(found.layer_mean, tracing.trace(model, ids).attention[5].mean(0), atol=1e-3)

    @pytest.mark.parametrize("values", [{"temperature": 2.0}, {"drop": 0}, {"drop": 7, "temperature": 0.5}])
    def test_moved_is_the_total_variation_distance(self, values):
        found = head(layer=16, head=0, **values)
        distances, after = [], iter(found.weights)
        for query, row in enumerate(found.untouched):
            if query != values.get("drop"):
                now = list(next(after))
                if "drop" in values:
                    now.insert(values["drop"], 0.0)
                distances.append(sum(max(0.0, new - old) for new, old in zip(now, row, strict=True)))
        assert found.moved == pytest.approx(np.mean(distances), abs=1e-5)

    def test_a_prefix_sees_itself_in_both_directions(self):
        found = head(mask="prefix LM", prefix=4)
        assert (found.weights[:4, :4] > 0).all()
        assert (np.triu(found.weights, 1)[:, 4:] == 0).all()

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"layer": 30}, "no layer 30"),
            ({"head": 9}, "no head 9"),
            ({"drop": 14}, "no token 14"),
            ({"weights": "untrained", "layer": 1}, "no layer 1"),
        ],
    )
    def test_what_does_not_exist_is_named(self, values, words):
        with pytest.raises(InputError, match=words):
            head(**{"layer": 0, **values})


class TestEffect:
    def test_mary_is_first_and_nothing_has_changed(self):
        found = effect()
        assert found.candidates[0].token == "␣Mary"
        assert found.candidates[0].before == pytest.approx(found.candidates[0].after)
        assert found.divergence == 0
        assert "␣Mary" in found.sentence

    def test_candidates_are_in_order_and_are_probabilities(self):
        after = [candidate.after for candidate in effect(temperature=3.0, reach="every head").candidates]
        assert after == sorted(after, reverse=True)
        assert 0 < sum(after) <= 1

    def test_without_mary_she_is_not_expected(self):
        found = effect(drop=1)
        assert found.candidates[0].token != "␣Mary"
        assert found.divergence > 1

    def test_a_change_everywhere_matters_more_than_a_change_to_one_head(self):
        one = effect(layer=0, head=0, temperature=3.0)
        every = effect(layer=0, head=0, temperature=3.0, reach="every head")
        assert 0 < one.divergence < every.divergence

    @pytest.mark.parametrize("values", [{"drop": 1}, {"temperature": 3.0, "reach": "every head"}])
    def test_the_divergence_is_that_of_the_next_tokens_before_and_after(self, values):
        model = pretrained.load(SMOLLM2_Q4)
        ids = model.encode(MARY)
        change = tracing.Intervention(values.get("temperature", 1.0))
        before = tracing.trace(model, ids).logits[-1].double().log_softmax(-1)
        kept = ids[:1] + ids[2:] if "drop" in values else ids
        after = tracing.trace(model, kept, change).logits[-1].double().log_softmax(-1)
        expected = torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum") / np.log(2)
        found = effect(**values)
        assert found.divergence == pytest.approx(expected.item(), rel=1e-3)
        for candidate in found.candidates[:3]:
            index = model.readable(list(range(model.vocab_size))).index(candidate.token)
            assert candidate.before == pytest.approx(before[index].exp().item(), rel=1e-3)

    def test_an_untrained_layer_predicts_nothing_and_says_so(self):
        found = effect(weights="untrained", layer=0)
        assert found.candidates == []
        assert "no next token" in found.sentence


def test_fused_and_eager_agree_and_are_timed():
    found = attention_fused.run(attention_fused.Params(text=MARY), LocalJob())
    assert 0 < found.difference < 1e-3 < found.spread
    assert found.eager["runs"] >= 3
    assert found.eager["median_ms"] > 0 < found.fused["median_ms"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.3, "layer": 5, "head": 5},
        {"mask": "sliding window", "window": 2, "layer": 3, "head": 6},
        {"mask": "prefix LM", "drop": 3},
        {"mask": "bidirectional", "reach": "every head", "layer": 2},
        {"weights": "untrained", "layer": 0},
        {"model": SMOLLM2_Q4, "layer": 18, "head": 6, "mask": "sliding window"},
        {"model": SMOLLM2_Q4, "layer": 29, "mask": "bidirectional", "reach": "every head"},
    ],
)
def test_every_property_holds_on_every_kind_of_setting(values):
    found = attention_tests.run(attention_tests.Params(text=MARY, **values), LocalJob())
    assert [check.name for check in found.checks if not check.passed] == []
    assert len(found.checks) == (5 if values.get("weights") else 6)


def test_a_wrong_implementation_would_fail_its_tests(monkeypatch):
    """The Tests tab is worth something only if it can turn red: scale by 1/d instead of 1/√d."""
    from engine import attention as engine_attention

    right = engine_attention._gain
    monkeypatch.setattr(engine_attention, "_gain", lambda *args: right(*args) / 8)
    found = attention_tests.run(attention_tests.Params(text=MARY, layer=1), LocalJob())
    assert not all(check.passed for check in found.checks)


class TestText:
    @pytest.mark.parametrize(("text", "words"), [("", "empty"), ("  \n ", "only spaces")])
    def test_nothing_to_read(self, text, words):
        with pytest.raises(InputError, match=words):
            parse("attention", {"text": text})

    def test_too_long_says_how_long_and_cutting_helps(self):
        text = "word " * 200
        with pytest.raises(InputError, match=rf"has \d+ tokens.*{MAX_TOKENS}"):
            attention.run(attention.Params(text=text), LocalJob())
        assert len(attention.run(attention.Params(text=text, cut=True), LocalJob()).tokens) == MAX_TOKENS

    @pytest.mark.parametrize("text", ["😀", "a", "日本語", "𝔘𝔫𝔦"])
    def test_odd_texts_have_readable_tokens(self, text):
        found = attention.run(attention.Params(text=text), LocalJob())
        assert all(label.isprintable() and label for label in found.tokens)
        for run, params in (
            (attention_head.run, attention_head.Params(text=text)),
            (attention_effect.run, attention_effect.Params(text=text)),
        ):
            assert run(params, LocalJob()).sentence


def test_an_encoder_sees_both_ways_and_predicts_nothing():
    found = attention.run(attention.Params(text=MARY, model=MINILM), LocalJob())
    assert found.kind == "encoder"
    assert np.triu(found.attention.astype(np.float32), 1).any()
    result = attention_effect.run(attention_effect.Params(text=MARY, model=MINILM, layer=0), LocalJob())
    assert "encoder" in result.sentence


@pytest.fixture(scope="module")
def first():
    """The default settings, untouched."""
    return attention.run(attention.Params(), LocalJob())


class TestFirstSight:
    """What a newcomer sees before touching anything must be true of the default model, and worth seeing."""

    def test_it_is_our_own_small_model_with_the_heads_that_it_was_trained_to_have(self, first):
        assert first.model == STORYTELLER == DEFAULT
        assert "Our own model" in first.source
        assert first.attention.shape[:2] == (6, 8)
        assert first.on_probe["induction"].max() > 0.9
        assert first.on_probe["previous token"].max() > 0.9

    def test_the_chosen_head_is_an_induction_head_that_finds_the_name(self, first):
        opened = attention_head.Params()
        assert first.roles[opened.layer][opened.head] == "induction"
        row = attention_head.run(opened, LocalJob()).weights[-1]
        before = first.tokens[:-1].index(first.tokens[-1])  # the last token, where it was said first
        assert row.argmax() == before + 1
        assert row.max() > 0.8
        assert first.tokens[before + 1] == "␣Sam"

    def test_the_next_token_is_the_name_and_is_found_by_looking_back(self, first):
        found = attention_effect.run(attention_effect.Params(), LocalJob())
        assert found.candidates[0].token == "␣Sam"
        assert found.candidates[0].before > 0.9
        without = attention_effect.run(attention_effect.Params(drop=first.tokens.index("␣Sam")), LocalJob())
        assert without.candidates[0].token != "␣Sam"
        assert next((c.after for c in without.candidates if c.token == "␣Sam"), 0) < 0.1

    @pytest.mark.parametrize("model", [STORYTELLER, SMOLLM2_Q4])
    def test_the_repeating_text_is_continued_by_repeating_it(self, model):
        found = attention_effect.run(attention_effect.Params(text=_attention.REPEATING_TEXT, model=model), LocalJob())
        assert found.candidates[0].token == "␣cat"
        assert found.candidates[0].before > 0.5


def test_a_masked_language_model_has_logits_and_still_no_next_token(tmp_path):
    settings = {"text": "Mary gave John a drink", "model": str(save(tmp_path / "masked", "masked")), "layer": 0}
    found = attention_effect.run(attention_effect.Params(**settings), LocalJob())
    assert found.candidates == []
    assert "An encoder predicts no next token" in found.sentence


@pytest.mark.parametrize("window", [1, 3, 100])
def test_a_window_of_an_encoder_looks_both_ways(tmp_path, window):
    settings = {"text": "Mary gave John a drink", "model": str(save(tmp_path / "bert", "bert")), "layer": 0}
    found = attention_head.run(attention_head.Params(**settings, mask="sliding window", window=window), LocalJob())
    distance = np.abs(np.subtract.outer(np.arange(len(found.tokens)), np.arange(len(found.tokens))))
    np.testing.assert_array_equal(found.weights > 0, distance < window)


def test_the_own_mask_of_each_layer_stays_its_own(tmp_path):
    """A model of Mistral's kind has a window of 4 in every layer: a temperature everywhere must not lift it."""
    folder = str(save(tmp_path / "mistral", "mistral"))
    text = "Mary gave John a drink, and John gave Mary a drink"
    settings = {"text": text, "model": folder, "temperature": 0.9, "reach": "every head"}
    model = pretrained.load(folder)
    ids = tuple(model.encode(text))
    changed = _attention.changed_trace(model, attention_head.Params(**settings, layer=0), ids)
    assert not changed.attention.masked_select(~changed.masks[:, None].expand_as(changed.attention)).any()
    params = attention_head.Params(**settings, layer=2, mask="bidirectional")
    assert _attention.changed_trace(model, params, ids).attention[0].triu(1).any()


def test_cutting_keeps_an_encoders_last_token():
    text = "word " * 300
    found = attention.run(attention.Params(text=text, model=MINILM, cut=True), LocalJob())
    assert len(found.tokens) <= MAX_TOKENS
    assert found.tokens[-1] == "[SEP]"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.eye(6)[[0, 0, 1, 2, 3, 4]], "100% of its mass on the previous token"),
        (np.eye(6)[[3] * 6], "on one token, “d”"),
        (np.eye(6)[[5] * 6], "on the last token, “f”"),
        (np.eye(6), "on the token itself"),
        (np.eye(6)[[0] * 6], "on the first token, “a”"),
        (np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None], "spreads its attention over about 3.7 tokens"),
    ],
)
def test_descriptions_are_true(weights, words):
    assert words in attention_head.describe(weights.astype(np.float32), list("abcdef"), "Head 0.0")


def test_the_share_that_makes_a_pattern_is_two_fifths():
    one, other = np.eye(6)[[0, 0, 1, 2, 3, 4]], np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    names = list("abcdef")
    assert "previous token" in attention_head.describe((0.5 * one + 0.5 * other), names, "Head")
    assert "spreads" in attention_head.describe((0.02 * one + 0.98 * other), names, "Head")


def test_what_is_kept_of_a_model_does_not_keep_the_model():
    original = pretrained.load(MINILM)
    copy = dataclasses.replace(original)
    _attention.trace(copy, "trained", tuple(copy.encode("one two")))
    watch = weakref.ref(copy)
    del copy
    gc.collect()
    assert watch() is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_gpu_shows_what_the_cpu_shows(kind, tmp_path):
    folder = str(save(tmp_path / kind, kind))
    settings = {"text": "Mary gave John a drink", "model": folder, "layer": 1, "head": 2, "temperature": 0.5}
    on_cpu, on_gpu = (
        attention_head.run(attention_head.Params(**settings), LocalJob(device)) for device in ("cpu", "cuda")
    )
    for stage in ("scores", "scaled", "weights", "output", "layer_mean", "untouched"):
        np.testing.assert_allclose(getattr(on_gpu, stage), getattr(on_cpu, stage), rtol=1e-3, atol=1e-4)
    checks = attention_tests.run(attention_tests.Params(**settings, mask="sliding window"), LocalJob("cuda")).checks
    assert [check.name for check in checks if not check.passed] == []
    text = {"text": settings["text"], "model": folder}
    assert "differ by at most" in attention.run(attention.Params(**text), LocalJob("cuda")).fused_sentence
    assert attention_fused.run(attention_fused.Params(**text), LocalJob("cuda")).eager["device"] != "CPU"
    before = attention_effect.run(attention_effect.Params(**settings), LocalJob("cpu"))
    after = attention_effect.run(attention_effect.Params(**settings), LocalJob("cuda"))
    assert [c.token for c in after.candidates] == [c.token for c in before.candidates]
