"""Every backend that runs here computes the same attention, and every other one says why it does not."""

import sys
import types
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.attention import attend
from engine.flash import backends
from engine.flash.backends import BACKENDS, Case, absent, choices, standard_attention
from engine.masks import causal as causal_mask
from engine.masks import materialize

ON_CPU = ("standard", "torch-math", "torch-flash")
SHAPES = {  # heads, key heads, queries, keys, width
    "square": (2, 2, 33, 33, 16),
    "one of each": (1, 1, 1, 1, 8),
    "last queries": (2, 2, 5, 40, 16),
    "one query": (3, 3, 1, 17, 32),
    "more queries than keys": (2, 2, 21, 9, 16),
    "grouped": (6, 2, 19, 19, 24),
    "one key head, last queries": (4, 1, 7, 30, 64),
    "an odd width": (2, 1, 12, 15, 13),
    "wide": (1, 1, 10, 10, 256),
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def drawn(shape, seed=0, dtype=torch.float64, device="cpu"):
    heads, groups, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, heads, queries, width), (2, groups, keys, width), (2, groups, keys, width))
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes]


def expected(Q, K, V, causal, scale=None):
    """The formula in float64, from a matrix of what is visible."""
    Q, K, V = (x.double().cpu() for x in (Q, K, V))
    shift = K.shape[-2] - Q.shape[-2]
    if shift >= 0:
        mask = materialize(causal_mask, Q.shape[-2], K.shape[-2])
    else:
        mask = torch.arange(K.shape[-2]) <= torch.arange(Q.shape[-2])[:, None] + shift
    return attend(Q, K, V, mask if causal else None, scale=scale)[0]


def close(found, wanted, dtype):
    """Half precision rounds its weights once, and sums in float32; the others sum in what they round to."""
    tolerance = torch.finfo(dtype).eps * (8 if dtype.itemsize == 2 else 64)
    torch.testing.assert_close(found.double().cpu(), wanted, atol=tolerance, rtol=tolerance)


COMPILED = ("flex", "flash-attn-4", "triton")
"""For every shape anew, for seconds: these are tried on a few."""


