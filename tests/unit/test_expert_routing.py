"""The router: who gets the token, how much it counts, and what is left when something does not fit."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine import ExpertRouter
from engine.errors import InputError
from engine.moe.balance import capacity
from engine.moe.kinds import KINDS
from engine.moe.routing import check_finite

SEEDS = range(4)
TOKEN_KINDS = [kind for kind in KINDS if kind != "expert choice"]


def router(seed=0, d_model=16, num_experts=4, top_k=2, **options):
    torch.manual_seed(seed + 1000)  # not what `normal` draws: the first tokens would be the experts' own rows
    return ExpertRouter(d_model, num_experts, top_k, **options)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padding_of(*lengths, longest):
    return torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]


class TestContract:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("training", [True, False])
    def test_probabilities_are_the_softmax_and_the_most_probable_are_chosen(self, seed, training):
        layer, x = router(seed).train(training), normal(3, 7, 16, seed=seed)
        probs, indices = layer(x)
        assert probs.shape == (3, 7, 4)
        assert indices.shape == (3, 7, 2)
        torch.testing.assert_close(probs, (x @ layer.weight.T).softmax(-1))
        assert torch.equal(indices, probs.topk(2).indices)

    @pytest.mark.parametrize("draw", [torch.randn, torch.rand, lambda *shape: 5 + torch.randn(*shape)])
    @pytest.mark.parametrize("d_model", [16, 64, 512])
    def test_every_expert_of_a_fresh_router_gets_a_share(self, draw, d_model):
        for seed in range(100):
            _, indices = router(seed, d_model, 4, 1)(draw(1, 128, d_model))
            shares = torch.bincount(indices.flatten(), minlength=4) / 128
            assert shares.min() > 0.05
            assert shares.max() < 0.7

    @pytest.mark.parametrize(("d_model", "num_experts"), [(64, 8), (8, 8), (4, 16), (1, 3)])
    def test_fresh_rows_have_norm_one_and_are_orthogonal_where_there_is_room(self, d_model, num_experts):
        weight = router(0, d_model, num_experts, 1).weight
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(num_experts))
        if num_experts < d_model:
            torch.testing.assert_close(weight @ weight.T, torch.eye(num_experts), atol=1e-5, rtol=0)
        if d_model > 1:
            torch.testing.assert_close(weight.sum(1), torch.zeros(num_experts), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_temperature_leaves_the_first_logits_and_scales_what_is_learned(self, seed):
        x = normal(9, 16, seed=seed)
        plain, slow = router(seed), router(seed, temperature=8.0)
        torch.testing.assert_close(slow.logits(x), plain.logits(x))
        with torch.no_grad():
            plain.weight[0] += 0.1
            slow.weight[0] += 0.8
        torch.testing.assert_close(slow.logits(x), plain.logits(x))


@st.composite
def cases(draw):
    num_experts = draw(st.integers(1, 6))
    return {
        "seed": draw(st.integers(0, 10_000)),
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, num_experts)),
        "kind": draw(st.sampled_from(list(KINDS))),
        "capacity_factor": draw(st.sampled_from([None, 0.0, 0.01, 0.5, 1.0, 2.0])),
        "normalize": draw(st.booleans()),
        "lengths": draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)),
        "padded": draw(st.booleans()),
    }


@given(cases())
@settings(max_examples=300, deadline=None)
def test_every_routing_adds_up(case):
    lengths = case.pop("lengths")
    padding = padding_of(*lengths, longest=5) if case.pop("padded") and lengths else None
    kind, E, K = case["kind"], case["num_experts"], case["top_k"]
    layer, x = router(**case), normal(len(lengths), 5, 16, seed=case["seed"])
    routing = layer.route(x, padding)
    N = 5 * len(lengths)
    valid = torch.ones(N, dtype=torch.bool) if padding is None else ~padding.flatten()
    assert routing.num_tokens == valid.sum()
    assert routing.logits.shape == routing.probs.shape == (N, E)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(N))
    assert routing.tokens.shape == routing.experts.shape == routing.gates.shape
    assert torch.equal(routing.counts, torch.bincount(routing.experts, minlength=E))
    assert torch.equal(routing.wanted, routing.counts + torch.bincount(routing.dropped[:, 1], minlength=E))
    order = routing.experts * N + routing.tokens
    assert (order.diff() > 0).all()  # by expert, then by token, nothing twice
    assert valid[routing.tokens].all()
    assert valid[routing.dropped[:, 0]].all()
    assert (routing.gates >= 0).all()
    assert (routing.gates <= 1 + 1e-6).all()
    dense = routing.dense_gates()
    assert torch.equal(dense[routing.tokens, routing.experts], routing.gates)
    assert (dense != 0).sum() <= len(routing.gates)
    factor = case["capacity_factor"]
    if kind == "expert choice":
        C = min(math.ceil((1.0 if factor is None else factor) * routing.num_tokens * K / E - 1e-9), routing.num_tokens)
        assert (routing.counts == C).all()
        assert routing.indices is None
        assert len(routing.dropped) == (valid & (dense == 0).all(-1)).sum()
        return
    indices = routing.indices
    assert (indices[~valid] == -1).all()
    assert all(len(set(row)) == K for row in indices[valid].tolist())
    pairs = {(n, e) for n, row in enumerate(indices.tolist()) for e in row if e >= 0}
    kept = set(zip(routing.tokens.tolist(), routing.experts.tolist(), strict=True))
    refused = set(map(tuple, routing.dropped.tolist()))
    assert kept | refused == pairs
    assert not kept & refused
    if factor is None:
        assert not refused
        if (case["normalize"] and K > 1) or kind == "random":
            torch.testing.assert_close(dense.sum(-1), valid.float())
    else:
        assert (routing.counts == routing.wanted.clamp_max(capacity(routing.num_tokens, E, K, factor))).all()
        place = {(n, e): (k, n) for n, row in enumerate(indices.tolist()) for k, e in enumerate(row)}
        for one in refused:  # first choices are taken before second ones, and then those of the first tokens
            assert all(place[other] < place[one] for other in kept if other[1] == one[1])


class TestGates:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_softmax_gates_are_the_probabilities_of_the_chosen_renormalised_for_more_than_one(self, seed, top_k):
        x = normal(3, 7, 16, seed=seed)
        for normalize in (True, False):
            layer = router(seed, top_k=top_k, normalize=normalize)
            probs, indices = layer(x)
            chosen = probs.gather(-1, indices)
            if normalize and top_k > 1:
                chosen = chosen / chosen.sum(-1, keepdim=True)
            expected = torch.zeros_like(probs).scatter(-1, indices, chosen)
            torch.testing.assert_close(layer.route(x).dense_gates(), expected.flatten(0, 1))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_sigmoid_agrees_with_deepseek_v3_of_transformers(self, seed):
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

        config = DeepseekV3Config(
            hidden_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1,
            routed_scaling_factor=1.0, norm_topk_prob=True,
        )  # fmt: skip
        theirs = DeepseekV3TopkRouter(config)
        ours = router(seed, num_experts=8, top_k=3, kind="sigmoid")
        bias = 0.1 * normal(8, seed=seed)
        with torch.no_grad():
            theirs.weight.copy_(ours.weight)
            theirs.e_score_correction_bias.copy_(bias)
            ours.selection_bias.copy_(bias)
        x = normal(1, 20, 16, seed=seed)
        _, weights, indices = theirs(x)
        expected = torch.zeros(20, 8).scatter(1, indices, weights)
        torch.testing.assert_close(ours.route(x).dense_gates(), expected)

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
    def test_the_bias_selects_and_does_not_weigh(self, kind):
        layer, x = router(top_k=1, kind=kind).eval(), normal(50, 16)
        scores = layer.logits(x).sigmoid() if kind == "sigmoid" else layer.logits(x).softmax(-1)
        before = layer.route(x)
        layer.selection_bias[2] += 100
        after = layer.route(x)
        assert (after.indices == 2).all()
        torch.testing.assert_close(after.gates, scores[:, 2])
        assert torch.equal(after.probs, before.probs)

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy", "expert choice"])
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_the_gradient_reaches_the_router(self, kind, top_k):
        layer, x = router(top_k=top_k, kind=kind), normal(9, 16)
        routing = layer.route(x)
        (routing.gates * normal(len(routing.gates), seed=5)).sum().backward()
        assert layer.weight.grad.abs().max() > 0

    def test_random_gates_are_equal_and_the_experts_drawn_anew(self):
        layer, x = router(kind="random"), normal(2000, 16)
        first, second = layer.route(x), layer.route(x)
        torch.testing.assert_close(first.gates, torch.full((4000,), 0.5))
        assert not torch.equal(first.indices, second.indices)
        torch.testing.assert_close(first.counts / 4000, torch.full((4,), 0.25), atol=0.03, rtol=0)
        torch.testing.assert_close(router(kind="random", top_k=1).route(x).gates, torch.ones(2000))

    def test_noise_is_for_training_and_has_its_standard_deviation(self):
        layer, x = router(kind="noisy", noise=0.5), normal(5000, 16)
        plain = x @ layer.weight.T
        difference = layer.logits(x) - plain
        assert difference.std().item() == pytest.approx(0.5, rel=0.03)
        assert abs(difference.mean().item()) < 0.02
        torch.testing.assert_close(layer.eval().logits(x), plain)
        torch.testing.assert_close(router(kind="softmax", noise=0.5).logits(x), plain)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_expert_choice_takes_each_experts_most_probable_tokens(self, seed):
        layer, x = router(seed, top_k=1, kind="expert choice", capacity_factor=1.5), normal(21, 16, seed=seed)
        routing = layer.route(x)
        for expert in range(4):
            taken = routing.tokens[routing.experts == expert]
            best = routing.probs[:, expert].topk(math.ceil(1.5 * 21 / 4)).indices
            assert torch.equal(taken, best.sort().values)
        torch.testing.assert_close(routing.gates, routing.probs[routing.tokens, routing.experts])
        assert torch.equal(routing.dropped[:, 1], routing.probs[routing.dropped[:, 0]].argmax(-1))
        with pytest.raises(InputError, match="expert choice a token has no"):
            layer(x)


class TestPadding:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "expert choice"])
    @pytest.mark.parametrize("content", [0.0, 1e30, math.nan])
    def test_padding_is_as_if_it_were_not_there(self, seed, kind, content):
        layer, x = router(seed, kind=kind, capacity_factor=0.6), normal(3, 6, 16, seed=seed)
        padding = padding_of(6, 2, 0, longest=6)
        alone = layer.route(x[~padding])
        x[padding] = content
        x.requires_grad_()
        routing = layer.route(x, padding)
        places = (~padding).flatten().nonzero()[:, 0]
        assert torch.equal(routing.tokens, places[alone.tokens])
        assert torch.equal(routing.dropped[:, 0], places[alone.dropped[:, 0]])
        for name in ("experts", "gates", "counts", "wanted"):
            torch.testing.assert_close(getattr(routing, name), getattr(alone, name))
        routing.gates.sum().backward()
        assert x.grad.isfinite().all()
        assert layer.weight.grad.isfinite().all()
        assert not x.grad[padding].any()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (0, 16), (2, 3, 16)])
    def test_no_tokens_and_nothing_but_padding_give_an_empty_routing(self, kind, shape):
        layer = router(kind=kind, bias_rate=0.1, capacity_factor=1.0, balance="texts")
        routing = layer.route(torch.zeros(shape), torch.ones(shape[:-1], dtype=torch.bool))
        assert routing.num_tokens == len(routing.tokens) == len(routing.gates) == len(routing.dropped) == 0
        assert not routing.counts.any()
        assert not routing.wanted.any()
        if kind != "random":
            routing.dense_gates().sum().backward()
        assert not layer.selection_bias.any()

    def test_other_shape_is_refused(self):
        with pytest.raises(InputError, match=r"padding has shape \(3,\).*\(2, 3\)"):
            router().route(torch.zeros(2, 3, 16), torch.zeros(3, dtype=torch.bool))


class TestNumbers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0.0, 1.0, 1e4, "max"])
    @pytest.mark.parametrize("temperature", [1e-3, 1.0, 32.0])
    def test_finite_input_gives_finite_probabilities_and_gates(self, kind, dtype, value, temperature):
        layer = router(kind=kind, d_model=64, temperature=temperature)
        x = normal(9, 64).sign().to(dtype) * (torch.finfo(dtype).max if value == "max" else value)
        routing = layer.route(x)
        assert routing.gates.dtype == torch.promote_types(dtype, torch.float32)
        for tensor in (routing.logits, routing.probs, routing.gates):
            assert tensor.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [True, False])
    def test_half_precision_input_is_routed_in_float32(self, dtype, autocast):
        layer, x = router(d_model=256), normal(64, 256, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            probs = layer(x)[0]
        torch.testing.assert_close(
            probs, (x.double() @ layer.weight.double().T).softmax(-1).float(), atol=1e-6, rtol=1e-5
        )
        assert probs.dtype == torch.float32
        assert layer.to(dtype)(x)[0].dtype == torch.float32

    @pytest.mark.gpu
    @pytest.mark.parametrize("seed", SEEDS)
    def test_half_precision_on_a_gpu_is_summed_up_in_float32(self, seed):
        layer = router(seed, d_model=512).bfloat16().cuda()
        exact = copy.deepcopy(layer).double()
        x = normal(64, 512, seed=seed, dtype=torch.bfloat16).cuda().requires_grad_()
        precise = x.detach().double().requires_grad_()
        probs, expected = layer(x)[0], exact(precise)[0]
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.double(), expected, atol=1e-5, rtol=1e-4)
        upstream = normal(64, 4, seed=seed + 9).cuda()
        (probs * upstream).sum().backward()
        (expected * upstream).sum().backward()
        for ours, theirs in ((x.grad, precise.grad), (layer.weight.grad, exact.weight.grad)):
            assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()
        assert layer(torch.full_like(x, torch.finfo(torch.bfloat16).max))[0].isfinite().all()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_is_named(self, value):
        layer, x = router(), normal(2, 3, 16)
        x[1, 2, 5] = value
        for call in (layer.route, layer):
            with pytest.raises(InputError, match=r"given 1 of 6 tokens that are not finite"):
                call(x)
        with torch.no_grad():
            layer.weight[1, :3] = value
        with pytest.raises(InputError, match=r"weight has 3 of 64 numbers that are not finite.*learning rate"):
            layer.route(normal(2, 3, 16))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_routing_that_was_compiled_is_not_checked_but_can_be(self, kind, value):
        layer, x = router(kind=kind), normal(6, 16)
        route = torch.compile(layer.route, backend="eager")
        check_finite(route(x))
        x[4, 0] = value
        routing = route(x)
        assert routing.logits.isnan().any(-1).tolist() == [False] * 4 + [True, False]
        with pytest.raises(InputError, match=r"layers\.3 gave logits that are not finite for 1 of 6 tokens"):
            check_finite(routing, "layers.3")


class TestModule:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"top_k": 5}, "chooses 5 of 4 experts: choose from 1 to 4"),
            ({"top_k": 0}, "chooses 0 of 4"),
            ({"num_experts": 0, "top_k": 1}, "0 experts: both must be at least 1"),
            ({"d_model": 0}, "width 0"),
            ({"kind": "soft"}, "'soft': choose one of softmax, sigmoid"),
            ({"noise": -1.0}, "The noise is -1.0"),
            ({"noise": math.nan}, "The noise is nan"),
            ({"temperature": 0.0}, "The temperature is 0.0"),
            ({"temperature": math.nan}, "The temperature is nan"),
            ({"balance": "words"}, "'words': choose tokens or texts"),
        ],
    )
    def test_wrong_values_are_named(self, options, sentence):
        with pytest.raises(InputError, match=sentence):
            router(**options)

    def test_wrong_width_is_named(self):
        with pytest.raises(InputError, match=r"width 16, given is a tensor of \(2, 3\)"):
            router().route(torch.zeros(2, 3))

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_expert_gets_everything(self, kind):
        layer, x = router(num_experts=1, top_k=1, kind=kind, bias_rate=0.1), normal(2, 3, 16)
        routing = layer.route(x)
        assert routing.counts.tolist() == [6]
        if kind != "random":
            routing.gates.sum().backward()
        assert not layer.selection_bias.any()

    def test_observers_see_every_routing_once(self):
        layer, x, seen = router(), normal(2, 3, 16).requires_grad_(), []
        layer.observers.append(seen.append)
        routing = layer.route(x)
        assert seen == [routing]
        torch.utils.checkpoint.checkpoint(
            lambda x: layer.route(x).gates.square(), x, use_reentrant=False
        ).sum().backward()
        assert len(seen) == 2

    @pytest.mark.parametrize("kind", TOKEN_KINDS)
    def test_copies_and_states_route_alike(self, kind):
        layer, x = router(kind=kind).eval(), normal(20, 16)
        layer.selection_bias.copy_(torch.arange(4.0))
        other = router(3, kind=kind).eval()
        other.load_state_dict(layer.state_dict())
        results = []
        for twin in (layer, other, copy.deepcopy(layer)):
            torch.manual_seed(0)
            results.append(twin.route(x).indices)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_runs_compiled(self):
        layer, x = router(bias_rate=0.1), normal(2, 8, 16)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin.route, backend="aot_eager")
        for _ in range(3):
            layer.route(x).gates.square().sum().backward()
            compiled(x).gates.square().sum().backward()
        torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
        assert torch.equal(twin.selection_bias, layer.selection_bias)
        layer.eval(), twin.eval()
        whole = torch.compile(twin, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(whole(x), layer(x), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_prints_its_sizes(self):
        assert "16, experts=4, top_k=2, kind='softmax'" in repr(router())

    def test_takes_a_single_token(self):
        layer, x = router(), normal(16)
        assert layer(x)[1].shape == (2,)
        assert layer.route(x).num_tokens == 1
        torch.testing.assert_close(layer(x)[0], F.softmax(layer.weight @ x, dim=0))


def test_it_can_be_pickled_and_is_the_same():
    router = ExpertRouter(16, 4, bias_rate=0.1)
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.selection_bias[1] = 3.0
    again = pickle.loads(pickle.dumps(router))
    for mine, theirs in zip(again(x), router(x), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(again.state_dict()["balancer.values"], router.selection_bias)
