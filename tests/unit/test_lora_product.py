"""The fast product: the formula's numbers and gradients, and no more memory than it claims."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from engine.lora.product import AdaptedWeight, adapted_linear, adapted_linear_reference, adapted_linears

SHAPES = [(7,), (3, 7), (2, 5, 7), (2, 3, 2, 7), (0, 7)]
OUT, RANK, SCALING = 6, 3, 0.7


def operands(seed=0, shape=(2, 5, 7), dtype=torch.float64, bias=True, x_learns=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    x, weight = draw(*shape).requires_grad_(x_learns), draw(OUT, shape[-1])
    A, B = draw(shape[-1], RANK).requires_grad_(), draw(RANK, OUT).requires_grad_()
    return x, weight, draw(OUT) if bias else None, A, B, SCALING


def gradients(function, x, weight, bias, A, B, scaling):
    y = function(x, weight, bias, A, B, scaling)
    wanted = [tensor for tensor in (x, A, B) if tensor.requires_grad]
    probe = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y, *torch.autograd.grad((y * probe).sum(), wanted)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(seed, shape, bias):
    x, weight, b, A, B, scaling = operands(seed, shape, bias=bias)
    assert torch.autograd.gradcheck(lambda x, A, B: adapted_linear(x, weight, b, A, B, scaling), (x, A, B))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_learns", [True, False])
def test_agrees_with_the_formula(seed, shape, x_learns):
    given = operands(seed, shape, x_learns=x_learns)
    for found, wanted in zip(
        gradients(adapted_linear, *given), gradients(adapted_linear_reference, *given), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_close_to_exact_numbers_as_the_formula(dtype):
    def errors(function):
        exact = gradients(adapted_linear_reference, *(to(torch.float64) for to in casts))
        return [
            (f.double() - e).abs().max()
            for f, e in zip(gradients(function, *(to(dtype) for to in casts)), exact, strict=True)
        ]

    given = operands(1, (4, 64, 32), dtype=dtype)
    casts = [
        (lambda wanted, value=value: value.detach().to(wanted).requires_grad_(value.requires_grad))
        if isinstance(value, torch.Tensor)
        else (lambda wanted, value=value: value)
        for value in given
    ]
    for ours, plain in zip(errors(adapted_linear), errors(adapted_linear_reference), strict=True):
        assert ours <= 2 * plain + torch.finfo(dtype).eps


def test_float32_adapters_get_float32_gradients_from_a_bfloat16_base():
    x, weight, bias, A, B, scaling = operands(dtype=torch.bfloat16)
    A, B = (factor.detach().float().requires_grad_() for factor in (A, B))
    y = adapted_linear(x, weight, bias, A, B, scaling)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert A.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_as_linear_does(dtype):
    x, weight, bias, A, B, scaling = operands(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapted_linear(x, weight, bias, A, B, scaling)
        wanted = adapted_linear_reference(x, weight, bias, A, B, scaling)
    assert y.dtype == torch.nn.functional.linear(x, weight).to(torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted.float(), rtol=0.03, atol=0.1)
    y.float().sum().backward()
    assert x.grad.dtype == dtype
    assert A.grad.dtype == dtype


def test_autocast_leaves_float64_alone():
    given = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapted_linear(*given), adapted_linear(*given))
        assert adapted_linear(*given).dtype == torch.float64


def test_takes_what_is_not_contiguous():
    x, weight, bias, A, B, scaling = operands(shape=(2, 7, 7))
    y = adapted_linear(x.transpose(1, 2), weight, bias, A, B, scaling)
    assert torch.autograd.gradcheck(
        lambda x, A, B: adapted_linear(x.transpose(1, 2), weight, bias, A, B, scaling).transpose(0, 1), (x, A, B)
    )
    torch.testing.assert_close(y, adapted_linear_reference(x.transpose(1, 2), weight, bias, A, B, scaling))


def test_leaves_its_arguments_as_they_were():
    given = operands()
    before = [value.detach().clone() for value in given[:5]]
    gradients(adapted_linear, *given)
    assert all(torch.equal(value, old) for value, old in zip(given, before, strict=False))


def test_keeps_x_and_the_rank_wide_product_and_nothing_else_of_their_size():
    x, weight, bias, A, B, scaling = operands(shape=(2, 50, 7))
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        adapted_linear(x, weight, bias, A, B, scaling)
    parameters = {tensor.data_ptr() for tensor in (weight, A, B)}
    activations = [tensor for tensor in saved if tensor.data_ptr() not in parameters]
    assert [tensor.shape for tensor in activations] == [x.shape, (100, RANK)]
    assert activations[0].data_ptr() == x.data_ptr()  # no copy


def several(seed, shape=(2, 5, 7), dtype=torch.float64, factor_dtype=None, x_learns=True):
    """x, and three weights that read it: other widths, ranks and scalings, with and without a bias."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    def factor(*sizes):
        return draw(*sizes).to(factor_dtype or dtype).requires_grad_()

    width = shape[-1]
    return draw(*shape).requires_grad_(x_learns), [
        AdaptedWeight(draw(out, width), draw(out) if bias else None, factor(width, rank), factor(rank, out), scaling)
        for out, rank, scaling, bias in ((6, 3, 0.7, True), (4, 1, 2.0, False), (5, 4, -1.5, False))
    ]


def gradients_of_several(function, x, adapted):
    outputs = function(x, adapted)
    probes = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y) for y in outputs]
    wanted = [tensor for tensor in (x, *(f for one in adapted for f in (one.A, one.B))) if tensor.requires_grad]
    return [*outputs, *torch.autograd.grad(sum((y * p).sum() for y, p in zip(outputs, probes, strict=True)), wanted)]


