"""The kernels choose and gate as the definitions do, forward and backward.

They are checked through Triton's interpreter where there is no GPU: `python -m tests.unit.test_moe_gating`.
"""

import copy
import math
from unittest.mock import patch

import pytest
import torch

from engine import MoELoRALayer
from engine.errors import InputError
from engine.moe import gating
from engine.moe.gating import Choice, gate_columns, within
from engine.moe.observation import observing
from engine.moe.routing import ExpertRouter
from tests.interpreter import report, run_in_interpreter

KINDS = ("softmax", "sigmoid")
SIZES = ((5, 4, 1), (3, 4, 2), (70, 3, 3), (1, 1, 1), (0, 4, 2), (33, 20, 5), (9, 128, 8))
"""Tokens, experts, experts chosen per token."""
D_MODEL = 6


def case(seed, num_tokens, num_experts, top_k, kind, device, rate=0.1, **options):
    """A router with a bias, tokens and padding."""
    torch.manual_seed(seed)
    router = ExpertRouter(D_MODEL, num_experts, top_k, kind=kind, bias_rate=rate, **options)
    router.selection_bias.copy_(torch.randn(num_experts))
    x, padding = torch.randn(num_tokens, D_MODEL), torch.rand(num_tokens) < 0.3
    return router.to(device), x.to(device).requires_grad_(), padding.to(device)


def with_kernels(used):
    return patch("engine.moe.routing.has_kernels", lambda like, num_experts: used), patch.object(
        gating, "has_kernels", lambda like, num_experts: used
    )


def both_ways(run):
    """What a function gives with the kernels and without them."""
    found = []
    for used in (True, False):
        first, second = with_kernels(used)
        with first, second:
            found.append(run())
    return found


def check_choices_and_their_gradients(device):
    for seed, (num_tokens, num_experts, top_k) in enumerate(SIZES):
        for kind in KINDS:
            for normalize in (True, False):
                router, x, padding = case(
                    seed, num_tokens, num_experts, top_k, kind, device, normalize=normalize, temperature=0.5, rate=0
                )
                upstream = torch.randn(num_tokens, top_k, device=device)
                for given in (None, padding):

                    def run(router=router, x=x, given=given, upstream=upstream):
                        choice = router.choose(x, given)
                        kept = choice.indices >= 0
                        loss = (choice.gates * upstream)[kept].sum()
                        return *choice, *torch.autograd.grad(loss, (x, router.weight))

                    ours, theirs = both_ways(run)
                    assert torch.equal(ours[0], theirs[0])
                    kept = ours[0] >= 0
                    torch.testing.assert_close(ours[1][kept], theirs[1][kept], atol=1e-6, rtol=1e-5)
                    for one, other in zip(ours[2:], theirs[2:], strict=True):
                        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def check_the_load_is_that_of_the_tokens_that_count(device):
    for seed, (num_tokens, num_experts, top_k) in enumerate(SIZES):
        router, x, padding = case(seed, num_tokens, num_experts, top_k, "sigmoid", device)

        def run(router=router, x=x, padding=padding):
            router.balancer.load.zero_()
            choice = router.choose(x, padding)
            choice.gates.sum().backward()
            return router.balancer.load.clone(), choice

        (ours, choice), (theirs, _) = both_ways(run)
        assert torch.equal(ours, theirs)
        assert ours.sum() == (~padding).sum() * top_k
        assert torch.equal(ours, torch.bincount(choice.indices[choice.indices >= 0], minlength=num_experts).float())


def check_numbers_at_the_edge(device):
    router, x, _ = case(0, 6, 4, 2, "softmax", device)
    x = torch.stack([x[0] * 1e30, x[1] * 0, *(torch.full_like(x[0], each) for each in (1e38, -1e38))]).detach()
    for kind in KINDS:
        router.kind = kind
        for normalize in (True, False):
            router.normalize = normalize
            ours, theirs = both_ways(lambda: router.choose(x))
            assert ours.gates.isfinite().all()
            torch.testing.assert_close(ours.gates, theirs.gates)
            upstream = torch.randn(ours.gates.shape, device=device)
            for given in (x[:2], x[2:]):  # logits that are cut have no gradient

                def gradient(given=given, upstream=upstream):
                    gates = router.choose(given).gates
                    return torch.autograd.grad((gates * upstream[: len(given)]).sum(), router.weight)[0]

                ours, theirs = both_ways(gradient)
                torch.testing.assert_close(ours, theirs)
    product = torch.tensor([[float("nan"), 0.0, 1.0], [0.0, float("inf"), 1.0], [1.0, 2.0, 3.0]], device=device)
    options = {"sigmoid": False, "normalize": True, "largest": 10.0, "scale": 1.0}
    bias = torch.zeros(3, device=device)
    chosen = gating.choose_in_one_launch(product, bias, None, None, 2, options)
    assert chosen.gates[:2].isnan().any(1).all()  # what is not finite does not look as if it were
    assert chosen.gates[2].isfinite().all()
    assert chosen.indices[2].tolist() == [2, 1]
    least = torch.tensor([0.0, -math.inf, -math.inf], device=device)
    assert gating.choose_in_one_launch(product[2:], least, None, None, 2, options).indices.tolist() == [[0, 1]]


