"""Ours and bitsandbytes': the same levels, codes, scales and values, on the CPU, in every dtype, ties included."""

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear8bitLt

from engine.quantization.data_types import bitsandbytes_fp4, dynamic_8bit, normal_float
from engine.quantization.grouping import per_block, per_channel
from engine.quantization.outliers import int8_product
from engine.quantization.tensor import quantize

SEEDS = range(3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = {"nf4": "nf4", "fp4": "fp4-bnb"}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(w, quant_type, block_size):
    """Of a matrix whose rows hold a fraction of a block, bitsandbytes' kernel for AVX512 takes other blocks' scales;
    told that the tensor is flat and even, which makes the same blocks, it computes what was stored."""
    theirs, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
    ours = quantize(w, TYPES[quant_type], per_block(block_size))
    assert torch.equal(ours.payload, theirs.flatten())
    assert torch.equal(ours.scales, state.absmax)
    if w.shape[-1] % block_size:
        state.shape = torch.Size([w.numel()])
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(theirs, state).reshape(w.shape))


def test_levels_are_the_same_floats():
    assert torch.equal(normal_float(4).codebook, functional.get_4bit_type("nf4", device="cpu"))
    by_pattern = bitsandbytes_fp4().decode(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(by_pattern, functional.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_8bit().codebook, functional.create_dynamic_map())


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256, 1024])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_codes_scales_and_values(quant_type, dtype, block_size, seed):
    assert_same((0.02 * normal(seed, 96, 256)).to(dtype), quant_type, block_size)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 34), (130,), (3, 5, 22)])
def test_blocks_that_do_not_divide(quant_type, dtype, shape):
    assert_same(normal(1, *shape).to(dtype), quant_type, 64)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_zeros_and_the_numbers_next_to_them(quant_type, dtype):
    levels = functional.get_4bit_type(quant_type, device="cpu").unique()
    halfway = (levels[:-1] + levels[1:]) / 2
    if quant_type == "fp4":
        halfway = torch.cat([halfway, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    near = torch.cat([halfway, halfway.nextafter(torch.tensor(2.0)), halfway.nextafter(torch.tensor(-2.0)), levels])
    blocks = torch.zeros(-(-len(near) // 63), 64)
    blocks[:, 0] = 1.0  # the scale
    blocks[:, 1:] = torch.nn.functional.pad(near, (0, -len(near) % 63)).view(-1, 63)
    for factor in (1.0, 2.0**-7):
        assert_same((factor * blocks).to(dtype), quant_type, 64)


def test_halfway_goes_down():
    levels = normal_float(4).codebook
    halfway = (levels[:-1] + levels[1:]) / 2
    w = torch.cat([torch.ones(1), halfway, torch.zeros(48)])
    assert quantize(w, "nf4").codes[1:16].tolist() == list(range(15))


@pytest.mark.parametrize("seed", SEEDS)
def test_double_quantization_differs_by_the_cpu_kernels_search_alone(seed):
    w = 0.02 * normal(seed, 1024, 1024)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = quantize(w, "nf4", double_quantization=True)
    assert torch.equal(ours.payload, theirs.flatten())
    assert torch.equal(ours.scales.mean, state.offset)
    assert torch.equal(ours.scales.differences.scales, state.state2.absmax)
    codes = ours.scales.differences.codes
    assert (codes != state.absmax).float().mean() < 0.005
    exact = codes == state.absmax
    back = functional.dequantize_4bit(theirs, state).view(-1, 64)
    assert torch.equal(ours.dequantize().view(-1, 64)[exact], back[exact])
    scales = w.view(-1, 64).abs().amax(1) - ours.scales.mean  # where they differ, ours is nearer
    peaks = ours.scales.differences.scales.repeat_interleave(256)
    ours_off = (dynamic_8bit().decode(codes) * peaks - scales).abs()
    theirs_off = (dynamic_8bit().decode(state.absmax) * peaks - scales).abs()
    assert (ours_off <= theirs_off + 1e-9).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_int8_weights_have_the_same_codes(seed):
    w = normal(seed, 48, 96).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(w)
    ours = quantize(w, "int8", per_channel())
    levels = ours.data_type.decode(ours.codes)
    assert torch.equal(levels.to(torch.int8), codes)
    torch.testing.assert_close(127 * ours.scales, absmax)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_products_agree(seed, threshold):
    x, w = normal(seed, 5, 64).half(), normal(seed + 9, 32, 64).half()
    x[:, 7] *= 30
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=threshold)
    layer.weight.data = w.clone()
    layer = layer.to("cpu")
    layer.weight = layer.weight._quantize("cpu") if layer.weight.CB is None else layer.weight
    theirs = layer.eval()(x)
    ours = int8_product(x, quantize(w, "int8", per_channel()), threshold)
    torch.testing.assert_close(ours.output, theirs, atol=0.02, rtol=4e-3)
