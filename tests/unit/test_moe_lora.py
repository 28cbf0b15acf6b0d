"""A mixture of adapters: the same as a plain loop, each expert its own, and two opposite inputs part."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from engine import Decoder, ModelConfig, MoELoRALayer, inject_lora, inject_moe_lora
from engine.errors import InputError
from engine.moe.injection import moe_lora_layers, without_expert
from engine.moe.lora import MoELoRALinear
from engine.moe.statistics import load_of

SEEDS = range(3)
FORMS = ["concatenated", "grouped"]


def mixture(seed=0, in_features=24, out_features=16, num_experts=4, rank=3, top_k=2, **options):
    torch.manual_seed(seed + 1000)
    return MoELoRALayer(in_features, out_features, num_experts, rank, top_k, **options)


def learned(layer):
    """With a B that is not 0."""
    with torch.no_grad():
        for expert in layer.experts:
            expert.B.normal_()
    return layer


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def looped(layer, x, padding=None):
    """One expert after the other, one token after the other."""
    routing = layer.router.route(x, padding)
    rows = x.reshape(-1, x.shape[-1])
    y = [torch.zeros(layer.out_features, dtype=x.dtype) for _ in rows]
    for token, expert, gate in zip(routing.tokens.tolist(), routing.experts.tolist(), routing.gates, strict=True):
        own = layer.experts[expert]
        y[token] = y[token] + layer.alpha / layer.rank * gate.to(x.dtype) * (rows[token] @ own.A @ own.B)
    return torch.stack(y).view(*x.shape[:-1], -1)


def gradients(layer, y, x, upstream):
    return torch.autograd.grad((y * upstream).sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared_a", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
class TestForms:
    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "expert choice"])
    @pytest.mark.parametrize("padded", [False, True])
    def test_agree_with_a_plain_loop_forward_and_backward(self, form, shared_a, seed, kind, padded):
        layer = learned(mixture(seed, form=form, shared_a=shared_a, kind=kind, alpha=5.0)).double()
        x = normal(3, 7, 24, seed=seed, dtype=torch.float64).requires_grad_()
        padding = torch.arange(7)[None] >= torch.tensor([7, 4, 0])[:, None] if padded else None
        y, expected = layer(x, padding), looped(layer, x, padding)
        torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
        upstream = normal(3, 7, 16, seed=seed + 50, dtype=torch.float64)
        found, wanted = gradients(layer, y, x, upstream), gradients(layer, expected, x, upstream)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
        if padded:
            assert not y[padding].any()

    def test_an_expert_that_nobody_chose_gets_exactly_no_gradient(self, form, shared_a, seed):
        layer, x = learned(mixture(seed, form=form, shared_a=shared_a)), normal(20, 24, seed=seed)
        layer.router.selection_bias[1] -= 100
        layer(x).square().sum().backward()
        assert not layer.experts[1].B.grad.any()
        assert layer.experts[0].B.grad.any()
        if not shared_a:
            assert not layer.experts[1].A.grad.any()
            assert layer.experts[0].A.grad.any()
        before = layer(x)
        with torch.no_grad():
            layer.experts[1].B.fill_(7.0)
        assert torch.equal(layer(x), before)

    def test_starts_at_exactly_zero(self, form, shared_a, seed):
        layer = mixture(seed, form=form, shared_a=shared_a)
        assert torch.equal(layer(normal(2, 5, 24, seed=seed)), torch.zeros(2, 5, 16))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_computes_in_its_dtype(self, form, shared_a, seed, dtype):
        layer, x = learned(mixture(seed, form=form, shared_a=shared_a)), normal(9, 24, seed=seed)
        exact = layer(x)
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        assert y.dtype == dtype
        error = (y.float() - exact).norm() / exact.norm()
        assert error < 4 * torch.finfo(dtype).eps
        y.float().square().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("value", [1.0, 1e4, "max"])
    def test_finite_input_gives_finite_output(self, form, shared_a, seed, dtype, value):
        layer = learned(mixture(seed, form=form, shared_a=shared_a, alpha=24.0)).to(dtype)
        x = normal(9, 24, seed=seed).sign().to(dtype) * (torch.finfo(dtype).max if value == "max" else value)
        y = layer(x)
        assert y.dtype == dtype
        assert y.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_is_added_to_what_is_given(self, form, shared_a, seed, dtype):
        layer, x = learned(mixture(seed, form=form, shared_a=shared_a)), normal(2, 5, 24, seed=seed)
        base = normal(5, 2, 16, seed=seed + 1, dtype=dtype).transpose(0, 1).requires_grad_()  # not contiguous
        y = layer(x, onto=base)
        assert y.dtype == dtype
        expected = base.double() + layer(x).double()
        assert (y - expected).abs().max() <= 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 100 + (
            torch.finfo(dtype).eps * expected.abs().max()
        )
        (gradient,) = torch.autograd.grad(y.sum(), base)
        assert (gradient == 1).all()
        with pytest.raises(InputError, match=r"\(2, 5, 16\) cannot be added to a tensor of shape \(16,\)"):
            layer(x, onto=base[0, 0])

    def test_a_large_scale_does_not_overflow_half_precision(self, form, shared_a, seed):
        layer = mixture(seed, form=form, shared_a=shared_a, alpha=1e6).half()
        assert layer(torch.zeros(3, 24).half()).isfinite().all()

    @pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 0, 24), (2, 3, 4, 24)])
    def test_takes_any_shape(self, form, shared_a, seed, shape):
        layer = learned(mixture(seed, form=form, shared_a=shared_a))
        y = layer(normal(*shape, seed=seed))
        assert y.shape == (*shape[:-1], 16)
        y.sum().backward()

    @pytest.mark.parametrize("training", [True, False])
    def test_runs_compiled(self, form, shared_a, seed, training):
        layer, x = learned(mixture(seed, form=form, shared_a=shared_a)).train(training), normal(9, 24, seed=seed)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, backend="aot_eager")
        for _ in range(2):
            ours, theirs = compiled(x), layer(x)
            torch.testing.assert_close(ours, theirs)
            ours.square().sum().backward()
            theirs.square().sum().backward()
        for ours, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
        assert torch.equal(twin.router.selection_bias, layer.router.selection_bias)


class TestLayer:
    @pytest.mark.parametrize("shared_a", [False, True])
    def test_experts_have_their_own_parameters(self, shared_a):
        layer = mixture(shared_a=shared_a)
        assert len(layer.experts) == 4
        before = [(expert.A.clone(), expert.B.clone()) for expert in layer.experts]
        with torch.no_grad():
            layer.experts[2].A.fill_(3.0)
            layer.experts[2].B.fill_(5.0)
        for index, (expert, (A, B)) in enumerate(zip(layer.experts, before, strict=True)):
            assert expert.A.shape == (24, 3)
            assert expert.B.shape == (3, 16)
            assert isinstance(expert.A, nn.Parameter)
            assert torch.equal(expert.B, B) == (index != 2)
            assert torch.equal(expert.A, A) == (index != 2 and not shared_a)
        factors = 24 * 3 * (1 if shared_a else 4) + 4 * 3 * 16
        assert sum(parameter.numel() for parameter in layer.parameters()) == factors + layer.router.weight.numel()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_starts_uniform_and_each_its_own(self, seed):
        layer = mixture(seed, in_features=512, rank=16, out_features=64)
        for expert in layer.experts:
            assert expert.A.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.05)
            assert expert.A.abs().max() <= 512**-0.5
        assert not torch.equal(layer.experts[0].A, layer.experts[1].A)

    @pytest.mark.parametrize("shared_a", [False, True])
    def test_copies_states_and_conversions_give_the_same(self, shared_a):
        layer, x = learned(mixture(shared_a=shared_a)).eval(), normal(9, 24)
        other = mixture(5, shared_a=shared_a).eval()
        other.load_state_dict(layer.state_dict())
        for twin in (other, copy.deepcopy(layer), copy.deepcopy(layer).double().float()):
            assert torch.equal(twin(x), layer(x))
            assert (twin.experts[0].A is twin.experts[1].A) == shared_a

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"rank": 0}, "The rank is 0"),
            ({"rank": 17}, "The rank is 17"),
            ({"alpha": 0.0}, "alpha is 0.0"),
            ({"alpha": math.nan}, "alpha is nan"),
            ({"form": "loop"}, "The form is 'loop'"),
            ({"top_k": 5}, "chooses 5 of 4 experts"),
        ],
    )
    def test_wrong_values_are_named(self, options, sentence):
        with pytest.raises(InputError, match=sentence):
            mixture(**options)

    def test_what_is_not_finite_is_named(self):
        layer = mixture()
        with pytest.raises(InputError, match="1 of 2 tokens that are not finite"):
            layer(torch.tensor([[1.0], [math.nan]]).expand(2, 24))

    @pytest.mark.parametrize("form", FORMS)
    def test_whatever_padding_holds_reaches_neither_output_nor_gradients(self, form):
        layer, x = learned(mixture(form=form)), normal(2, 5, 24)
        padding = torch.arange(5)[None] >= torch.tensor([3, 0])[:, None]
        expected = layer(x, padding)
        x[padding] = math.nan
        y = layer(x, padding)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())

    def test_texts_are_balanced_unless_it_is_told_otherwise(self):
        assert mixture().router.balance == "texts"
        assert mixture(balance="tokens").router.balance == "tokens"

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_many_wide_experts_are_grouped_and_few_narrow_ones_concatenated(self, device):
        with torch.device("meta"):
            assert MoELoRALayer(2048, 2048, 2, 8).cheaper_form(device, 16384) == "concatenated"
            assert MoELoRALayer(2048, 2048, 256, 256).cheaper_form(device, 16384) == "grouped"

    @pytest.mark.parametrize(
        ("num_tokens", "sizes", "form"),
        [
            (16384, (2048, 2048, 16, 16, 2), "concatenated"),
            (4096, (2048, 768, 128, 16, 1), "concatenated"),
            (4096, (2048, 2048, 128, 64, 1), "concatenated"),
            (16384, (2048, 2048, 128, 64, 2), "grouped"),
            (16384, (2048, 2048, 256, 64, 2), "grouped"),
        ],
    )
    def test_few_tokens_are_not_worth_sorting_on_a_gpu(self, num_tokens, sizes, form):
        with torch.device("meta"):
            assert MoELoRALayer(*sizes).cheaper_form("cuda", num_tokens) == form

    def test_takes_the_form_that_is_cheaper(self, monkeypatch):
        layer, x, taken = mixture(), normal(5, 24), []
        for form in FORMS:
            own = getattr(layer, f"_{form}")
            monkeypatch.setattr(layer, f"_{form}", lambda *a, own=own, form=form: taken.append(form) or own(*a))
        for form in FORMS:
            monkeypatch.setattr("engine.moe.lora.cheaper_form", lambda *a, form=form: form)
            layer(x)
        assert taken == FORMS

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_trains_alike(self, reentrant):
        plain, x = learned(mixture(top_k=1)), normal(2, 9, 24).requires_grad_()
        checkpointed = copy.deepcopy(plain)
        for layer, run in (
            (plain, plain),
            (checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=reentrant)),
        ):
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
            for _ in range(8):
                optimizer.zero_grad()
                (run(x) - 1).square().sum().backward()
                optimizer.step()
        assert torch.equal(checkpointed.router.selection_bias, plain.router.selection_bias)
        for ours, theirs in zip(checkpointed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_prints_its_sizes(self):
        assert "24, 16, experts=4, rank=3, shared_a=True" in repr(mixture(shared_a=True))


@pytest.fixture
def one_thread():
    """These products are so small that sharing them out takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_on_two(seed, shape, target="random", forwards=1, steps=1, rounds=100, num_experts=2, top_k=1):
    """AdamW at 0.01 on two inputs with opposite targets; the layer, and each input's tokens at each expert, (2, E)."""
    torch.manual_seed(seed)
    layer = MoELoRALayer(64, 64, num_experts, rank=4, top_k=top_k)
    inputs = torch.randn(2, *shape)
    goal = torch.ones(shape) if target == "one" else torch.randn(shape if target == "unrelated" else shape[-1:])
    goal = goal.expand(shape)
    goals = torch.stack([goal, -goal])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, fused=True)
    for _ in range(rounds):
        if forwards == 1:
            losses = [F.mse_loss(layer(inputs), goals)]
        elif steps == 1:
            losses = [sum(F.mse_loss(layer(x), y) for x, y in zip(inputs, goals, strict=True))]
        else:
            losses = (F.mse_loss(layer(x), y) for x, y in zip(inputs, goals, strict=True))
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    chosen = [layer.eval().router(x)[1].flatten() for x in inputs]
    return layer, torch.stack([torch.bincount(experts, minlength=num_experts) for experts in chosen])


