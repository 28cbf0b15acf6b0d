"""One update over parameters that lie end to end: the same numbers as one update each, and sums that do not stall."""

import copy

import pytest
import torch
from torch import nn

from engine.errors import InputError
from engine.flat_optimizer import FlatOptimizer

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def model(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)).to(dtype)


def train(network, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(6, 5, generator=generator).to(next(network.parameters()))
        network(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_one_update_is_the_same_as_one_each(make, seed):
    apart, together = model(seed), model(seed)
    train(apart, make(apart.parameters()), 20)
    train(together, FlatOptimizer(together.parameters(), make), 20)
    for a, b in zip(apart.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_parameters_are_the_rounded_sums_of_float32_steps(seed):
    """Their gradients are bfloat16's, so both trainings get the same ones here."""
    network, exact = model(seed, torch.bfloat16), model(seed).bfloat16().float()
    optimizer, reference = FlatOptimizer(network.parameters(), small_steps), small_steps(exact.parameters())
    stalled = copy.deepcopy(network)
    plain = small_steps(stalled.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        for parameters in zip(network.parameters(), exact.parameters(), stalled.parameters(), strict=True):
            gradient = (torch.randn(parameters[0].shape, generator=generator) + 1).bfloat16()
            for parameter in parameters:
                parameter.grad = gradient.to(parameter.dtype)
        optimizer.step(), reference.step(), plain.step()
    for found, wanted, left in zip(network.parameters(), exact.parameters(), stalled.parameters(), strict=True):
        assert torch.equal(found, wanted.bfloat16())
        assert not torch.equal(left, wanted.bfloat16())


def small_steps(parameters):
    return torch.optim.SGD(parameters, lr=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_continues_where_it_was_taken_to_the_bit(make, dtype):
    network = model(0, dtype)
    optimizer = FlatOptimizer(network.parameters(), make)
    train(network, optimizer, 5)
    weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(network, optimizer, 5, seed=1)
    other = model(9, dtype)
    continued = FlatOptimizer(other.parameters(), make)
    other.load_state_dict(weights)
    continued.load_state_dict(state)
    train(other, continued, 5, seed=1)
    assert_equal(network, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_were_changed_meanwhile_keep_the_change(dtype):
    network, other = model(0, dtype), model(1, dtype)
    optimizer = FlatOptimizer(network.parameters(), small_steps)
    train(network, optimizer, 3)
    network.load_state_dict(other.state_dict())
    train(network, optimizer, 1, seed=7)
    train(other, FlatOptimizer(other.parameters(), small_steps), 1, seed=7)
    assert_equal(network, other)


def test_no_gradient_is_one_of_zero():
    network, other = model(0), model(0)
    optimizer = FlatOptimizer(network.parameters(), OPTIMIZERS["SGD"])
    for given in (network, other):
        given[0].weight.grad = torch.ones_like(given[0].weight)
    for parameter in (other[0].bias, other[2].weight):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    OPTIMIZERS["SGD"](other.parameters()).step()
    assert_equal(network, other)


def test_gradients_are_cleared_and_none_is_kept_between_steps():
    network = model(0)
    optimizer = FlatOptimizer(network.parameters(), OPTIMIZERS["AdamW"])
    train(network, optimizer, 1)
    assert all(parameter.grad is None for parameter in [*network.parameters(), optimizer.flat])
    network(torch.ones(1, 5)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in network.parameters())


def test_a_schedule_sets_the_rate():
    network, before = model(0), model(0)
    optimizer = FlatOptimizer(network.parameters(), OPTIMIZERS["AdamW"])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(network, optimizer, 3)
    assert_equal(network, before)


def test_a_schedule_sets_the_rate_after_loading_too():
    network = model(0)
    optimizer = FlatOptimizer(network.parameters(), OPTIMIZERS["SGD"])
    train(network, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(network)
    train(network, optimizer, 2)
    assert_equal(network, before)


def test_the_values_are_no_parameters_own_storage():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = FlatOptimizer([parameter], OPTIMIZERS["SGD"])
    state = copy.deepcopy(optimizer.state_dict())
    parameter.data.fill_(2.0)
    optimizer.load_state_dict(state)
    assert (parameter == 2).all()


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        ([], "no parameters"),
        ([torch.float64], "float64 on cpu"),
        ([torch.float32, torch.bfloat16], "bfloat16 on cpu, float32 on cpu"),
    ],
)
def test_other_parameters_are_refused(dtypes, said):
    with pytest.raises(InputError, match=f"not {said}"):
        FlatOptimizer([nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in dtypes], OPTIMIZERS["SGD"])


def test_a_closure_is_evaluated_with_gradients_first():
    network, other = model(0), model(0)
    optimizer = FlatOptimizer(network.parameters(), OPTIMIZERS["SGD"])

    def loss():
        found = network(torch.ones(2, 5)).square().mean()
        found.backward()
        return found

    assert optimizer.step(loss).item() == other(torch.ones(2, 5)).square().mean().item()
    assert not torch.equal(network[2].weight, other[2].weight)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_8_bit_steps_are_those_of_bitsandbytes_where_whole_blocks_fit(seed):
    from bitsandbytes.optim import PagedAdamW8bit

    def draw():
        torch.manual_seed(seed)
        return [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(64, 64), (128, 96), (512, 256)]]

    apart, together = draw(), draw()
    optimizers = PagedAdamW8bit(apart, lr=0.01), FlatOptimizer(together, lambda given: PagedAdamW8bit(given, lr=0.01))
    for _ in range(10):
        for a, b in zip(apart, together, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
