"""A grouped product is what each expert's own product is, whichever way computes it."""

import pytest
import torch

from engine.errors import InputError
from engine.moe import grouped
from engine.moe.grouped import Groups, grouped_product, looped_product, obstacle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COUNTS = ([3, 4, 5], [0, 12, 0], [12, 0, 0], [0, 0, 12], [1, 11, 0], [0, 0, 0])
WAYS = (grouped_product, looped_product)


def drawn(counts, inputs, outputs, dtype, seed=0, device="cpu", transposed=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), inputs, generator=generator).to(device, dtype).requires_grad_()
    shape = (len(counts), outputs, inputs) if transposed else (len(counts), inputs, outputs)
    stored = (torch.randn(shape, generator=generator) / inputs**0.5).to(device, dtype).requires_grad_()
    upstream = torch.randn(sum(counts), outputs, generator=generator).to(device, dtype)
    return x, stored, upstream, torch.tensor(counts, device=device)


def expert_by_expert(x, weights, counts):
    """Row by row: what is meant."""
    experts = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu()).tolist()
    return torch.stack([x[row] @ weights[expert] for row, expert in enumerate(experts)])


def check(way, counts, inputs, outputs, dtype, seed=0, device="cpu", transposed=False):
    x, stored, upstream, counts = drawn(counts, inputs, outputs, dtype, seed, device, transposed)
    found = way(x, stored.mT if transposed else stored, Groups(counts))
    found_gradients = torch.autograd.grad(found, (x, stored), upstream)
    assert found.dtype == dtype
    assert found.shape == upstream.shape
    exact_x, exact_stored = (each.detach().double().requires_grad_() for each in (x, stored))
    if len(x):
        wanted = expert_by_expert(exact_x, exact_stored.mT if transposed else exact_stored, counts)
        wanted_gradients = torch.autograd.grad(wanted, (exact_x, exact_stored), upstream.double())
    else:
        wanted, wanted_gradients = found.double(), [torch.zeros_like(each) for each in (exact_x, exact_stored)]
    room = 128 if dtype == torch.float64 else 4  # the reference is float64 itself, summed in another order
    tolerance = room * torch.finfo(dtype).eps
    for one, other in zip((found, *found_gradients), (wanted, *wanted_gradients), strict=True):
        assert one.shape == other.shape
        if one.numel():
            assert (one.double() - other).abs().max() <= tolerance * max(1, other.abs().max().item())
    for expert in (counts == 0).nonzero().flatten().tolist():
        assert (found_gradients[1][expert] == 0).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_each_experts_own_product(way, counts, dtype):
    for seed, (inputs, outputs) in enumerate(((16, 24), (7, 5), (8, 1), (1, 8))):
        for transposed in (False, True):
            check(way, counts, inputs, outputs, dtype, seed, transposed=transposed)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_each_experts_own_product_on_a_gpu(way, dtype):
    for counts in (*COUNTS, [0, 700, 1, 0, 67, 130, 0]):
        for inputs, outputs in ((64, 128), (128, 64), (7, 5), (8, 1)):
            poison = torch.full((2**22,), float("nan"), device="cuda")  # what a kernel leaves out would show
            del poison
            check(way, counts, inputs, outputs, dtype, device="cuda", transposed=inputs > outputs)


def test_the_kernel_is_used_where_it_can_be():
    x, weights, *_ = drawn([3, 4, 5], 16, 24, torch.float32)
    assert obstacle(x, weights) == ""
    assert obstacle(x, weights.mT.contiguous().mT) == ""


def test_what_is_in_the_kernels_way_is_said():
    x, weights, *_ = drawn([3, 4, 5], 16, 24, torch.float32)
    odd, odd_weights, *_ = drawn([3, 4, 5], 7, 5, torch.float32)
    assert "float64" in obstacle(x.double(), weights.double())
    assert "16 bytes" in obstacle(odd, odd_weights)
    assert "16 bytes" in obstacle(torch.randn(3, 17)[:, 1:], weights)
    assert "no rows" in obstacle(x[:0], weights)


def test_without_the_kernel_there_is_the_loop(monkeypatch):
    x, weights, _, counts = drawn([3, 0, 9], 16, 24, torch.float32)
    with_kernel = grouped_product(x, weights, counts)
    monkeypatch.setattr(grouped, "_fused", None)
    assert "no grouped product" in obstacle(x, weights)
    torch.testing.assert_close(grouped_product(x, weights, counts), with_kernel)


def test_counts_and_groups_are_the_same():
    x, weights, _, counts = drawn([3, 0, 9], 16, 24, torch.float32)
    assert torch.equal(grouped_product(x, weights, counts), grouped_product(x, weights, Groups(counts)))


def test_only_what_wants_a_gradient_gets_one():
    x, weights, upstream, counts = drawn([3, 0, 9], 7, 5, torch.float32)
    both = torch.autograd.grad(grouped_product(x, weights, counts), (x, weights), upstream)
    (for_x,) = torch.autograd.grad(grouped_product(x, weights.detach(), counts), (x,), upstream)
    (for_weights,) = torch.autograd.grad(grouped_product(x.detach(), weights, counts), (weights,), upstream)
    assert torch.equal(for_x, both[0])
    assert torch.equal(for_weights, both[1])


def test_autocast_computes_in_its_dtype():
    for inputs, outputs in ((16, 24), (7, 5)):
        x, weights, upstream, counts = drawn([3, 0, 9], inputs, outputs, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = grouped_product(x, weights, counts)
        wanted = grouped_product(x.bfloat16(), weights.bfloat16(), counts)
        assert torch.equal(found, wanted)
        gradients = torch.autograd.grad(found, (x, weights), upstream.bfloat16())
        assert [each.dtype for each in gradients] == [torch.float32] * 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_any_layout(device):
    x, weights, upstream, counts = drawn([3, 0, 9], 16, 24, torch.bfloat16, device=device)
    for given in (torch.ones_like(upstream[:1, :1]).expand_as(upstream), upstream.mT.contiguous().mT):
        found = torch.autograd.grad(grouped_product(x, weights, counts), (x, weights), given)
        wanted = torch.autograd.grad(looped_product(x, weights, Groups(counts)), (x, weights), given)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_compiles(device):
    for inputs, outputs, dtype in ((16, 24, torch.float32), (7, 5, torch.float32), (16, 24, torch.bfloat16)):
        x, weights, upstream, counts = drawn([3, 0, 9], inputs, outputs, dtype, device=device)
        compiled = torch.compile(lambda *given: 2 * grouped_product(*given))
        found = compiled(x, weights, counts)
        wanted = 2 * grouped_product(x, weights, counts)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(
            torch.autograd.grad(found, (x, weights), upstream),
            torch.autograd.grad(wanted, (x, weights), upstream),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_shapes_that_do_not_belong_together_are_named():
    x, weights, _, counts = drawn([3, 0, 9], 16, 24, torch.float32)
    with pytest.raises(InputError, match=r"\(12, 16\).*\(3, 24, 16\)"):
        grouped_product(x, weights.mT, counts)
    with pytest.raises(InputError, match=r"\(2,\) for 3 experts"):
        grouped_product(x, weights, counts[:2])
