"""Backends are measured once for a kind of call, the fastest correct one is kept, and what fails is named."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from engine.errors import InputError
from engine.flash import choice
from engine.flash.attention import FlashAttention
from engine.flash.backends import BACKENDS, standard_attention
from engine.flash.choice import Errors, error_against_reference, fastest
from engine.measure import Evidence, exclusive, lock_path, measure_time

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


pytestmark = pytest.mark.usefixtures("no_kernel_is_chosen")


def drawn(seed=0, shape=(2, 4, 2, 64, 64, 16), dtype=torch.float32, device="cpu"):
    batch, heads, groups, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width))
    return [torch.randn(*size, generator=generator).to(device, dtype) for size in sizes]


def altered(monkeypatch, name, change):
    """A backend whose kernel computes `change(output)` of standard attention's output."""

    def kernel(Q, K, V, causal, scale):
        K, V = (x.repeat_interleave(Q.shape[1] // K.shape[1], 1) for x in (K, V))
        return change(standard_attention(Q, K, V, causal, scale))

    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], kernel=kernel))


def failing(monkeypatch, name, error):
    def change(output):
        raise error

    altered(monkeypatch, name, change)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fastest_of_the_correct_ones_is_chosen(dtype, grad, device):
    found = fastest(*drawn(1, dtype=dtype, device=device), causal=True, grad=grad)
    medians = {name: evidence.median_ms for name, evidence in found.evidence.items()}
    assert medians[found.backend.name] == min(medians.values())
    assert found.ranking()[0] is found.backend
    assert {"standard", "torch-math", "torch-flash"} & set(medians) == set(medians) if device == "cpu" else True
    assert set(medians) | set(found.refused) == set(BACKENDS)
    assert set(medians) <= set(found.errors)
    for name in medians:
        assert found.errors[name].within(found.baseline, dtype)
        assert (found.errors[name].backward is None) == (not grad)
        assert isinstance(found.evidence[name], Evidence)


def test_measuring_happens_once_for_a_kind(monkeypatch):
    Q, K, V = drawn()
    first = fastest(Q, K, V, causal=True)
    monkeypatch.setattr(choice, "measure_time", lambda *args, **options: pytest.fail("measured again"))
    assert fastest(*drawn(5), causal=True) is first
    assert fastest(*drawn(5, (2, 4, 2, 33, 33, 16)), causal=True) is first  # 33 is nearer to 64 than to 32, in powers
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        fastest(*drawn(0, (2, 4, 2, 65, 65, 16)), causal=True)


def test_a_slow_backend_is_not_chosen(monkeypatch):
    for slow, quick in (("torch-flash", "torch-math"), ("torch-math", "torch-flash")):
        choice.forget()
        with monkeypatch.context() as patched:
            altered(patched, "standard", lambda output: (time.sleep(0.02), output)[1])
            altered(patched, slow, lambda output: (time.sleep(0.02), output)[1])
            assert fastest(*drawn()).backend.name == quick


def wrong_row(output):
    output = output.clone()
    output[..., -1, :] = output[..., -2, :]
    return output


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [lambda output: output * 1.001, wrong_row, lambda output: output.bfloat16().to(output.dtype), torch.zeros_like],
    ids=["a thousandth too large", "one wrong row", "rounded too far", "nothing"],
)
def test_what_is_not_correct_is_refused_however_fast(monkeypatch, change, grad):
    altered(monkeypatch, "torch-flash", change)
    if change is torch.zeros_like and grad:
        altered(monkeypatch, "torch-flash", lambda output: output * 0)
    found = fastest(*drawn(2), grad=grad)
    assert "torch-flash" not in found.evidence
    assert "errs more than twice" in found.refused["torch-flash"]


@pytest.mark.parametrize("what", ["a batch entry", "heads in the middle"])
def test_what_is_wrong_in_a_few_heads_is_refused(monkeypatch, what):
    def change(output):
        mask = torch.ones(output.shape[:2])
        mask[(1,) if what == "a batch entry" else (slice(None), slice(1, -1))] = 0
        return output * mask[..., None, None]

    altered(monkeypatch, "torch-flash", change)
    for shape in ((3, 8, 8, 64, 64, 16), (3, 8, 4, 30, 30, 16)):
        assert "errs more than twice" in fastest(*drawn(2, shape)).refused["torch-flash"]


def test_wrong_gradients_are_refused_where_they_are_asked_for(monkeypatch):
    altered(monkeypatch, "torch-flash", lambda output: output + (output - output.detach()))
    assert "torch-flash" in fastest(*drawn(3)).evidence
    assert "errs more than twice" in fastest(*drawn(3), grad=True).refused["torch-flash"]