def expect_apart(counts, where):
    """The two inputs' favourites differ; of an odd number of tokens each has a true majority at its own.

    The tokens of one input are unrelated, so that no bias can send all of them to one expert and all of the other's
    to another. Half of an even number is all that can be asked for: where the middle tokens of both inputs lie between
    each other's, every threshold splits one of them evenly, and the first of two equal experts is the favourite.
    """
    favourites = counts.argmax(1)
    assert favourites[0] != favourites[1], where
    most = counts.max(1).values
    assert (2 * most >= counts.sum(1)).all(), where
    if counts.sum() == 2:
        assert (most == 1).all(), where


WAYS = [(1, 1), (2, 1), (2, 2)]


@pytest.mark.usefixtures("one_thread")
class TestTwoInputs:
    """The contract's row: two inputs with opposite targets end on different experts, whatever the seed."""

    @pytest.mark.parametrize("shape", [(1, 64), (1, 10, 64)])
    @pytest.mark.parametrize("target", ["one", "random"])
    @pytest.mark.parametrize(("forwards", "steps"), [(1, 1), (2, 2)])
    def test_they_end_on_different_experts(self, shape, target, forwards, steps):
        for seed in range(10):
            _, counts = train_on_two(seed, shape, target, forwards, steps)
            expect_apart(counts, seed)

    @pytest.mark.slow
    @pytest.mark.timeout(900)
    @pytest.mark.parametrize("tokens", [1, 5, 10, 16])
    @pytest.mark.parametrize("target", ["one", "random", "unrelated"])
    @pytest.mark.parametrize(("forwards", "steps"), [(1, 1), (2, 2)])
    def test_they_do_so_for_many_seeds(self, tokens, target, forwards, steps):
        """Of several tokens one may change its expert just before training stops: in 4 of 2400 it did."""
        together = []
        for seed in range(100, 115):
            _, counts = train_on_two(seed, (1, tokens, 64), target, forwards, steps)
            if counts[0].argmax() == counts[1].argmax():
                together.append(seed)
            else:
                expect_apart(counts, seed)
        assert len(together) <= (0 if tokens == 1 else 1), together

    @pytest.mark.parametrize(("forwards", "steps"), WAYS)
    def test_how_a_single_token_is_written_down_makes_no_difference(self, forwards, steps):
        layers = [
            train_on_two(4, shape, "one", forwards, steps, rounds=10)[0] for shape in ((64,), (1, 64), (1, 1, 64))
        ]
        for layer in layers[1:]:
            assert layer.router.selection_bias.any()
            assert torch.equal(layer.router.selection_bias, layers[0].router.selection_bias)
            for ours, theirs in zip(layer.parameters(), layers[0].parameters(), strict=True):
                torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(("forwards", "steps"), [(1, 1), (2, 2)])
    def test_with_two_experts_each_they_share_none_of_four(self, forwards, steps):
        for seed in range(10):
            _, counts = train_on_two(seed, (1, 64), "random", forwards, steps, num_experts=4, top_k=2)
            assert (counts.sum(0) == 1).all(), seed


