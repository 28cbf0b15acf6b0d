"""The GPU's kernels: the reference's codes and values, and on CUDA bitsandbytes' to the bit.

Where there is no GPU the checks run through Triton's interpreter, which must be chosen before Triton is imported: in a
process of its own, `python -m tests.unit.test_quantization_kernels`.
"""

import math
from dataclasses import replace

import pytest
import torch

from engine.errors import InputError
from engine.lora.injection import inject_lora
from engine.model import Decoder, ModelConfig
from engine.quantization.data_types import data_type
from engine.quantization.grouping import per_block
from engine.quantization.production import get_model_memory_mb, quantize_model_4bit, quantize_model_8bit
from engine.quantization.tensor import QuantizedTensor, _quantize_scales, quantize
from tests.interpreter import report, run_in_interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (32, 64, 512, 4096)
COUNTS = (8192, 5000, 777, 2, 1)
"""Whole blocks, a tail, an odd tail, less than a block."""

THEIR_NAMES = {"nf4": "nf4", "fp4-bnb": "fp4"}


def normal(seed, *shape):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels(name):
    return data_type(name).decode(torch.arange(16, dtype=torch.uint8))


def unpacked(payload, count):
    return torch.stack([payload >> 4, payload & 15], dim=1).flatten()[:count]


def edges(name, factor=1.0):
    """Blocks of 64 with magnitude `factor`: levels, halfway points, what is next to them, zeros of both signs."""
    codebook = data_type(name).codebook
    halfway = (codebook[:-1] + codebook[1:]) / 2
    near = [halfway, halfway.nextafter(torch.tensor(2.0)), halfway.nextafter(torch.tensor(-2.0)), codebook]
    near = torch.cat([*near, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-39, -1e-39])])
    blocks = torch.nn.functional.pad(near, (0, -len(near) % 63)).view(-1, 63)
    return factor * torch.cat([torch.ones(len(blocks), 1), blocks], dim=1)


def cases(device):
    from engine.quantization import kernels

    for name in kernels.ENCODERS:
        for dtype in DTYPES:
            for block_size in BLOCK_SIZES:
                for count in COUNTS:
                    yield name, block_size, normal(count, count).to(device, dtype)
            for factor in (1.0, 24.0, 2.0**-7):
                yield name, 64, edges(name, factor).to(device, dtype)


