"""The kernel computes standard attention.

Where there is no GPU the checks run through Triton's interpreter, which must be chosen before Triton is imported: in a
process of its own, `python -m tests.unit.test_flash_triton`.
"""

from functools import partial

import pytest
import torch

from engine.flash.backends import standard_attention
from tests.interpreter import report, run_in_interpreter

SHAPES = (  # batch, heads, key heads, queries, keys, width
    (1, 1, 1, 32, 32, 16),
    (2, 2, 2, 70, 70, 64),
    (1, 2, 1, 33, 47, 32),
    (1, 4, 2, 47, 33, 32),
    (1, 1, 1, 1, 50, 16),
    (1, 1, 1, 40, 3, 16),
    (2, 6, 3, 37, 37, 24),
    (1, 1, 1, 20, 20, 100),
    (1, 1, 1, 35, 64, 256),
    (1, 1, 1, 5, 5, 3),
)


def drawn(shape, seed, dtype, device, size=1.0):
    batch, heads, groups, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width))
    return [(size * torch.randn(*each, generator=generator)).to(device, dtype) for each in sizes]


def check(found, Q, K, V, causal, scale=None):
    """At most twice what standard attention in the same precision errs, with one rounding of the output on top."""
    exact = standard_attention(Q.double(), K.double(), V.double(), causal, scale)
    theirs = (standard_attention(Q, K, V, causal, scale) - exact).abs().max()
    rounding = torch.finfo(Q.dtype).eps * exact.abs().max()
    assert found.isfinite().all()
    assert (found.double() - exact).abs().max() <= 2 * theirs + rounding, (tuple(Q.shape), tuple(K.shape), causal)


def launches(device):
    from engine.flash.triton_forward import Launch

    return (Launch(16, 16, 1, 1), Launch(32, 16, 4, 2)) if device == "cpu" else (Launch(64, 32, 4, 2),)


def dtypes(device):
    """The interpreter multiplies bfloat16 as if its bits were integers."""
    return (torch.float16,) if device == "cpu" else (torch.float16, torch.bfloat16)


def check_it_computes_standard_attention(device):
    from engine.flash.triton_forward import attend

    for seed, shape in enumerate(SHAPES):
        for dtype in dtypes(device):
            for causal in (False, True):
                for launch in launches(device):
                    Q, K, V = drawn(shape, seed, dtype, device)
                    check(attend(Q, K, V, causal=causal, launch=launch), Q, K, V, causal)


def check_every_launch_that_is_tried(device):
    from engine.flash.triton_forward import LAUNCHES, attend

    if device == "cpu":
        return  # the interpreter cuts work up otherwise
    for width in (64, 128):
        for causal in (False, True):
            Q, K, V = drawn((1, 2, 1, 300, 333, width), 2, torch.bfloat16, device)
            for launch in (*LAUNCHES, None):
                check(attend(Q, K, V, causal=causal, launch=launch), Q, K, V, causal)


def check_tiles_that_are_wider_than_high(device):
    from engine.flash.triton_forward import Launch, attend

    for queries, keys in ((48, 48), (10, 90), (90, 10)):
        Q, K, V = drawn((1, 2, 2, queries, keys, 16), 3, torch.float16, device)
        check(attend(Q, K, V, causal=True, launch=Launch(16, 64, 4, 1)), Q, K, V, True)


def check_any_scale(device):
    from engine.flash.triton_forward import attend

    for scale in (0.0, -0.4, 0.7, 3.0):
        Q, K, V = drawn((1, 2, 2, 40, 40, 16), 4, torch.float16, device)
        check(attend(Q, K, V, causal=True, scale=scale, launch=launches(device)[0]), Q, K, V, True, scale)


def check_rows_that_see_nothing_are_zero(device):
    from engine.flash.triton_forward import attend

    Q, K, V = drawn((1, 2, 2, 50, 20, 16), 5, torch.float16, device)
    output = attend(Q, K, V, causal=True, launch=launches(device)[0])
    assert (output[..., :30, :] == 0).all()
    assert (output[..., 30:, :].abs().sum(-1) > 0).all()
    assert (attend(Q, K[..., :0, :], V[..., :0, :], launch=launches(device)[0]) == 0).all()


def check_large_scores_stay_finite(device):
    from engine.flash.triton_forward import attend

    Q, K, V = drawn((1, 1, 1, 40, 40, 16), 6, torch.float16, device, size=100.0)
    output = attend(Q, K, V, launch=launches(device)[0])  # scores in the thousands: one weight is all
    assert output.isfinite().all()
    exact = standard_attention(Q.double(), K.double(), V.double())
    torch.testing.assert_close(output.double(), exact, atol=0.2, rtol=1e-2)


def check_any_layout(device):
    from engine.flash.triton_forward import attend

    Q, K, V = drawn((2, 4, 4, 30, 30, 16), 7, torch.float16, device)
    wanted = attend(Q, K, V, causal=True, launch=launches(device)[0])
    for move in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # tokens before heads
        lambda x: x.mT.contiguous().mT,  # channels apart
        lambda x: torch.stack([x, x], dim=3)[..., 0, :],  # gaps between tokens
        lambda x: x.expand(2, 4, 30, 16),
    ):
        given = [move(x) for x in (Q, K, V)]
        assert torch.equal(attend(*given, causal=True, launch=launches(device)[0]), wanted)


def check_more_heads_than_a_second_axis_counts(device):
    from engine.flash.triton_forward import attend

    if device == "cpu":
        return  # programs are interpreted one by one
    Q, K, V = drawn((70000, 1, 1, 16, 16, 16), 8, torch.float16, device)
    check(attend(Q, K, V, causal=True), Q, K, V, True)


def check_places_past_32_bits(device):
    from engine.flash.triton_forward import attend

    if device == "cpu":
        return  # 4 GB
    storage = torch.zeros(131200, 16384, dtype=torch.float16, device=device)
    storage[:, :64] = torch.randn(131200, 64, generator=torch.Generator(device).manual_seed(9), device=device)
    x = storage[None, None, :, :64]
    output = attend(x[:, :, -16:], x, x)
    check(output, x[:, :, -16:].contiguous(), x.contiguous(), x.contiguous(), False)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted():
    """What failed in the interpreter, by the check's name."""
    return run_in_interpreter("tests.unit.test_flash_triton")


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    CHECKS[name]("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_is_within_reach_of_torchs_flash_kernel(head_dim, causal):
    from engine.flash.backends import BACKENDS
    from engine.measure import measure_time

    for length in (2048, 8192):
        shape = (16384 // length, 2048 // head_dim, 2048 // head_dim, length, length, head_dim)
        tensors = drawn(shape, 8, torch.bfloat16, "cuda")
        ours, theirs = (
            measure_time(
                partial(BACKENDS[name].run, *tensors, causal), "cuda", dtype=torch.bfloat16, shape=str(shape)
            ).median_ms
            for name in ("triton", "torch-flash")
        )
        assert theirs / ours >= 0.6, (length, ours, theirs)


if __name__ == "__main__":
    report(CHECKS)