def running(device, dtype, shape, causal, grad=False):
    heads, groups, queries, keys, width = shape
    found = choices(Case(device, dtype, width, queries, keys, causal, grad, heads != groups))
    return [backend for backend in found if backend.name not in COMPILED]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_backend_computes_the_formula(shape, causal, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        Q, K, V = drawn(shape, dtype=dtype, device=device)
        found = running(device, dtype, shape, causal)
        assert {"standard", "torch-math"} <= {backend.name for backend in found}
        for backend in found:
            for scale in (None, 0.3):
                output = backend.run(Q, K, V, causal, scale)
                assert (output.shape, output.dtype) == (Q.shape, dtype)
                close(output, expected(Q, K, V, causal, scale), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_backend_has_the_formulas_gradients(shape, causal, device):
    dtype = torch.float64 if device == "cpu" else torch.float16
    inputs = drawn(shape, 1, dtype, device)
    upstream = drawn(shape, 2, dtype, device)[0]
    exact = [x.double().cpu().requires_grad_() for x in inputs]
    wanted = torch.autograd.grad(expected(*exact, causal), exact, upstream.double().cpu())
    for backend in running(device, dtype, shape, causal, grad=True):
        Q, K, V = (x.clone().requires_grad_() for x in inputs)
        for found, gradient in zip(
            torch.autograd.grad(backend.run(Q, K, V, causal), (Q, K, V), upstream), wanted, strict=True
        ):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found.double().cpu(), gradient, atol=32 * eps, rtol=32 * eps)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_query_that_sees_no_key_is_a_zero_row_with_zero_gradients(name):
    Q, K, V = (x.requires_grad_() for x in drawn((2, 2, 12, 5, 8), 3))
    output = BACKENDS[name].run(Q, K, V, causal=True)
    assert (output[..., :7, :] == 0).all()
    assert (output[..., 7:, :].abs().sum(-1) > 0).all()
    gradients = torch.autograd.grad(output.sum(), (Q, K, V))
    assert (gradients[0][..., :7, :] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_at_all_give_zeros(name, causal):
    Q, K, V = (x.requires_grad_() for x in drawn((2, 1, 4, 0, 8)))
    output = BACKENDS[name].run(Q, K, V, causal)
    assert (output == 0).all()
    for gradient, x in zip(torch.autograd.grad(output.sum(), (Q, K, V)), (Q, K, V), strict=True):
        assert gradient.shape == x.shape
        assert (gradient == 0).all()


@pytest.mark.parametrize("name", ON_CPU)
def test_no_queries_give_nothing(name):
    assert BACKENDS[name].run(*drawn((2, 2, 0, 6, 8)), causal=True).shape == (2, 2, 0, 8)


@pytest.mark.parametrize("name", ON_CPU)
def test_later_keys_change_nothing_before_them(name):
    for seed in range(3):
        Q, K, V = drawn((2, 2, 10, 14, 16), seed)
        before = BACKENDS[name].run(Q, K, V, causal=True)
        K[..., 9:, :], V[..., 9:, :] = 5.0, -7.0
        after = BACKENDS[name].run(Q, K, V, causal=True)
        assert torch.equal(before[..., :5, :], after[..., :5, :])  # query 5 is the first to see key 9
        assert not torch.allclose(before[..., 5, :], after[..., 5, :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_standard_attention_is_finite_for_every_finite_input(dtype):
    largest = torch.finfo(dtype).max
    for size in (largest, largest**0.5, 1e-30, 0.0):
        for causal in (False, True):
            Q, K, V = (x.sign() * size for x in drawn((2, 2, 9, 11, 8), 4, dtype))
            leaves = [x.to(dtype).requires_grad_() for x in (Q, K, V)]
            output = standard_attention(*leaves, causal)
            assert output.isfinite().all()
            assert output.abs().max() <= size * (1 + 4 * torch.finfo(dtype).eps)


def test_standard_attention_does_not_cut_what_half_precision_holds():
    """Keys of 200 times queries of 20 / √d are scores in the hundreds, far from the largest number of float16."""
    Q, K, V = drawn((1, 1, 6, 6, 64), 5, torch.float16)
    K[..., 0, 0], Q[..., 0] = 200.0, 20.0
    output = standard_attention(Q, K, V)
    torch.testing.assert_close(output, V[..., :1, :].expand_as(output), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_standard_attention_passes_over_the_scores_no_more_than_it_must(dtype, grad):
    passes = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **kwargs or {})
            if torch.is_tensor(found) and found.shape[-2:] == (70, 90) and found.is_floating_point():
                passes.append(func.overloadpacket.__name__)
            return found

    Q, K, V = (x.requires_grad_(grad) for x in drawn((2, 2, 70, 90, 16), 6, dtype))
    with Recorded():
        standard_attention(Q, K, V, causal=True)
    views = {"_unsafe_view", "view", "expand", "detach", "_reshape_alias", "alias"}
    multiplied = ["mul_"] if dtype == torch.float32 else []
    assert [name for name in passes if name not in views] == ["baddbmm", *multiplied, "masked_fill_", "_softmax"]


def test_what_is_absent_says_why_and_the_rest_is_there():
    case = Case("cpu", torch.float32, 64, 128, 128, causal=True, grad=False, grouped=False)
    found, reasons = choices(case), absent(case)
    assert tuple(backend.name for backend in found) == ON_CPU
    assert {backend.label for backend in BACKENDS.values()} == {backend.label for backend in found} | set(reasons)
    assert all(reason[0].isupper() and reason.endswith(".") and "cpu" in reason for reason in reasons.values())
    assert all(BACKENDS[name].name == name for name in BACKENDS)
    assert BACKENDS["flex"].why_not(case) == reasons["FlexAttention, compiled"]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that can be asked what it is, and nothing else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)  # torch brings Triton for a GPU only
    backends._imported.cache_clear()
    yield
    backends._imported.cache_clear()


def why_not(name, **changed):
    case = Case("cuda:0", torch.bfloat16, 64, 128, 128, causal=True, grad=False, grouped=False)
    return BACKENDS[name].why_not(case._replace(**changed))


@pytest.mark.usefixtures("hopper")
def test_a_gpus_backends_refuse_what_their_kernels_do_not_take():
    for name in ("torch-flash", "torch-cudnn", "torch-efficient", "flex", "triton", "standard", "torch-math"):
        assert why_not(name) is None
        assert why_not(name, head_dim=40, grouped=True) is None
    for name in ("torch-flash", "torch-cudnn", "triton", "flash-attn-2", "flash-attn-3", "flash-attn-4"):
        assert "float32" in why_not(name, dtype=torch.float32)
        assert "264 wide" in why_not(name, head_dim=264)
    assert why_not("torch-efficient", dtype=torch.float32) is None
    assert "gradients" in why_not("triton", grad=True)
    assert "top left" in why_not("torch-cudnn", Tq=64)
    assert why_not("torch-cudnn", Tq=1) is None
    assert why_not("torch-cudnn", Tq=64, causal=False) is None


@pytest.mark.usefixtures("hopper")
def test_what_a_gpu_is_too_old_or_too_new_for_is_told(monkeypatch):
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    assert why_not("torch-flash") == "It needs a GPU of compute capability 8.0 or newer, and this one has 7.5."
    assert why_not("torch-efficient") is None
    monkeypatch.setattr(backends, "_capability", lambda device: (10, 0))
    assert why_not("flash-attn-3") == "It needs a GPU of compute capability 9.x, and this one has 10.0."
    assert "128 wide" in why_not("flash-attn-4", head_dim=136)
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 9))
    assert "128 wide" in why_not("torch-cudnn", head_dim=136)
    assert "gradients" in why_not("torch-flash", head_dim=200, grad=True)
    assert "gradients need a GPU of compute capability 9.0" in why_not("flash-attn-4", grad=True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.12 is missing"), OSError("wrong ELF class"), TypeError("no attribute")]
)
def test_importing_flash_attn_may_raise_anything_and_is_tried_once(monkeypatch, error):
    tries = []

    def broken(name):
        tries.append(name)
        raise error

    monkeypatch.setattr(backends.importlib, "import_module", broken)
    for _ in range(2):
        reason = why_not("flash-attn-4")
        assert str(error) in reason
        assert type(error).__name__ in reason
        assert reason.endswith(".")
    assert tries == ["flash_attn.cute"]


@pytest.mark.usefixtures("hopper")
def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert "flash_attn_interface" in why_not("flash-attn-3")


@pytest.mark.usefixtures("hopper")
def test_a_folder_that_another_package_shares_is_not_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(__file__=None))
    assert why_not("flash-attn-2") == "The module flash_attn cannot be imported: flash_attn is not installed."


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("also_logsumexp", [False, True])
def test_flash_attn_is_called_with_tokens_before_heads(monkeypatch, also_logsumexp):
    """A stand-in with the packages' calling convention: (B, T, H, d), masks that end at the bottom right, groups."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        output = expected(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal, softmax_scale)
        output = output.transpose(1, 2).to(q.dtype)
        return (output, None) if also_logsumexp else output

    module = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    assert why_not("flash-attn-3") is None
    for shape in SHAPES.values():
        Q, K, V = drawn(shape, 6, torch.float16)
        close(BACKENDS["flash-attn-3"].run(Q, K, V, True, 0.2), expected(Q, K, V, True, 0.2), torch.float16)


def test_flex_attentions_mask_ends_at_the_bottom_right():
    """What the compiled kernel is given, run uncompiled."""
    from torch.nn.attention import flex_attention

    for name in ("square", "last queries", "grouped"):
        Q, K, V = drawn(SHAPES[name], 7, torch.float32)
        mask = backends._causal_blocks(Q.shape[-2], K.shape[-2], "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = flex_attention.flex_attention(Q, K, V, block_mask=mask, enable_gqa=Q.shape[1] != K.shape[1])
        close(output, expected(Q, K, V, True), torch.float32)


def test_flex_attentions_mask_is_the_one_that_is_found_by_trying_all_pairs():
    from torch.nn.attention import flex_attention

    lengths = (2, 5, 127, 128, 129, 255, 256, 300, 512, 641)
    for queries in lengths:
        for keys in (length for length in lengths if length >= queries):
            shift = keys - queries
            wanted = flex_attention.create_block_mask(
                lambda b, h, i, j, shift=shift: j <= i + shift, None, None, queries, keys, device="cpu"
            )
            found = backends._causal_blocks(queries, keys, "cpu")
            assert (found.shape, found.seq_lengths) == (wanted.shape, wanted.seq_lengths)
            for name in ("kv", "full_kv", "q", "full_q"):
                counts, indices = (
                    [getattr(mask, f"{name}_{part}") for mask in (found, wanted)] for part in ("num_blocks", "indices")
                )
                assert torch.equal(*counts), (name, queries, keys)
                assert indices[0].dtype == indices[1].dtype == counts[0].dtype
                real = torch.arange(indices[0].shape[-1]) < counts[0][..., None]
                assert torch.equal(*(x[real] for x in indices)), (name, queries, keys)
                assert indices[0].amax() < indices[0].shape[-1]


def test_flex_attention_can_be_differentiated_again():
    """Its own kernel needs a GPU; the settings under which it is compiled do not."""
    from torch._functorch import config

    with config.patch(donated_buffer=True):
        backends._compiled_flex.cache_clear()
        backends._compiled_flex()
        assert not config.donated_buffer
    backends._compiled_flex.cache_clear()


@pytest.mark.gpu
def test_flex_attention_is_differentiated_once_and_then_again():
    inputs = [x.requires_grad_() for x in drawn((2, 2, 200, 200, 64), 11, torch.bfloat16, "cuda")]
    first = torch.autograd.grad(BACKENDS["flex"].run(*inputs, True).sum(), inputs)
    output = BACKENDS["flex"].run(*inputs, True).sum()
    for keep in (True, True, False):
        for mine, theirs in zip(torch.autograd.grad(output, inputs, retain_graph=keep), first, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_standard_attention_in_half_on_a_gpu_where_it_asks_for_the_largest_score(causal):
    for size in (1.0, 200.0):
        Q, K, V = (x.to("cuda", torch.float16) for x in drawn((2, 2, 2100, 2100, 64), 12))
        output = standard_attention(size * Q, size * K, V, causal)
        wanted = standard_attention((size * Q).double(), (size * K).double(), V.double(), causal)
        assert output.isfinite().all()
        if size == 1.0:
            close(output, wanted.cpu(), torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("shape", [(4, 2, 150, 150, 64), (2, 2, 70, 130, 128)], ids=["grouped", "last queries"])
def test_what_is_compiled_computes_the_formula_and_its_gradients(shape, name):
    heads, groups, queries, keys, width = shape
    inputs, upstream = drawn(shape, 9, torch.float16, "cuda"), drawn(shape, 10, torch.float16, "cuda")[0]
    backend = BACKENDS[name]
    grad = name != "triton"
    if reason := backend.why_not(Case("cuda", torch.float16, width, queries, keys, True, grad, heads != groups)):
        pytest.skip(reason)
    close(backend.run(*inputs, True), expected(*inputs, True), torch.float16)
    if grad:
        exact = [x.double().cpu().requires_grad_() for x in inputs]
        wanted = torch.autograd.grad(expected(*exact, True), exact, upstream.double().cpu())
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(backend.run(*leaves, True), leaves, upstream)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine.double().cpu(), theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_flex_attention_stays_fused_for_more_lengths_than_dynamo_remembers():
    for length in range(128, 128 + 12 * 64, 64):
        Q, K, V = drawn((2, 2, length, length, 64), 8, torch.bfloat16, "cuda")
        close(BACKENDS["flex"].run(Q, K, V, True), expected(Q, K, V, True), torch.bfloat16)