def check_codes_are_the_references(device):
    """Where the reference is left, x lies within rounding of a threshold, or is one of FP4's zeros."""
    from engine.quantization import kernels

    for name, block_size, w in cases(device):
        payload, absmax = kernels.quantize_blocks(w, name, block_size)
        reference = quantize(w.cpu(), name, per_block(block_size))
        assert torch.equal(absmax.cpu(), reference.scales)
        found, wanted = unpacked(payload.cpu(), w.numel()), reference.codes.flatten()
        x = w.cpu().double().flatten() / absmax.cpu().double().repeat_interleave(block_size)[: w.numel()]
        of_code = levels(name).double()
        ours, theirs = ((x - of_code[codes.long()]).abs() for codes in (found, wanted))
        assert (ours - theirs).abs().max() < 4e-7, (name, block_size, w.dtype)
        assert payload.numel() == -(-w.numel() // 2)
        assert w.numel() % 2 == 0 or payload[-1].item() & 15 == 0


def check_nf4_codes_are_the_references_to_the_bit(device):
    from engine.quantization import kernels

    for dtype in DTYPES:
        for seed in range(5):
            w = normal(seed, 96, 130).to(device, dtype)
            payload, _ = kernels.quantize_blocks(w, "nf4", 64)
            differing = (payload.cpu() != quantize(w.cpu(), "nf4").payload).sum()
            assert differing == 0 if device == "cpu" else differing <= 1  # the chip's inverse is one unit off at most


def check_fp4_rounds_magnitudes(device):
    from engine.quantization import kernels

    w = edges("fp4-bnb").to(device)
    codes = unpacked(kernels.quantize_blocks(w, "fp4-bnb", 64)[0], w.numel())
    mirrored = w.clone()
    mirrored[:, 1:] *= -1
    other = unpacked(kernels.quantize_blocks(mirrored, "fp4-bnb", 64)[0], w.numel())
    tiny = (w.abs() < 2.0**-126).flatten()
    first = torch.arange(w.numel(), device=w.device) % 64 == 0
    assert torch.equal(codes[~tiny & ~first] ^ 8, other[~tiny & ~first])
    assert (codes[tiny] == 0).all()
    assert (other[tiny] == 0).all()


def check_zeros_and_denormals(device):
    from engine.quantization import kernels

    for name in kernels.ENCODERS:
        for value in (0.0, -0.0, 1e-39, -1e-39):
            w = torch.full((100,), value, device=device)
            payload, absmax = kernels.quantize_blocks(w, name, 64)
            assert (absmax == 0).all()
            assert (unpacked(payload, 100) == 0).all()
            back = kernels.dequantize_blocks(payload, absmax, levels(name).to(device), 64, w.shape, w.dtype)
            assert (back == 0).all()
        constant = torch.full((100,), -0.37, device=device)
        payload, absmax = kernels.quantize_blocks(constant, name, 64)
        back = kernels.dequantize_blocks(payload, absmax, levels(name).to(device), 64, constant.shape, torch.float32)
        assert torch.equal(back, constant)


def check_zeros_among_others(device):
    """With scales of their own they are 0; a scale that is quantized itself leaves NF4's lowest level."""
    from engine.quantization import kernels

    for name in kernels.ENCODERS:
        for seed in range(3):
            w = normal(seed, 512, 64).to(device)
            w[17] = 0
            for double_quantization in (False, True):
                payload, absmax = kernels.quantize_blocks(w, name, 64)
                scales = _quantize_scales(absmax) if double_quantization else absmax
                stored = QuantizedTensor(payload, scales, None, data_type(name), per_block(64), w.shape, w.dtype)
                back = stored.dequantize()[17]
                scale = scales.dequantize()[17] if double_quantization else absmax[17]
                assert torch.equal(back, (-scale if name == "nf4" else 0 * scale).expand(64))
                assert (scale != 0) == double_quantization


def check_a_number_that_is_not_finite_shows_in_its_block(device):
    from engine.quantization import kernels

    for dtype in DTYPES:
        for value in (math.nan, math.inf, -math.inf):
            w = normal(0, 5, 64).to(device, dtype)
            w[3, 17] = value
            _, absmax = kernels.quantize_blocks(w, "nf4", 64)
            assert absmax.isfinite().tolist() == [True, True, True, False, True]


def check_one_number_tells_whether_all_are_finite(device):
    from engine.quantization import kernels

    for name in kernels.ENCODERS:
        for dtype in DTYPES:
            for seed, block_size in enumerate(BLOCK_SIZES):
                w = normal(seed, 9 * 777).to(device, dtype)
                w[11] = torch.finfo(dtype).max
                broken = torch.zeros(1, dtype=torch.int32, device=device)
                plain = kernels.quantize_blocks(w, name, block_size)
                for found, wanted in zip(kernels.quantize_blocks(w, name, block_size, broken), plain, strict=True):
                    assert torch.equal(found, wanted)
                assert broken.item() == 0
                for value, place in ((math.nan, 0), (math.inf, 4000), (-math.inf, 9 * 777 - 1)):
                    w_broken = w.clone()
                    w_broken[place] = value
                    broken.zero_()
                    kernels.quantize_blocks(w_broken, name, block_size, broken)
                    assert broken.item() == 1, (value, place, dtype, block_size)


def assert_values(found, wanted):
    """Equal to the bit; Triton's interpreter cuts bfloat16 off where the GPU rounds."""
    cut = 2.0**-7 if found.dtype == torch.bfloat16 and not found.is_cuda else 0
    torch.testing.assert_close(found.cpu(), wanted, rtol=cut, atol=0)


def check_values_are_the_references(device):
    from engine.quantization import kernels

    for name in ("nf4", "fp4-bnb", "int4", "fp4-e2m1"):
        for dtype in DTYPES:
            for block_size in BLOCK_SIZES:
                for count in COUNTS:
                    q = quantize(normal(count, count).to(dtype), name, per_block(block_size))
                    payload, scales = q.payload.to(device), q.scales.to(device)
                    codes = levels(name).to(device)
                    back = kernels.dequantize_blocks(payload, scales, codes, block_size, q.shape, dtype)
                    assert_values(back, q.dequantize())


def check_values_with_quantized_scales_are_the_references(device):
    from engine.quantization import kernels

    for dtype in DTYPES:
        q = quantize(normal(3, 300, 130).to(dtype), "nf4", double_quantization=True)
        *tensors, size = q.scales.parts
        scales = kernels.NestedScales(*(tensor.to(device) for tensor in tensors), size)
        back = kernels.dequantize_blocks(q.payload.to(device), scales, levels("nf4").to(device), 64, q.shape, dtype)
        assert_values(back, q.dequantize())


def check_values_stay_within_their_dtype(device):
    """As the reference's do: in a narrower dtype, and where a scale that is quantized itself is beyond float32."""
    from engine.quantization import kernels

    def back(q):
        scales = (
            q.scales.to(device)
            if not q._is_doubly_quantized
            else kernels.NestedScales(
                *(part.to(device) if isinstance(part, torch.Tensor) else part for part in q.scales.parts)
            )
        )
        codes = levels("nf4").to(device)
        return kernels.dequantize_blocks(q.payload.to(device), scales, codes, 64, q.shape, q.dtype)

    for seed in range(20):
        w = 50 * normal(seed, 8 + seed, 64)
        w[0] *= torch.finfo(torch.float32).max / w[0].abs().max()
        q = quantize(w, "nf4", double_quantization=True)
        assert_values(back(q), q.dequantize())
        for double in (False, True):
            wide = quantize(5e6 * normal(seed, 4, 64), "nf4", double_quantization=double)
            narrow = replace(wide, dtype=torch.float16)
            assert (wide.dequantize().abs() > torch.finfo(torch.float16).max).any()
            assert_values(back(narrow), narrow.dequantize())


def check_every_launch_gives_the_same(device):
    from engine.quantization import kernels

    w = normal(9, 5, 1000).to(device)
    payload, absmax = kernels.quantize_blocks(w, "nf4", 64)
    back = kernels.dequantize_blocks(payload, absmax, levels("nf4").to(device), 64, w.shape, w.dtype)
    for launch in (kernels.Launch(64, 1), kernels.Launch(1024, 2), kernels.Launch(4096, 8)):
        other_payload, other_absmax = kernels.quantize_blocks(w, "nf4", 64, launch=launch)
        assert torch.equal(other_payload, payload)
        assert torch.equal(other_absmax, absmax)
        assert torch.equal(
            kernels.dequantize_blocks(payload, absmax, levels("nf4").to(device), 64, w.shape, w.dtype, launch), back
        )


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted():
    """What every check said through the interpreter: nothing, or how it failed."""
    return run_in_interpreter("tests.unit.test_quantization_kernels")


@pytest.mark.parametrize("name", CHECKS)
def test_through_the_interpreter(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    CHECKS[name]("cuda")


def assert_same_as_bitsandbytes(w, name, block_size):
    from bitsandbytes import functional

    from engine.quantization import kernels

    theirs, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=THEIR_NAMES[name])
    payload, absmax = kernels.quantize_blocks(w, name, block_size)
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(unpacked(payload, w.numel()), unpacked(theirs.flatten(), w.numel()))
    back = kernels.dequantize_blocks(payload, absmax, state.code, block_size, w.shape, w.dtype)
    assert torch.equal(back, functional.dequantize_4bit(theirs, state))


@pytest.mark.gpu
@pytest.mark.parametrize("name", THEIR_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [2**power for power in range(5, 13)])
def test_bitsandbytes_codes_scales_and_values(name, dtype, block_size):
    for seed, shape in enumerate([(1024, 1024), (2048, 5632), (33, 77), (4096 * 3 + 64,), (1,), (2, 3, 64)]):
        for scale in (1.0, 1e-3 if dtype == torch.float16 else 1e-12, 1e3):
            assert_same_as_bitsandbytes((scale * normal(seed, *shape)).to("cuda", dtype), name, block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("name", THEIR_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 24.0, 0.1, 2.0**-7, 3e-5])
def test_bitsandbytes_codes_at_the_edges(name, dtype, factor):
    assert_same_as_bitsandbytes(edges(name, factor).to("cuda", dtype), name, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", THEIR_NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitsandbytes_codes_of_zeros_constants_and_tiny_numbers(name, dtype):
    """Blocks of denormals alone are left out: what bitsandbytes' fast arithmetic makes of them is not defined."""
    blocks = [torch.full((64,), value) for value in (0.0, -0.0, 1.0, -1.0, 0.3, -0.3, 1e-7, 2e-38)]
    mixed = normal(1, 20, 64) * torch.logspace(-35, -30, 20)[:, None] * 100
    assert_same_as_bitsandbytes(torch.cat([torch.stack(blocks), mixed]).to("cuda", dtype), name, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", THEIR_NAMES)
def test_bitsandbytes_codes_of_every_half_precision_number(name, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers.float().abs() < 2.0**120)]
    for seed in range(4):
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
        assert_same_as_bitsandbytes(numbers[order].to("cuda"), name, 32)
    small = numbers[(numbers.float().abs() <= 1.5)]
    blocks = torch.cat([torch.full((len(small), 1), 1.5), small.float()[:, None].expand(-1, 31)], dim=1)
    assert_same_as_bitsandbytes(blocks.to("cuda", dtype), name, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_values_with_quantized_scales(double):
    from bitsandbytes import functional

    from engine.quantization.production import StoredWeight

    for seed, dtype in enumerate(DTYPES):
        w = normal(seed, 2048, 1376).to("cuda", dtype)
        packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=double)
        assert torch.equal(StoredWeight(packed, state).dequantize(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_takes_the_kernel_on_cuda(dtype, double):
    w = normal(5, 300, 512).to("cuda", dtype)
    ours, reference = (quantize(given, "nf4", double_quantization=double) for given in (w, w.cpu()))
    assert (ours.payload.cpu() != reference.payload).sum() <= 1
    assert ours.nbytes == reference.nbytes
    assert ours.dequantize().dtype == dtype
    torch.testing.assert_close(ours.dequantize().cpu(), reference.dequantize(), atol=0.01 if double else 1e-4, rtol=0)


@pytest.mark.gpu
def test_a_weight_that_is_no_number_is_refused_on_cuda_too():
    w = normal(0, 8, 64).cuda()
    w[2, 5] = math.nan
    with pytest.raises(InputError, match=r"hold nan at index \[2, 5\]"):
        quantize(w)
    with pytest.raises(InputError, match="nothing to quantize"):
        quantize(torch.empty(0, 4, device="cuda"))


def decoder():
    torch.manual_seed(0)
    return Decoder(ModelConfig(d_model=128, num_layers=2, num_heads=4, vocab_size=50)).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit])
def test_a_quantized_model_computes_on_cuda_what_it_does_on_the_cpu(convert, dtype):
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    exact = decoder().to(dtype)
    on_cpu, on_gpu = convert(exact), convert(decoder().to("cuda", dtype))
    with torch.no_grad():
        wanted, found = on_cpu(ids).float(), on_gpu(ids.cuda()).float().cpu()
        error = (wanted - exact(ids).float()).square().mean().sqrt()
    rounding = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps) * wanted.std()  # of int8 layers on CUDA
    assert (found - wanted).square().mean().sqrt() < 0.5 * error + rounding
    assert [layer.name for layer in on_gpu.quantization.quantized] == [
        layer.name for layer in on_cpu.quantization.quantized
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("convert", [quantize_model_4bit, quantize_model_8bit])
def test_a_quantized_model_takes_as_much_memory_on_cuda_as_on_the_cpu(convert):
    on_cpu, on_gpu = convert(decoder()), convert(decoder().cuda())
    assert get_model_memory_mb(on_gpu) == get_model_memory_mb(on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_4bit_and_our_codes_agree_on_cuda(dtype):
    linear = torch.nn.Linear(128, 96, bias=False, dtype=dtype, device="cuda")
    layer = quantize_model_4bit(linear, double_quantization=False)
    ours = quantize(linear.weight, "nf4")
    assert torch.equal(layer.weight.data.flatten(), ours.payload)
    x = torch.randn(7, 128, device="cuda", dtype=dtype)
    torch.testing.assert_close(layer(x), x @ ours.dequantize().T, atol=0.02, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_a_quantized_model_learn_the_same_on_cuda(dtype):
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    losses = {}
    for device in ("cpu", "cuda"):
        model = quantize_model_4bit(decoder().to(dtype)).train()
        torch.manual_seed(1)
        inject_lora(model, rank=4, adapter_dtype=torch.float32)
        model.to(device)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses[device] = []
        for _ in range(6):
            out = model(ids.to(device)).float()
            loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["cuda"][-1] < losses["cuda"][0]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=8 * torch.finfo(dtype).eps + 1e-3)


if __name__ == "__main__":
    report(CHECKS)
