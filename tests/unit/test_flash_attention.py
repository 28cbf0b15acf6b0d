"""Both layers compute the same attention, in every precision, and never anything but finite numbers."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch

from engine import FlashAttention, StandardAttention
from engine.errors import InputError
from engine.flash import choice
from engine.flash.attention import InHalfPrecision, fits_half_precision
from engine.flash.backends import BACKENDS, standard_attention
from engine.measure import Evidence

SHAPES = [
    (2, 8, 8, 128, 128, 64),
    (1, 4, 2, 37, 37, 24),
    (1, 2, 2, 5, 60, 16),
    (1, 2, 2, 60, 5, 16),
    (2, 3, 1, 1, 9, 8),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.usefixtures("no_kernel_is_chosen")


def drawn(shape, seed=0, dtype=torch.float32, device="cpu"):
    batch, heads, groups, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width))
    return [torch.randn(*size, generator=generator).to(device, dtype) for size in sizes]


def gradients(layer, tensors, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    output = layer(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, upstream)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_cpu_both_are_equal_before_and_after_measuring(shape, causal):
    standard, flash = (
        StandardAttention(shape[-1], causal),
        FlashAttention(shape[-1], causal, calls_before_measuring=2),
    )
    for seed in range(4):
        tensors = drawn(shape, seed)
        torch.testing.assert_close(flash(*tensors), standard(*tensors), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_have_the_same_gradients(shape, causal):
    tensors, upstream = drawn(shape, 1), drawn(shape, 2)[0]
    wanted = gradients(StandardAttention(shape[-1], causal), tensors, upstream)[1]
    for calls in (0, 32):
        flash = FlashAttention(shape[-1], causal, calls_before_measuring=calls)
        found = gradients(flash, tensors, upstream)[1]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_finite_input_gives_anything_but_finite_numbers(dtype, device):
    largest = torch.finfo(dtype).max
    for layer in (partial(FlashAttention, precision="exact"), FlashAttention, StandardAttention):
        if layer is FlashAttention and device == "cuda" and dtype.itemsize == 2:
            continue  # as its docstring says
        for causal in (False, True):
            for sizes in ((largest,) * 3, (1e-30, largest, 1.0), (1.0, 1.0, largest), (0.0, 0.0, largest)):
                tensors = [
                    (x.sign() * min(size, largest)).to(device, dtype)
                    for x, size in zip(drawn((1, 2, 2, 40, 33, 16), 3, torch.float64), sizes, strict=True)
                ]
                output = layer(16, causal=causal)(*tensors)
                assert output.isfinite().all()
                if causal:
                    assert (output[..., :7, :] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_values_near_the_largest_number_come_out_right(device):
    for causal in (False, True):
        Q, K, V = drawn((1, 2, 2, 64, 64, 16), 4)
        wanted = standard_attention(Q.double(), K.double(), V.double(), causal) * 1e38
        output = FlashAttention(16, causal)(Q.to(device), K.to(device), 1e38 * V.clamp(-3, 3).to(device))
        limit = torch.finfo(torch.float32).max
        wanted = standard_attention(Q.double(), K.double(), V.double().clamp(-3, 3) * 1e38, causal)
        torch.testing.assert_close(output.cpu().double(), wanted.clamp(-limit, limit), atol=1e33, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("q", "k", "v"), [(100.0, 100.0, 1.0), (1e-8, 1e8, 1.0), (1e6, 1e-6, 1.0), (1.0, 1.0, 1e-9), (1.0, 1.0, 1e9)]
)
def test_float32_beyond_halfs_range_is_as_right_as_float32(q, k, v, device):
    Q, K, V = (size * x for size, x in zip((q, k, v), drawn((1, 2, 2, 70, 70, 64), 5), strict=True))
    wanted = standard_attention(Q.double(), K.double(), V.double(), True)
    found = FlashAttention(64, True)(Q.to(device), K.to(device), V.to(device)).cpu().double()
    tolerance = 2e-2 if q * k > 100 else 2e-5  # scores in the ten thousands are rounded to thousandths in float32
    torch.testing.assert_close(found, wanted, atol=tolerance * v, rtol=1e-4)


def test_half_precision_serves_what_it_does_not_spoil():
    Q, K, V = drawn((1, 2, 2, 70, 70, 64), 6)
    fits = partial(fits_half_precision, scale=1 / 8)
    assert fits(Q, K, V)
    assert fits(Q, K, V * 0)
    assert fits(1e-3 * Q, 100 * K, V)
    assert not fits(1e-6 * Q, 100 * K, V)  # the scores are right, but not K's gradients
    for tensors in ((Q, K, V), (K, Q, V), (V, K, Q)):
        for row, holds in ((0.0, True), (1e-2, True), (1e-9, False), (1e-30, False), (math.nan, False)):
            first = tensors[0].clone()
            first[..., 3, :] *= row
            assert fits(first, *tensors[1:]) == holds
            assert fits(*tensors[1:], first) == holds
    assert not fits(10 * Q, 10 * K, V)  # scores in the hundreds
    assert not fits(1e-6 * Q, 1e5 * K, V)
    assert not fits(Q, K, 1e5 * V)
    assert not fits(Q, K, 1e-6 * V)
    assert not fits(Q, torch.full_like(K, math.nan), V)
    assert not fits(3e38 * Q, 3e-38 * K, V)
    assert not fits(Q, K[..., :0, :], V[..., :0, :])
    for size, holds in ((3.9, True), (4.1, False)):  # every score is 64 · size² / 8, up to 128
        assert fits(torch.full((1, 1, 5, 64), size), torch.full((1, 1, 5, 64), size), torch.ones(1, 1, 5, 64)) == holds


def in_half(function, Q, K, V):
    return InHalfPrecision.apply(Q, K, V, function, function, lambda *args: pytest.fail("it failed"))


@pytest.mark.parametrize("weights", ["of tokens", "of heads", "of a batch entry"])
def test_gradients_are_right_where_upstream_is_much_smaller_than_elsewhere(weights):
    shape = (2, 4, 2, 50, 50, 32)
    tensors, upstream = drawn(shape, 7), drawn(shape, 8)[0]
    small = {"of tokens": upstream[..., 1:, :], "of heads": upstream[:, 2:], "of a batch entry": upstream[1]}
    small[weights] *= 1e-9
    function = partial(standard_attention, causal=True)
    found = gradients(lambda *x: in_half(function, *x), tensors, upstream)[1]
    wanted = gradients(function, tensors, upstream)[1]
    if weights == "of heads":
        found, wanted = ((grads[0][:, 2:], grads[1][:, 1:], grads[2][:, 1:]) for grads in (found, wanted))
    elif weights == "of a batch entry":
        found, wanted = ([x[1] for x in grads] for grads in (found, wanted))
    else:
        found, wanted = ([grads[0][..., 1:, :]] for grads in (found, wanted))
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).norm() < 2e-3 * theirs.norm()


def test_a_backward_pass_that_fails_is_computed_anew_and_told():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, upstream):
            raise RuntimeError("compiled with donated buffers")

    tensors, upstream = drawn((1, 2, 2, 20, 20, 16), 10), drawn((1, 2, 2, 20, 20, 16), 11)[0]
    told = []
    found = gradients(
        lambda *x: InHalfPrecision.apply(
            *x, lambda *h: Broken.apply(standard_attention(*h)), standard_attention, lambda *args: told.append(args)
        ),
        tensors,
        upstream,
    )[1]
    for mine, theirs in zip(found, gradients(standard_attention, tensors, upstream)[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    (error, q, k) = told[0]
    assert str(error) == "compiled with donated buffers"
    assert (q.dtype, k.shape) == (torch.float16, tensors[1].shape)


def test_a_chosen_backend_whose_backward_pass_fails_is_left_out(monkeypatch):
    tensors, upstream = drawn((1, 2, 2, 32, 32, 16), 10), drawn((1, 2, 2, 32, 32, 16), 11)[0]
    halves = [x.half() for x in tensors]
    found = choice.fastest(*halves, grad=True)
    chosen = found.backend
    kernel = chosen.kernel

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, upstream):
            raise RuntimeError("it broke")

    def broken(Q, *others):
        output = kernel(Q, *others)
        return Broken.apply(output) if Q.dtype == torch.float16 else output

    monkeypatch.setitem(BACKENDS, chosen.name, replace(chosen, kernel=broken))
    mine = gradients(FlashAttention(16)._differentiable_in_half, tensors, upstream)[1]
    theirs = gradients(standard_attention, tensors, upstream)[1]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert found.refused[chosen.name] == "It failed: it broke."
    assert gradients(FlashAttention(16)._differentiable_in_half, tensors, upstream)[1][0].isfinite().all()


@pytest.mark.parametrize("upstream_size", [1.0, 1e-9, 1e9, 1e-30])
def test_gradients_through_half_precision_have_its_digits_whatever_their_size(upstream_size):
    tensors, upstream = drawn((1, 2, 2, 50, 50, 32), 7), upstream_size * drawn((1, 2, 2, 50, 50, 32), 8)[0]
    function = partial(standard_attention, causal=True)
    output, found = gradients(lambda *x: in_half(function, *x), tensors, upstream)
    exact, wanted = gradients(function, tensors, upstream)
    assert output.dtype == torch.float32
    for mine, theirs in ((output, exact), *zip(found, wanted, strict=True)):
        assert mine.dtype == torch.float32
        error = (mine - theirs).double().square().mean().sqrt() / theirs.double().square().mean().sqrt()
        assert 1e-5 < error < 2e-3  # neither exact, nor worse than 11 bits


@pytest.mark.parametrize("layer", ["standard", "torch-flash"])
@pytest.mark.parametrize(
    ("sizes", "length"),
    [((1e-3, 1e-3, 1e-3), 512), ((2e-4, 2e-4, 2e-4), 1024), ((1, 1, 2e-4), 1024), ((1, 1, 1e-3), 1024),
     ((0.02, 0.02, 0.02), 1024), ((1, 1, 1e4), 256), ((1, 1e-3, 1), 256)],
)  # fmt: skip
def test_gradients_through_half_precision_have_its_digits_whatever_the_size_of_what_goes_in(sizes, length, layer):
    for seed in range(2):
        tensors = drawn((1, 2, 1, length, length, 64), seed)
        tensors = [size * x for size, x in zip(sizes, tensors, strict=True)]
        tensors[2][:, :, ::3] *= 1e-2  # rows of V that scaling must not lose
        upstream = drawn((1, 2, 2, length, length, 64), 8)[0]
        kernel = partial(BACKENDS[layer].run, causal=True)
        output, found = gradients(
            lambda *x, kernel=kernel: InHalfPrecision.apply(*x, kernel, standard_attention_causal, pytest.fail),
            tensors,
            upstream,
        )
        exact, wanted = gradients(standard_attention_causal, tensors, upstream)
        for mine, theirs in ((output, exact), *zip(found, wanted, strict=True)):
            error = (mine - theirs).double().square().mean().sqrt() / theirs.double().square().mean().sqrt()
            assert error < 2e-3, (seed, error)


standard_attention_causal = partial(standard_attention, causal=True)


@pytest.mark.parametrize("empty", ["upstream", "values"])
def test_heads_without_gradients_do_not_send_the_others_to_float32(empty):
    Q, K, V = drawn((2, 2, 2, 30, 30, 16), 3)
    upstream = drawn((2, 2, 2, 30, 30, 16), 4)[0]
    (upstream if empty == "upstream" else V)[1] = 0
    found = gradients(
        lambda *x: InHalfPrecision.apply(*x, standard_attention, not_again, pytest.fail), (Q, K, V), upstream
    )
    for mine, theirs in zip(found[1], gradients(standard_attention, (Q, K, V), upstream)[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)


def not_again(*_):
    pytest.fail("computed anew in float32")


def test_gradients_that_overflow_half_precision_are_computed_anew():
    Q, K, V = drawn((1, 1, 1, 64, 4, 16), 9)
    V = 3e4 * V.clamp(-1, 1)
    upstream = torch.ones_like(Q)
    function = partial(standard_attention)
    halves = gradients(function, [x.half() for x in (Q, K, V)], upstream.half())[1]
    assert not all(each.isfinite().all() for each in halves)
    found = gradients(lambda *x: in_half(function, *x), (Q, K, V), upstream)[1]
    for mine, theirs in zip(found, gradients(function, (Q, K, V), upstream)[1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_only_of_what_wants_them():
    Q, K, V = drawn((1, 2, 2, 20, 20, 16), 10)
    V.requires_grad_()
    in_half(standard_attention, Q, K, V).sum().backward()
    assert Q.grad is None
    assert V.grad.isfinite().all()


def test_the_first_calls_take_a_kernel_that_needs_no_start(monkeypatch):
    measured = []

    def measure(run, device, *, dtype, shape, runs):
        run()
        measured.append(run)
        median = 4.0 ** len(measured)  # far apart: real times that come close on a busy machine are taken again
        return Evidence(median, median, median, runs, "", device, str(dtype), shape, {})

    monkeypatch.setattr(choice, "measure_time", measure)
    monkeypatch.setattr(choice, "exclusive", lambda *_, **__: nullcontext())  # whoever measures beside this test
    tensors = drawn((1, 2, 2, 32, 32, 16))
    for _ in range(3):
        FlashAttention(16, calls_before_measuring=3)(*tensors)
    assert not measured
    flash = FlashAttention(16, calls_before_measuring=3)  # calls are counted for the process
    flash(*tensors)
    count = len(measured)
    assert count == 3  # backends
    flash(*tensors)
    FlashAttention(16, calls_before_measuring=0)(*tensors)
    assert len(measured) == count


def test_a_chosen_backend_that_fails_later_is_left_out():
    tensors = drawn((1, 2, 2, 32, 32, 16))
    flash = FlashAttention(16, calls_before_measuring=0)
    wanted = flash(*tensors)
    found = choice.fastest(*tensors)
    chosen = found.backend.name

    def broken(Q, K, V, causal, scale):
        raise RuntimeError("it broke")

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(BACKENDS, chosen, replace(BACKENDS[chosen], kernel=broken))
        torch.testing.assert_close(flash(*tensors), wanted, atol=1e-6, rtol=1e-5)
        assert found.refused[chosen] == "It failed: it broke."


def test_if_every_backend_fails_the_error_is_told():
    def broken(Q, K, V, causal, scale):
        raise RuntimeError("it broke")

    tensors = drawn((1, 2, 2, 32, 32, 16))
    flash = FlashAttention(16, calls_before_measuring=0)
    flash(*tensors)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("standard", "torch-math", "torch-flash"):
            patched.setitem(BACKENDS, name, replace(BACKENDS[name], kernel=broken))
        with pytest.raises(RuntimeError, match="it broke"):
            flash(*tensors)


def test_a_given_backend_is_the_one_that_runs(monkeypatch):
    asked = []
    for name in ("standard", "torch-math", "torch-flash"):
        kernel = BACKENDS[name].kernel
        recorded = replace(
            BACKENDS[name], kernel=lambda *args, name=name, kernel=kernel: asked.append(name) or kernel(*args)
        )
        monkeypatch.setitem(BACKENDS, name, recorded)
    tensors = drawn((1, 2, 2, 32, 32, 16))
    for name in ("standard", "torch-math", "torch-flash"):
        FlashAttention(16, backend=name)(*tensors)
    assert asked == ["standard", "torch-math", "torch-flash"]


def test_what_makes_no_sense_is_refused_in_a_sentence():
    with pytest.raises(InputError, match='no backend "tensorrt": choose one of standard, torch-math'):
        FlashAttention(16, backend="tensorrt")
    with pytest.raises(InputError, match=r"FlashAttention-4 cannot compute this\. It needs an NVIDIA GPU"):
        FlashAttention(16, backend="flash-attn-4")(*drawn((1, 2, 2, 8, 8, 16)))
    with pytest.raises(InputError, match='"fast" or "exact", and "half"'):
        FlashAttention(16, precision="half")
    with pytest.raises(InputError, match="-1 were given"):
        FlashAttention(16, calls_before_measuring=-1)
    for layer in (StandardAttention(16), FlashAttention(16)):
        Q, K, V = drawn((2, 4, 2, 8, 8, 16))
        for wrong in (
            (Q[0], K[0], V[0]),
            (Q[..., :8], K[..., :8], V[..., :8]),
            (Q, K[..., :4, :], V),
            (Q[:1], K, V),
            (Q[:, :3], K, V),
            (Q, K[:, :0], V[:, :0]),
            (Q, K.double(), V),
            (Q.long(), K.long(), V.long()),
        ):
            with pytest.raises(InputError):
                layer(*wrong)
    for width in (0, -3):
        with pytest.raises(InputError, match=f"is {width}"):
            StandardAttention(width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [StandardAttention, FlashAttention])
def test_under_torch_compile_they_are_one_graph_and_the_same(layer, dtype, device):
    module = layer(32, causal=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    if layer is FlashAttention:
        module = FlashAttention(32, causal=True, precision="exact")  # float32 stays float32 under torch.compile
    for shape in ((2, 4, 2, 40, 40, 32), (1, 4, 2, 24, 50, 32), (1, 4, 2, 50, 24, 32)):
        tensors, upstream = drawn(shape, 11, dtype, device), drawn(shape, 12, dtype, device)[0]
        eps = torch.finfo(dtype).eps
        for mine, theirs in zip(
            (lambda x: (x[0], *x[1]))(gradients(compiled, tensors, upstream)),
            (lambda x: (x[0], *x[1]))(gradients(module, tensors, upstream)),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, atol=64 * eps, rtol=64 * eps)


def test_nothing_is_measured_while_compiling(monkeypatch):
    monkeypatch.setattr(choice, "measure_time", lambda *args, **options: pytest.fail("measured"))
    module = FlashAttention(16, calls_before_measuring=0)
    tensors = drawn((1, 2, 2, 20, 20, 16))
    torch.compile(module, backend="eager", fullgraph=True)(*tensors)


def test_they_say_what_they_are():
    assert "16, causal=True, precision=fast, backend=standard" in repr(FlashAttention(16, True, backend="standard"))
    assert "16, causal=False" in repr(StandardAttention(16))
    assert not list(FlashAttention(16).parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_fast_has_the_precision_of_tf32_and_exact_that_of_float32(causal):
    tensors = drawn((2, 8, 8, 512, 512, 64), 13)
    exact = standard_attention(*(x.double() for x in tensors), causal)
    for precision, low, high in (("fast", 1e-5, 1e-3), ("exact", 1e-8, 5e-6)):
        for calls in (0, 32):
            flash = FlashAttention(64, causal, precision=precision, calls_before_measuring=calls)
            found = flash(*(x.cuda() for x in tensors)).cpu().double()
            error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert low < error < high


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "flex", "torch-cudnn", "torch-flash"])
def test_on_a_gpu_float32_is_trained_with_the_precision_of_tf32(backend):
    tensors, upstream = drawn((2, 4, 2, 256, 256, 64), 15), drawn((2, 4, 2, 256, 256, 64), 16)[0]
    wanted = gradients(partial(standard_attention, causal=True), [x.double() for x in tensors], upstream.double())[1]
    flash = FlashAttention(64, True, backend=backend, calls_before_measuring=1)
    for _ in range(3):
        found = gradients(flash, [x.cuda() for x in tensors], upstream.cuda())[1]
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine.cpu().double() - theirs).norm() < 2e-3 * theirs.norm()


@pytest.mark.gpu
def test_a_cuda_graph_can_record_it():
    flash = FlashAttention(64, True, calls_before_measuring=0)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = drawn((1, 4, 4, 256, 256, 64), 14, dtype, "cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            FlashAttention(64, True, precision="exact", backend=None)(*tensors)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = flash(*tensors)
        graph.replay()
        torch.cuda.synchronize()
        wanted = standard_attention(*tensors, True)
        torch.testing.assert_close(output, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [StandardAttention, FlashAttention])
def test_under_autocast_it_is_computed_in_autocasts_dtype_throughout(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(2, 2, 24, 16, generator=generator) for _ in range(3)]
    module = layer(16, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = module(*tensors)
    assert torch.equal(under, module(*(x.bfloat16() for x in tensors)))


def test_exact_precision_is_exact_under_autocast_too():
    tensors = [torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    module = FlashAttention(16, precision="exact")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(*tensors), module(*tensors).float())
        torch.testing.assert_close(
            module(*tensors), StandardAttention(16).double()(*(x.double() for x in tensors)).float()
        )