def check_the_bias_moves_before_each_choice(device):
    router, x, padding = case(0, 40, 5, 2, "sigmoid", device, rate=0.3)

    def run():
        trained = copy.deepcopy(router)
        seen = []
        for _ in range(4):
            choice = trained.choose(x, padding)
            choice.gates.sum().backward()
            seen.append(choice.indices)
        return seen

    ours, theirs = both_ways(run)
    assert not torch.equal(theirs[0], theirs[1])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def check_columns_that_are_not_finite(device):
    u = torch.tensor([[math.nan, math.inf, -math.inf, 2.0, 1.0, -1.0]], device=device).requires_grad_()
    gates = torch.tensor([[0.5]], device=device).requires_grad_()
    choice = Choice(torch.tensor([[0]], device=device), gates)

    def run():
        y = gate_columns(u, choice, 1, 6, 1.0, 1.0)
        return y, *torch.autograd.grad(y.sum(), (u, gates))

    ours, theirs = both_ways(run)
    assert ours[0].tolist() == [[0.0, 0.5, -0.5, 0.5, 0.5, -0.5]]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def check_gated_columns_and_their_gradients(device):
    for seed, (num_tokens, num_experts, top_k) in enumerate(SIZES):
        for rank in (1, 3, 16):
            for width in (num_experts * rank, rank):
                generator = torch.Generator().manual_seed(seed)
                u = torch.randn(num_tokens, width, generator=generator).to(device).requires_grad_()
                scores = torch.rand(num_tokens, num_experts, generator=generator).to(device)
                indices = scores.argsort(1)[:, :top_k]  # not contiguous
                indices[torch.arange(num_tokens, device=device) % 4 == 3] = -1
                gates = torch.rand(num_tokens, top_k, generator=generator).to(device).requires_grad_()
                upstream = torch.randn(num_tokens, num_experts * rank, generator=generator).to(device)

                def run(u=u, indices=indices, gates=gates, upstream=upstream, rank=rank, experts=num_experts):
                    y = gate_columns(u, Choice(indices, gates), experts, rank, 2.5, 1.0)
                    return y, *torch.autograd.grad(y, (u, gates), upstream)

                ours, theirs = both_ways(run)
                for one, other in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
                assert not ours[0][indices[:, 0] < 0].any()


def check_the_layer_is_the_same_with_the_kernels(device):
    for seed, (shared_a, kind) in enumerate([(False, "sigmoid"), (True, "sigmoid"), (False, "softmax")]):
        torch.manual_seed(seed)
        layer = MoELoRALayer(12, 10, 5, 3, 2, shared_a=shared_a, kind=kind, form="concatenated").to(device)
        with torch.no_grad():
            for expert in layer.experts:
                expert.B.normal_()
        x = torch.randn(3, 7, 12, device=device).requires_grad_()
        base = torch.randn(3, 7, 10, device=device)
        padding = torch.rand(3, 7, device=device) < 0.3
        upstream = torch.randn(3, 7, 10, device=device)

        def run(layer=layer, x=x, base=base, padding=padding, upstream=upstream):
            layer = copy.deepcopy(layer)
            y = layer(x, padding, base)
            gradients = torch.autograd.grad(y, (x, *layer.parameters()), upstream)
            return y, *gradients, layer.router.selection_bias.clone()

        ours, theirs = both_ways(run)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


CHECKS = {name: check for name, check in sorted(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted():
    return run_in_interpreter("tests.unit.test_moe_gating")


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check, interpreted):
    assert interpreted[check] == "", interpreted[check]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check):
    CHECKS[check]("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gated_columns_in_every_dtype_on_the_gpu(dtype):
    torch.manual_seed(0)
    u = torch.randn(100, 5 * 7, device="cuda").to(dtype).requires_grad_()
    choice = Choice(torch.rand(100, 5, device="cuda").argsort(1)[:, :2], torch.rand(100, 2, device="cuda"))
    y = gate_columns(u, choice, 5, 7, 0.5, 100.0)
    exact = gate_columns(u.double(), Choice(choice.indices, choice.gates.double()), 5, 7, 0.5, 100.0)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy", "random"])
def test_a_choice_is_what_a_routing_sorts(seed, kind):
    router, x, padding = case(seed, 20, 6, 2, kind, "cpu")
    for given in (None, padding):
        torch.manual_seed(seed)
        choice = router.choose(x, given)
        torch.manual_seed(seed)
        routing = router.route(x, given)
        assert torch.equal(choice.indices, routing.choice.indices)
        assert torch.equal(choice.gates, routing.choice.gates)
        table = routing.dense_gates()
        kept = choice.indices >= 0
        assert torch.equal(table.gather(1, choice.indices.clamp_min(0))[kept], choice.gates[kept])
        assert (table > 0).sum() <= kept.sum()


def test_observers_see_what_was_chosen():
    router, x, padding = case(0, 20, 6, 2, "softmax", "cpu")
    with observing(router) as seen:
        choice = router.choose(x, padding)
    ((_, routing),) = seen
    assert torch.equal(routing.choice.indices, choice.indices)
    assert routing.probs.requires_grad


@pytest.mark.parametrize("options", [{"kind": "expert choice"}, {"capacity_factor": 1.0}])
def test_where_tokens_do_not_get_what_they_choose_there_is_no_choice(options):
    router = ExpertRouter(D_MODEL, 4, 2, **options)
    with pytest.raises(InputError, match="call route"):
        router.choose(torch.randn(3, D_MODEL))


def test_numbers_beyond_the_limit_are_cut():
    u = torch.tensor([3.0, -3.0, 0.5, float("nan"), float("inf")])
    assert within(u, 2.0).tolist() == [2.0, -2.0, 0.5, 0.0, 2.0]


if __name__ == "__main__":
    report(CHECKS)