def tiny(**options):
    torch.manual_seed(0)
    return Decoder(ModelConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=2, max_seq_len=32, **options))


class TestInjection:
    def test_the_model_starts_as_it_was_and_only_the_mixtures_learn(self):
        model, ids = tiny(), torch.arange(20).view(2, 10)
        before = model(ids)
        layers = inject_moe_lora(model, num_experts=3, rank=2, top_k=2)
        assert len(layers) == 14
        assert set(layers) == set(moe_lora_layers(model))
        assert all(isinstance(model.get_submodule(name), MoELoRALinear) for name in layers)
        torch.testing.assert_close(model(ids), before)
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert learning == {name for name, _ in model.named_parameters() if ".layer." in name}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    def test_transformers_models_take_it(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        model, ids = LlamaForCausalLM(config).eval(), torch.arange(20).view(2, 10)
        before = model(ids).logits
        layers = inject_moe_lora(model.bfloat16().float(), 2, 4, targets=["q_proj", "layers.1.mlp.down_proj"])
        assert len(layers) == 3
        torch.testing.assert_close(model(ids).logits, before, atol=2e-2, rtol=0)
        layer = layers["model.layers.1.mlp.down_proj"]
        assert layer.weight.shape == (32, 48)
        assert layer.bias is None

    def test_options_reach_the_layers(self):
        layers = inject_moe_lora(
            tiny().bfloat16(), 3, 2, 2, "q_proj", alpha=4.0, shared_a=True, kind="softmax", bias_rate=0.5,
            temperature=2.0, balance="tokens", form="grouped",
        )  # fmt: skip
        for wrapped in layers.values():
            layer, router = wrapped.layer, wrapped.layer.router
            assert (layer.num_experts, layer.rank, layer.scaling, layer.shared_a, layer.form) == (
                3,
                2,
                2.0,
                True,
                "grouped",
            )
            assert (router.top_k, router.kind, router.balancer.rate, router.balance) == (2, "softmax", 0.5, "tokens")
            assert router.temperature == 2.0
            assert layer.experts[0].B.dtype == torch.bfloat16
            assert router.weight.dtype == torch.float32
        named = inject_moe_lora(tiny().bfloat16(), 3, 2, targets="q_proj", adapter_dtype=torch.float32)
        assert all(wrapped.layer.experts[0].B.dtype == torch.float32 for wrapped in named.values())

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"targets": "nothing"}, r"No linear layer's name matches nothing\. There are: q_proj \(2\)"),
            ({"rank": 33}, r"The rank is 33 for layers\.0\.self_attn\.q_proj"),
            ({"top_k": 5}, "chooses 5 of 3"),
        ],
    )
    def test_an_error_leaves_the_model_alone(self, options, sentence):
        model = tiny()
        with pytest.raises(InputError, match=sentence):
            inject_moe_lora(model, **{"num_experts": 3, "rank": 2, **options})
        assert not moe_lora_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_one_model_has_one_kind_of_adapter(self):
        model = tiny()
        inject_moe_lora(model, 3, 2)
        with pytest.raises(InputError, match="already"):
            inject_moe_lora(model, 3, 2)
        adapted = tiny()
        inject_lora(adapted, rank=2)
        with pytest.raises(InputError, match="already"):
            inject_moe_lora(adapted, 3, 2)

    def test_a_layer_with_two_names_gets_one_mixture(self):
        linear = nn.Linear(8, 8)
        model = nn.ModuleDict({"first": linear, "second": linear, "third": nn.Linear(8, 8)})
        layers = inject_moe_lora(model, 2, 2, targets="*")
        assert layers["first"] is layers["second"] is model["second"]
        assert layers["third"] is not layers["first"]

    def test_mixture_of_other_sizes_is_refused(self):
        with pytest.raises(InputError, match="8 to 9 has a mixture of 24 to 16"):
            MoELoRALinear(nn.Linear(8, 9), mixture())

    @pytest.mark.parametrize("form", FORMS)
    def test_without_an_expert_only_what_it_gave_is_missing(self, form):
        model = nn.Sequential(nn.Linear(24, 16))
        wrapped = inject_moe_lora(model, 4, 3, 2, "0", form=form)["0"]
        layer, x = learned(wrapped.layer).eval(), normal(30, 24)
        whole = model(x)
        missing = []
        for index in range(4):
            with without_expert(model, index):
                assert layer.silenced == index
                assert load_of(layer.router.route(x)).num_tokens == 30
                missing.append(whole - model(x))
            gates = layer.router.route(x).dense_gates()[:, index]
            expected = gates[:, None] * (x @ layer.experts[index].A @ layer.experts[index].B)
            torch.testing.assert_close(missing[-1], expected, atol=1e-5, rtol=1e-4)
        with without_expert(model, 3):
            with without_expert(model, 1):
                pass
            assert layer.silenced == 3
        assert layer.silenced is None
        torch.testing.assert_close(sum(missing), whole - wrapped.base(x), atol=1e-5, rtol=1e-4)
        for index, there in ((4, 4), (-1, 4)):
            with pytest.raises(InputError, match=f"no expert {index} .*has {there}"), without_expert(model, index):
                pass
        with pytest.raises(InputError, match="has 0"), without_expert(nn.Linear(2, 2), 0):
            pass