def test_what_is_no_number_is_no_answer(monkeypatch):
    altered(monkeypatch, "torch-flash", lambda output: output * torch.nan)
    assert "torch-flash" in fastest(*drawn()).refused


@pytest.mark.parametrize("error", [RuntimeError("no such kernel\n  at line 7"), torch.OutOfMemoryError("too large")])
def test_a_backend_that_fails_is_named_and_the_others_go_on(monkeypatch, error):
    failing(monkeypatch, "torch-flash", error)
    found = fastest(*drawn())
    assert found.refused["torch-flash"] in ("It failed: no such kernel.", "It failed: too large.")
    assert {"standard", "torch-math"} <= set(found.evidence)


def test_if_all_fail_each_reason_is_told(monkeypatch):
    for name in ("standard", "torch-flash", "torch-math"):
        failing(monkeypatch, name, RuntimeError(f"{name} broke"))
    monkeypatch.setattr(choice, "standard_attention", lambda Q, K, V, causal, scale: Q.clone())
    with pytest.raises(InputError, match=r"standard broke.*torch-math broke.*torch-flash broke"):
        fastest(*drawn(0, (1, 2, 2, 8, 8, 4)))


def test_what_would_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(choice.memory, "free", lambda device: 2**18)
    found = fastest(*drawn(0, (2, 4, 4, 128, 128, 8)))
    assert set(found.evidence) == {"torch-flash"}
    assert "GiB" in found.refused["standard"]
    assert set(fastest(*drawn(0, (1, 1, 1, 16, 16, 8))).evidence) == {"standard", "torch-math", "torch-flash"}


@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 50, 50, 16), (1, 2, 2, 9, 40, 8), (1, 2, 1, 40, 9, 8), (3, 2, 2, 1, 30, 8)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_the_same_in_blocks_of_queries(monkeypatch, shape, causal):
    Q, K, V = drawn(4, shape)
    whole = error_against_reference(BACKENDS["torch-math"], Q, K, V, causal=causal, grad=True)
    monkeypatch.setattr(choice, "SCORES_AT_ONCE", 4 * K.shape[2] * Q.shape[1])
    blocks = error_against_reference(BACKENDS["torch-math"], Q, K, V, causal=causal, grad=True)
    assert blocks.forward == pytest.approx(whole.forward, rel=1e-6, abs=1e-12)
    assert blocks.backward == pytest.approx(whole.backward, rel=1e-6, abs=1e-12)
    assert 0 <= blocks.forward_max < 1e-5
    assert blocks.backward < 1e-5


def test_errors_are_of_the_size_of_the_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        errors = error_against_reference(BACKENDS["standard"], *drawn(6, dtype=dtype), grad=True)
        eps = torch.finfo(dtype).eps
        assert eps / 20 < errors.forward < 4 * eps
        assert eps / 20 < errors.backward < 4 * eps


def test_twice_the_baseline_is_the_limit_and_a_rounding_is_allowed():
    baseline = Errors(1e-3, 2e-3, 3e-3, 4e-3)
    assert Errors(2e-3, 4e-3, 6e-3, 8e-3).within(baseline, torch.float32)
    assert not Errors(2e-3, 4e-3, 6e-3, 8.1e-3).within(baseline, torch.float32)
    assert not Errors(2.1e-3, 4e-3, 6e-3, 8e-3).within(baseline, torch.float32)
    assert Errors(2e-3 + 5e-8, 4e-3, 6e-3, 8e-3).within(baseline, torch.float32)
    assert not Errors(2e-3 + 7e-8, 4e-3, 6e-3, 8e-3).within(baseline, torch.float32)
    assert Errors(5e-8, 5e-8).within(Errors(0.0, 0.0), torch.float32)
    assert not Errors(float("inf"), 0.0).within(Errors(1.0, 1.0), torch.float32)


