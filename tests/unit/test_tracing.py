"""What `trace` shows must be what the model does: compared with transformers' own eager attention on random models."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from engine import pretrained as pretrained_module
from engine.errors import InputError
from engine.masks import bidirectional, causal, materialize, prefix_lm
from engine.pretrained import load
from engine.rotary import RotaryEmbedding
from engine.tracing import Intervention, fused_difference, fused_pass, layer_attention, layer_input, next_tokens, trace
from tests.tiny_models import CONFIGS, DECODERS, ENCODERS, GROUPED, save

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny(kind, seed)` → the loaded model; each is made once."""
    made = {}

    def make(kind, seed=0):
        if (kind, seed) not in made:
            made[kind, seed] = load(str(save(tmp_path_factory.mktemp(kind), kind, seed)))
        return made[kind, seed]

    return make


def some_ids(pretrained, seed, length=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(pretrained.vocab_size, (length,), generator=generator).tolist()


def softmax_by_hand(seen, layer, head, temperature=1.0, mask=None):
    """softmax(QKᵀ · scale / temperature) of one head, in float64 and a loop over queries."""
    group = head // (seen.queries.shape[1] // seen.keys.shape[1])
    query, key = seen.queries[layer, head].double(), seen.keys[layer, group].double()
    mask = seen.masks[layer] if mask is None else mask
    rows = torch.zeros(len(seen.ids), len(seen.ids), dtype=torch.double)
    for position, allowed in enumerate(mask):
        rows[position, allowed] = (key[allowed] @ query[position] * seen.scales[layer] / temperature).softmax(0)
    return rows


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_models_own_eager_attention(tiny, kind, seed):
    model = tiny(kind, seed)
    ids = some_ids(model, seed)
    seen = trace(model, ids)
    opener = ENCODERS.get(kind, AutoModelForCausalLM)
    reference = opener.from_pretrained(model.name, attn_implementation="eager").eval()
    with torch.no_grad():
        own = reference(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(seen.attention, torch.cat(own.attentions), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen.hidden, torch.cat(own.hidden_states), rtol=0, atol=1e-4)
    if kind == "bert":
        assert seen.logits is None
    else:
        torch.testing.assert_close(seen.logits, own.logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_shapes_and_labels(tiny, kind):
    model = tiny(kind)
    ids = some_ids(model, 3, length=7)
    seen = trace(model, ids)
    layers, heads, groups, width = model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim
    assert seen.ids.tolist() == ids
    assert seen.tokens == model.readable(ids)
    assert seen.attention.shape == (layers, heads, 7, 7)
    assert seen.queries.shape == (layers, heads, 7, width)
    assert seen.keys.shape == seen.values.shape == (layers, groups, 7, width)
    assert seen.masks.shape == (layers, 7, 7)
    assert len(seen.scales) == layers
    assert seen.hidden.shape == (layers + 1, 7, model.d_model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_queries_keys_scales_and_masks_explain_the_attention(tiny, kind):
    seen = trace(tiny(kind), some_ids(tiny(kind), 4))
    for layer in range(seen.attention.shape[0]):
        for head in range(seen.attention.shape[1]):
            expected = softmax_by_hand(seen, layer, head).float()
            torch.testing.assert_close(seen.attention[layer, head], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_sum_to_one_and_the_future_is_exactly_zero(tiny, kind, seed):
    seen = trace(tiny(kind, seed), some_ids(tiny(kind, seed), seed))
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(seen.attention.shape[:3]), rtol=0, atol=1e-5)
    future = seen.attention.triu(1)
    assert (future == 0).all() if kind in DECODERS else (future.sum(-1)[..., :-1] > 0).all()


def test_a_sliding_window_is_the_models_own_mask(tiny):
    seen = trace(tiny("mistral"), some_ids(tiny("mistral"), 0))
    distance = torch.arange(11)[:, None] - torch.arange(11)
    expected = (distance >= 0) & (distance < 4)
    assert (seen.masks == expected).all()
    assert (seen.attention[..., ~expected] == 0).all()


@pytest.mark.parametrize("kind", [*DECODERS, "masked"])
def test_last_logits_are_the_last_row(tiny, kind):
    model = tiny(kind)
    ids = some_ids(model, 5)
    rows = []
    hook = model.model.get_output_embeddings().register_forward_hook(lambda *call: rows.append(call[-1].shape[1]))
    last = trace(model, ids, last_logits=True).logits
    hook.remove()
    assert rows == [len(ids) if kind == "masked" else 1]  # BERT's head has no way to be asked for less
    assert last.shape == (1, model.vocab_size)
    torch.testing.assert_close(last[0], trace(model, ids).logits[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
class TestIntervention:
    def test_the_models_own_mask_at_temperature_one_changes_nothing(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = some_ids(model, seed)
        own = materialize(bidirectional if kind == "bert" else causal, len(ids))
        before = trace(model, ids)
        for change in (
            Intervention(mask=own),
            Intervention(mask=own, layer=1),
            Intervention(mask=own, layer=1, head=2),
        ):
            after = trace(model, ids, change)
            torch.testing.assert_close(after.attention, before.attention, rtol=0, atol=1e-6)
            torch.testing.assert_close(after.hidden, before.hidden, rtol=0, atol=1e-5)

    def test_one_head_leaves_earlier_layers_and_its_neighbours_alone(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = some_ids(model, seed)
        before = trace(model, ids)
        for head in range(model.num_heads):
            after = trace(model, ids, Intervention(temperature=3.0, layer=1, head=head))
            others = [index for index in range(model.num_heads) if index != head]
            assert torch.equal(after.attention[0], before.attention[0])
            assert torch.equal(after.hidden[:2], before.hidden[:2])
            assert torch.equal(after.attention[1, others], before.attention[1, others])
            torch.testing.assert_close(
                after.attention[1, head].double(), softmax_by_hand(before, 1, head, 3.0), rtol=0, atol=1e-5
            )
            assert not torch.equal(after.attention[1, head], before.attention[1, head])
            assert not torch.equal(after.hidden[2], before.hidden[2])
            assert not torch.equal(after.attention[2], before.attention[2])

    def test_one_layer_changes_all_its_heads(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = some_ids(model, seed)
        before, after = trace(model, ids), trace(model, ids, Intervention(temperature=3.0, layer=1))
        assert torch.equal(after.attention[0], before.attention[0])
        for head in range(model.num_heads):
            expected = softmax_by_hand(before, 1, head, 3.0).float()
            torch.testing.assert_close(after.attention[1, head], expected, rtol=0, atol=1e-5)

    def test_heat_makes_attention_uniform_over_the_allowed_keys(self, tiny, kind, seed):
        model = tiny(kind, seed)
        seen = trace(model, some_ids(model, seed), Intervention(temperature=1e7))
        uniform = seen.masks / seen.masks.sum(-1, keepdim=True)
        torch.testing.assert_close(seen.attention, uniform[:, None].expand_as(seen.attention), rtol=0, atol=1e-4)

    def test_cold_makes_attention_one_hot(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = list(dict.fromkeys(some_ids(model, seed)))  # equal tokens can tie
        seen, own = trace(model, ids, Intervention(temperature=1e-6, layer=0)), trace(model, ids)
        assert (seen.attention[0].amax(-1) > 0.999).all()
        assert torch.equal(seen.attention[0].argmax(-1), own.attention[0].argmax(-1))

    def test_a_mask_may_widen_what_the_model_allows(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = some_ids(model, seed)
        mask = materialize(prefix_lm(5), len(ids))
        seen = trace(model, ids, Intervention(mask=mask))
        assert (seen.attention[..., ~mask] == 0).all()
        torch.testing.assert_close(seen.attention.sum(-1), torch.ones(seen.attention.shape[:3]), rtol=0, atol=1e-5)
        for head in range(model.num_heads):
            expected = softmax_by_hand(seen, 0, head, mask=mask).float()
            torch.testing.assert_close(seen.attention[0, head], expected, rtol=0, atol=1e-5)
        assert (seen.attention[:, :, 0, 1:5].sum(-1) > 0).all()

    def test_a_fully_masked_row_is_zero(self, tiny, kind, seed):
        model = tiny(kind, seed)
        ids = some_ids(model, seed)
        mask = materialize(causal, len(ids))
        mask[4] = False
        seen = trace(model, ids, Intervention(mask=mask))
        assert (seen.attention[:, :, 4] == 0).all()
        assert seen.hidden.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Intervention(temperature=0.0), ["temperature", "0", "above 0"]),
        (Intervention(temperature=-2.0), ["temperature", "-2", "above 0"]),
        (Intervention(temperature=float("nan")), ["temperature", "nan"]),
        (Intervention(temperature=float("inf")), ["temperature", "inf"]),
        (Intervention(layer=3), ["layer 3", "0 to 2"]),
        (Intervention(layer=-1), ["layer -1", "0 to 2"]),
        (Intervention(head=4), ["head 4", "0 to 3"]),
        (Intervention(mask=torch.ones(3, 4, dtype=torch.bool)), ["3×4", "5×5"]),
    ],
)
def test_a_senseless_intervention_is_a_sentence(tiny, change, words):
    with pytest.raises(InputError) as error:
        trace(tiny("llama"), [1, 2, 3, 4, 5], change)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("ids", "words"), [([], ["no tokens"]), ([1] * 65, ["65", "64", "by 1"]), ([1, 10**6], ["1000000"]), ([-1], ["-1"])]
)
def test_senseless_ids_are_a_sentence(tiny, ids, words):
    for run in (trace, fused_pass):
        with pytest.raises(InputError) as error:
            run(tiny("gpt2"), ids)
        assert all(word in str(error.value) for word in words)


def test_traces_of_several_models_in_several_threads_do_not_meet(tiny):
    jobs = [
        (tiny(kind, seed), some_ids(tiny(kind, seed), seed, 8 + seed), Intervention(temperature=1.0 + seed))
        for kind in ("llama", "gpt2", "bert")
        for seed in SEEDS
    ] * 3
    alone = [trace(*job) for job in jobs]
    start = threading.Barrier(4)

    def work(part):
        start.wait()
        return [trace(*job) for job in jobs[part::4]]

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, range(4)))
    for part, traces in enumerate(parts):
        for together, expected in zip(traces, alone[part::4], strict=True):
            torch.testing.assert_close(together.attention, expected.attention, rtol=0, atol=1e-6)
            torch.testing.assert_close(together.hidden, expected.hidden, rtol=0, atol=1e-5)


def test_a_pass_that_fails_leaves_nothing_behind(tiny, monkeypatch):
    model = tiny("llama")
    before = trace(model, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(model.model.base_model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trace(model, [1, 2, 3])
    assert model.model(torch.tensor([[1, 2, 3]])).attentions is None
    assert torch.equal(trace(model, [1, 2, 3]).attention, before.attention)


@pytest.mark.parametrize("kind", CONFIGS)
def test_outside_a_trace_the_fused_kernel_runs_and_agrees(tiny, kind, monkeypatch):
    model = tiny(kind)
    ids = some_ids(model, 6)
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or fused(*args, **kw)
    )
    traced = trace(model, ids)
    assert not calls
    difference = fused_difference(model, traced)
    assert len(calls) == model.num_layers
    assert 0 <= difference.hidden < 1e-4
    assert difference.logits is None if kind == "bert" else 0 <= difference.logits < 1e-4


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_difference_of_the_last_logits(tiny, kind):
    model = tiny(kind)
    difference = fused_difference(model, trace(model, some_ids(model, 7), last_logits=True))
    assert difference.logits is None if kind == "bert" else 0 <= difference.logits < 1e-4


def test_fused_difference_sees_a_difference(tiny, monkeypatch):
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kw: 1.01 * fused(*args, **kw)
    )
    difference = fused_difference(tiny("llama"), trace(tiny("llama"), [1, 2, 3, 4]))
    assert difference.hidden > 1e-3
    assert difference.logits > 1e-3


def test_next_tokens_are_the_most_probable(tiny):
    model = tiny("llama")
    logits = torch.zeros(model.vocab_size)
    logits[[7, 40, 9]] = torch.tensor([3.0, 2.0, 1.0])
    rows = next_tokens(logits, model, k=3)
    total = logits.double().exp().sum().item()
    assert [row.id for row in rows] == [7, 40, 9]
    assert [row.label for row in rows] == model.readable([7, 40, 9])
    assert [row.probability for row in rows] == pytest.approx([torch.e**power / total for power in (3, 2, 1)])
    for k in (0, -1, model.vocab_size + 1):
        with pytest.raises(InputError, match=str(k)):
            next_tokens(logits, model, k=k)


def recompute(model, seen, attention, layer):
    x = layer_input(model, seen, layer)
    return attention(x, x, x, seen.masks[layer])[1][0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_our_own_layer_recomputes_the_trace(tiny, kind, seed):
    model = tiny(kind, seed)
    seen = trace(model, some_ids(model, seed))
    for layer in range(model.num_layers):
        attention = layer_attention(model, layer)
        expected = seen.attention[layer]
        torch.testing.assert_close(recompute(model, seen, attention, layer), expected, rtol=0, atol=1e-5)
        attention.rotary = RotaryEmbedding(model.head_dim, theta=500.0)
        assert (recompute(model, seen, attention, layer) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen3"])
def test_only_layers_of_llamas_shape_are_recomputed(tiny, kind):
    with pytest.raises(InputError, match="Llama"):
        layer_attention(tiny(kind), 0)
    with pytest.raises(InputError, match="Llama"):
        layer_input(tiny(kind), trace(tiny(kind), [1, 2]), 0)


def test_a_stretched_rotary_embedding_is_not_recomputed_as_a_plain_one(tmp_path, monkeypatch):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    monkeypatch.setitem(
        CONFIGS, "stretched", lambda vocab: LlamaConfig(vocab_size=vocab, rope_parameters=rope, **GROUPED)
    )
    model = load(str(save(tmp_path, "stretched")))
    with pytest.raises(InputError, match="plain rotary"):
        layer_attention(model, 0)


def test_there_is_no_attention_of_a_layer_that_is_not_there(tiny):
    with pytest.raises(InputError, match="layer 3"):
        layer_attention(tiny("llama"), 3)


def test_attention_with_an_extra_term_is_refused(tmp_path, monkeypatch):
    capped = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    monkeypatch.setitem(CONFIGS, "gemma2", lambda vocab: capped)
    with pytest.raises(InputError, match="softcap"):
        load(str(save(tmp_path, "gemma2")))


def test_a_model_that_computes_something_else_is_refused(tiny, tmp_path, monkeypatch):
    from engine import tracing

    monkeypatch.setattr(tracing, "attend", lambda q, k, v, **kw: tracing_attend_twice_as_hot(q, k, v, **kw))
    with pytest.raises(InputError, match="not the plain softmax"):
        load(str(save(tmp_path, "llama")))
    assert str(tmp_path) not in {key[0] for key in pretrained_module._loaded}


def tracing_attend_twice_as_hot(query, key, value, **knobs):
    from engine.attention import attend

    return attend(query, key, value, **(knobs | {"temperature": 2.0}))