def one_by_one(x, adapted):
    return [adapted_linear_reference(x, *one) for one in adapted]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_learns", [True, False])
def test_several_weights_agree_with_the_formula_for_each(seed, shape, x_learns):
    given = several(seed, shape, x_learns=x_learns)
    found, wanted = gradients_of_several(adapted_linears, *given), gradients_of_several(one_by_one, *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_several_weights_share_one_x_and_one_rank_wide_product():
    x, adapted = several(0, (2, 50, 7))
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        adapted_linears(x, adapted)
    assert [tensor.shape for tensor in saved if tensor.shape[0] == 100] == [(100, 8)]
    assert [tensor.data_ptr() for tensor in saved if tensor.shape == x.shape] == [x.data_ptr()]
    assert sum(tensor.numel() for tensor in saved) == x.numel() + 100 * 8 + sum(
        tensor.numel() for one in adapted for tensor in (one.weight, one.A, one.B)
    )


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_one_of_several_gets_no_gradient_and_the_others_keep_theirs(frozen):
    x, adapted = several(1)
    adapted[frozen] = adapted[frozen]._replace(A=adapted[frozen].A.detach(), B=adapted[frozen].B.detach())
    given = (x, adapted)
    found, wanted = gradients_of_several(adapted_linears, *given), gradients_of_several(one_by_one, *given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_an_output_that_is_not_used_changes_no_gradient_of_the_others():
    x, adapted = several(2)
    found = torch.autograd.grad(adapted_linears(x, adapted)[1].sum(), [x, adapted[1].A, adapted[1].B, adapted[0].A])
    wanted = torch.autograd.grad(one_by_one(x, adapted)[1].sum(), [x, adapted[1].A, adapted[1].B])
    for one, other in zip(found, [*wanted, torch.zeros_like(adapted[0].A)], strict=True):
        torch.testing.assert_close(one, other)


def test_float32_factors_of_several_get_float32_gradients():
    x, adapted = several(3, dtype=torch.bfloat16, factor_dtype=torch.float32)
    outputs = adapted_linears(x, adapted)
    sum(y.sum() for y in outputs).backward()
    assert {y.dtype for y in (*outputs, x.grad)} == {torch.bfloat16}
    for one in adapted:
        assert one.A.grad.dtype == one.B.grad.dtype == torch.float32
        assert min(one.A.grad.abs().max(), one.B.grad.abs().max()) > 0


@pytest.mark.slow
def test_several_weights_compile_to_one_graph():
    torch._dynamo.reset()
    given = several(4, dtype=torch.float32)
    found = gradients_of_several(torch.compile(adapted_linears, fullgraph=True), *given)
    for one, other in zip(found, gradients_of_several(one_by_one, *given), strict=True):
        torch.testing.assert_close(one, other)


def test_works_under_checkpointing():
    given = operands()
    wanted = gradients(adapted_linear, *given)
    found = gradients(lambda *args: checkpoint(adapted_linear, *args, use_reentrant=False), *given)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused():
    x, *others = operands()
    (gradient,) = torch.autograd.grad(adapted_linear(x, *others).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gives_the_gradient_of_x_alone_when_the_factors_are_frozen():
    x, weight, bias, A, B, scaling = operands()
    y = adapted_linear(x, weight, bias, A.detach(), B.detach(), scaling)
    (found,) = torch.autograd.grad(y.sum(), x)
    (wanted,) = torch.autograd.grad(adapted_linear_reference(x, weight, bias, A, B, scaling).sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("x_learns", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (2, 5, 7)])
def test_compiles_to_one_graph_forward_and_backward(x_learns, shape):
    torch._dynamo.reset()
    given = operands(2, shape, dtype=torch.float32, x_learns=x_learns)
    compiled = torch.compile(adapted_linear, fullgraph=True)
    for found, wanted in zip(gradients(compiled, *given), gradients(adapted_linear, *given), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 512, 1024), (3, 1024)])
def test_on_a_gpu_it_is_as_exact_as_the_formula_and_needs_no_more_memory(shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(768, 1024) / 32, torch.randn(768)
    A, B = torch.randn(1024, 16) / 32, torch.randn(16, 768) / 4
    exact = [value.cuda().double().requires_grad_(value is not weight) for value in (x, weight, bias, A, B)]
    half = [value.detach().bfloat16().requires_grad_(value.requires_grad) for value in exact]
    exact[2], half[2] = exact[2].detach(), half[2].detach()

    def run(function, given):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = gradients(function, *given, SCALING)
        return found, torch.cuda.max_memory_allocated() - before

    for function in (adapted_linear, adapted_linear_reference):
        run(function, half)  # cuBLAS takes its workspace
    truth = run(adapted_linear_reference, exact)[0]
    ours, our_peak = run(adapted_linear, half)
    plain, plain_peak = run(adapted_linear_reference, half)
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert (one.double() - true).abs().max() <= 2 * (other.double() - true).abs().max()
    assert our_peak <= plain_peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_inside_autocast_of_a_forward_pass_outside_it(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 24, dtype=dtype, requires_grad=True)
    factors = [torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(3) for size in ((24, 4), (4, 16))]
    weights = [torch.randn(16, 24, dtype=dtype) for _ in range(3)]
    adapted = [
        AdaptedWeight(weight, None, A, B, SCALING)
        for weight, A, B in zip(weights, factors[::2], factors[1::2], strict=True)
    ]

    def found(enabled):
        loss = sum(y.float().square().sum() for y in adapted_linears(x, adapted))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(loss, [x, *factors])

    assert all(torch.equal(one, other) for one, other in zip(found(True), found(False), strict=True))