def timed_as(times):
    """For `measure_time`: the medians in `times`, by backend in turn, again and again for the last one."""
    calls = {name: iter(each) for name, each in times.items()}

    def measure(run, *_, **__):
        found = next(calls[run.args[0].name])
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(median_ms=found)

    return measure


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"standard": [9], "torch-math": [1.0, 3, 3, 1], "torch-flash": [1.1, 2, 2, 9]}, "torch-flash"),
        ({"standard": [9], "torch-math": [1.1, 1, 1, 5], "torch-flash": [1.0, 2, 1.5, 2]}, "torch-math"),
        ({"standard": [9], "torch-math": [1.0], "torch-flash": [1.3]}, "torch-math"),
        (
            {"standard": [9], "torch-math": [1.0, 1, RuntimeError("gone"), 1], "torch-flash": [1.1, 2, 2, 2]},
            "torch-flash",
        ),
    ],
    ids=["the median of the rematch counts", "one slow round does not", "none alone", "who fails in it is left out"],
)
def test_those_that_are_close_are_timed_again_in_turn(times, chosen, monkeypatch):
    monkeypatch.setattr(choice, "measure_time", timed_as(times))
    Q, K, V = (torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found = choice.fastest(Q, K, V)
    assert found.backend.name == chosen
    assert ("torch-math" in found.refused) == any(isinstance(each, Exception) for each in times["torch-math"])
    assert "torch-math" in found.evidence or found.refused["torch-math"] == "It failed: gone."


def test_the_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    fastest(*drawn(), grad=True)
    assert torch.equal(torch.rand(3), wanted)


def resolved(tensors, calls=0, **options):
    return choice.resolve(
        *tensors, **{"causal": False, "scale": None, "grad": False, "calls_before_measuring": calls} | options
    ).name


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too large"), ValueError("odd"), InputError("Nothing.")])
def test_what_goes_wrong_while_measuring_is_not_the_callers_error(monkeypatch, caplog, error):
    tries = []

    def broken(*args):
        tries.append(args)
        raise error

    monkeypatch.setattr(choice, "_Reference", broken)
    for _ in range(20):
        assert resolved(drawn(), grad=True) == "torch-flash"
    assert len(tries) == 1
    assert str(error).rstrip(".") in caplog.text


def test_nothing_is_measured_for_a_single_query_or_inside_a_measurement(monkeypatch):
    monkeypatch.setattr(choice, "_measured", lambda *args: pytest.fail("measured"))
    for keys in (1, 100, 1025):
        assert resolved(drawn(0, (1, 2, 2, 1, keys, 16))) == "torch-flash"
    with exclusive("cpu"):
        assert resolved(drawn()) == "torch-flash"
    with pytest.raises(pytest.fail.Exception):
        resolved(drawn())


def test_nothing_is_measured_by_a_thread_of_what_is_measured(monkeypatch):
    """On a GPU autograd computes in threads of its own, and who holds the device waits for them."""
    monkeypatch.setattr(choice, "_measured", lambda *args: pytest.fail("measured"))
    monkeypatch.setattr(choice, "LONGEST_WAIT", 60.0)
    found = []
    with exclusive("cpu"):
        thread = threading.Thread(target=lambda: found.append(resolved(drawn())))
        thread.start()
        thread.join(20)
    assert found == ["torch-flash"]


def test_what_is_measured_may_choose_for_itself():
    layer = FlashAttention(16, calls_before_measuring=2)
    evidence = measure_time(lambda: layer(*drawn()), "cpu", dtype=torch.float32, shape="-", runs=20)
    assert evidence.runs == 20
    assert not choice._choices
    layer(*drawn())
    assert choice._choices


def test_a_device_that_is_busy_for_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(choice, "LONGEST_WAIT", 0.05)
    held, over = threading.Event(), threading.Event()

    def hold():
        with FileLock(lock_path("cpu")):  # as another process does
            held.set()
            over.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    start = time.perf_counter()
    try:
        assert resolved(drawn()) == "torch-flash"
        assert time.perf_counter() - start < 2
    finally:
        over.set()
        thread.join()


def test_what_plans_for_every_shape_serves_those_that_came_often(monkeypatch):
    for name in ("standard", "torch-flash"):
        altered(monkeypatch, name, lambda output: (time.sleep(0.01), output)[1])
    monkeypatch.setitem(BACKENDS, "torch-math", replace(BACKENDS["torch-math"], plans_per_shape=True))
    measured, other = drawn(), drawn(1, (2, 4, 2, 50, 50, 16))
    assert resolved(measured) == "torch-math"
    for _ in range(choice.CALLS_BEFORE_PLANNING):
        assert resolved(other) != "torch-math"
    assert resolved(other) == "torch-math"
    assert resolved(drawn(1, (2, 4, 2, 51, 51, 16))) != "torch-math"
    assert choice.leave_out(BACKENDS["torch-math"], ValueError(), *other[:2], causal=False, grad=False)
    assert resolved(other) != "torch-math"


def test_a_settled_shape_is_resolved_without_further_questions(monkeypatch):
    tensors = drawn()
    name = resolved(tensors)
    monkeypatch.setattr(choice, "Kind", None)
    assert resolved(tensors) == name


@pytest.mark.gpu
def test_a_gpus_candidates_beside_the_cpus():
    found = fastest(*drawn(7, (2, 16, 16, 2048, 2048, 64), torch.bfloat16, "cuda"), causal=True)
    assert {"torch-flash", "torch-cudnn", "torch-efficient", "flex", "triton"} <= set(found.evidence)
    assert found.backend.name not in ("standard", "torch-math")
