"""Adapters on a 4-bit base (QLoRA): PEFT's numbers, nothing dense kept, the base as it was, on the CPU and on CUDA."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from engine.errors import InputError
from engine.lora.injection import PROJECTIONS, inject_lora, lora_parameters, lora_state_dict, merge
from engine.lora.linear import DoRALinear, LoRALinear, pissa_start
from engine.lora.product import AdaptedWeight, adapted_linears
from engine.quantization.production import StoredWeight, quantize_model_4bit

SEEDS = range(3)
RANK, ALPHA = 4, 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def linear_4bit(seed=0, outputs=96, dtype=torch.float32, bias=False, device="cpu", **options):
    torch.manual_seed(seed)
    return quantize_model_4bit(nn.Linear(64, outputs, bias=bias, dtype=dtype), **options).to(device)


def adapted(base, seed=0, dtype=torch.float32):
    torch.manual_seed(seed + 100)
    layer = LoRALinear(base, RANK, ALPHA, dtype=dtype)
    nn.init.normal_(layer.adapter.B, std=0.1)
    return layer.to(base.weight.device)


def inputs(seed=0, dtype=torch.float32, device="cpu"):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).requires_grad_()


def outcome(layers, x, compute):
    """Outputs, and the gradients of x and of every factor."""
    outputs = compute(layers, x)
    sum((y.float() * torch.linspace(-1, 1, y.shape[-1], device=y.device)).sum() for y in outputs).backward()
    found = [*outputs, x.grad, *(p.grad for layer in layers for p in (layer.adapter.A, layer.adapter.B))]
    layers[0].zero_grad()
    return [tensor.detach().clone() for tensor in found]


def by_formula(layers, x):
    """Each layer's dense weight, and autograd."""
    outputs = []
    for layer in layers:
        W = StoredWeight.of(layer.base).dequantize(x.dtype)
        A, B = layer.adapter.A.to(x.dtype), layer.adapter.B.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        outputs.append(F.linear(x, W, bias) + layer.adapter.scaling * (x @ A @ B))
    return outputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"double_quantization": False}, {"quant_type": "fp4"}], ids=str)
def test_several_layers_together_agree_with_the_formula(device, seed, dtype, options):
    sizes = ((96, True), (32, False), (64, False))
    layers = [
        adapted(linear_4bit(seed + i, size, dtype, bias, device, **options), seed + i)
        for i, (size, bias) in enumerate(sizes)
    ]
    found = outcome(layers, inputs(seed, dtype, device), LoRALinear.together)
    for layer in layers:
        layer.zero_grad()
    wanted = outcome(layers, inputs(seed, dtype, device), by_formula)
    precision = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, formula in zip(found, wanted, strict=True):
        assert ours.dtype == formula.dtype
        scale = formula.float().abs().max().item()
        torch.testing.assert_close(ours, formula, atol=precision * scale, rtol=precision)


@pytest.mark.parametrize("device", DEVICES)
def test_alone_it_gives_what_it_gives_together_and_what_the_base_and_the_update_add_up_to(device):
    layer, x = adapted(linear_4bit(bias=True, device=device)), inputs(device=device)
    alone = layer(x)
    torch.testing.assert_close(alone, LoRALinear.together([layer, layer], x)[1])
    torch.testing.assert_close(alone, layer.base(x) + layer.adapter(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_backward_pass_keeps_no_dense_weight(device):
    layers = [adapted(linear_4bit(i, 2048, device=device), i) for i in range(2)]
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        outputs = LoRALinear.together(layers, inputs(device=device))
    assert saved
    assert max(tensor.numel() for tensor in saved) < 2048 * 64 / 2
    sum(y.sum() for y in outputs).backward()


class Counting:
    """A packed weight that counts how often it is made dense."""

    def __init__(self, weight):
        self.weight, self.times = weight, 0

    def dequantize(self, dtype):
        self.times += 1
        return self.weight.to(dtype)


@pytest.mark.parametrize("x_learns", [True, False])
def test_a_packed_weight_is_dequantized_once_a_pass_and_only_if_its_gradient_is_wanted(x_learns):
    packed = [Counting(torch.randn(6, 64)), Counting(torch.randn(9, 64))]
    factors = [(torch.randn(64, 2, requires_grad=True), torch.randn(2, len(w.weight))) for w in packed]
    operands = [AdaptedWeight(w, None, A, B, 1.0) for w, (A, B) in zip(packed, factors, strict=True)]
    outputs = adapted_linears(inputs().requires_grad_(x_learns), operands)
    assert [w.times for w in packed] == [1, 1]
    sum(y.sum() for y in outputs).backward()
    assert [w.times for w in packed] == [1 + x_learns] * 2


def test_recomputed_it_gives_the_same_gradients():
    layer = adapted(linear_4bit())
    plain = outcome([layer], inputs(), LoRALinear.together)
    layer.zero_grad()
    again = outcome(
        [layer], inputs(), lambda layers, x: checkpoint(LoRALinear.together, layers, x, use_reentrant=False)
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_its_dtype_where_the_base_does(device):
    layer = adapted(linear_4bit(dtype=torch.bfloat16, device=device))
    x = inputs(dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, by_formula([layer], x)[0], atol=0.05, rtol=0.02)
    wide = inputs(device=device)
    y = layer(wide)  # the base computes in bfloat16, whatever x is
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer.base(wide) + layer.adapter(wide), atol=1e-4, rtol=1e-4)


AUTOCAST = [None, torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_watched_or_not_it_gives_the_dtype_of_the_base_and_the_same_gradients(device, autocast, x_dtype, dtype):
    base = linear_4bit(dtype=dtype or torch.float32, bias=True, device=device)
    if dtype is None:  # what bitsandbytes' own constructor leaves: it computes in the first input's dtype
        base.compute_dtype, base.compute_type_is_set = None, False
    layer, watched = adapted(base), adapted(copy.deepcopy(base))
    watched.base.register_forward_hook(lambda *_: None)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        expected = copy.deepcopy(base)(inputs(dtype=x_dtype, device=device)).dtype
    found = []
    for each in (layer, watched):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            found.append(outcome([each], inputs(dtype=x_dtype, device=device), lambda layers, x: [layers[0](x)]))
            together = LoRALinear.together([each, each], inputs(dtype=x_dtype, device=device))
        assert {y.dtype for y in together} == {found[-1][0].dtype} == {expected}
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()


def test_compiled_it_gives_the_same():
    layer = adapted(linear_4bit())
    plain = outcome([layer], inputs(), LoRALinear.together)
    layer.zero_grad()
    compiled = torch.compile(layer, backend="aot_eager")
    again = outcome([layer], inputs(), lambda layers, x: [compiled(x)])
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_a_base_that_something_watches_is_called():
    layer, seen = adapted(linear_4bit()), []
    layer.base.register_forward_hook(lambda module, args, output: seen.append(output))
    layer(inputs())
    assert len(seen) == 1


def test_a_layer_of_its_own_kind_computes_its_own_product():
    class Doubled(Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    base = linear_4bit()
    base.__class__ = Doubled
    assert StoredWeight.of(base) is None
    layer, x = LoRALinear(base, RANK), inputs()
    torch.testing.assert_close(layer(x), base(x))


def test_what_needs_the_weight_as_a_matrix_is_refused():
    model = nn.Sequential(linear_4bit())
    inject_lora(model, RANK, targets="*")
    with pytest.raises(InputError, match="0: The adapted layer is a Linear4bit, whose weight cannot be read and"):
        merge(model)
    for refused in ({"layer": DoRALinear}, {"start": pissa_start}):
        with pytest.raises(InputError, match="is a Linear4bit"):
            inject_lora(nn.Sequential(linear_4bit()), RANK, targets="*", **refused)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)).to(dtype)
    return quantize_model_4bit(model).train()


def both(dtype, seed, device="cpu"):
    """PEFT's and ours on copies of one quantized model, with the same factors."""
    model = llama(dtype)
    theirs, ours = copy.deepcopy(model), model
    theirs.is_loaded_in_4bit = True
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS))
    theirs = get_peft_model(theirs, config).train()
    layers = inject_lora(ours, RANK, ALPHA, adapter_dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in layers.items():
            twin = theirs.get_submodule(f"base_model.model.{name}")
            assert type(twin).__name__ == "Linear4bit"
            twin.lora_B["default"].weight.normal_(0, 0.1, generator=generator)
            layer.adapter.A.copy_(twin.lora_A["default"].weight.T)
            layer.adapter.B.copy_(twin.lora_B["default"].weight.T)
    return theirs.to(device), ours.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_and_gradients_are_pefts(device, seed, dtype):
    theirs, ours = both(dtype, seed, device)
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(seed)).to(device)
    outputs = {}
    for key, model in (("theirs", theirs), ("ours", ours)):
        outputs[key] = model(ids).logits.float()
        F.cross_entropy(outputs[key][:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    precision = 1e-4 if dtype == torch.float32 else 0.05

    def assert_close(found, wanted):
        assert (found - wanted).norm() <= precision * wanted.norm() + 1e-7

    assert_close(outputs["ours"], outputs["theirs"])
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            twin = theirs.get_submodule(f"base_model.model.{name}")
            assert_close(module.adapter.A.grad, twin.lora_A["default"].weight.grad.T)
            assert_close(module.adapter.B.grad, twin.lora_B["default"].weight.grad.T)


@pytest.mark.parametrize("device", DEVICES)
def test_training_moves_the_adapters_alone(device):
    model = llama().to(device)
    inject_lora(model, RANK, adapter_dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".adapter." not in name}
    start = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    assert all(name.endswith((".adapter.A", ".adapter.B")) for name in start)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    losses = []
    for _ in range(8):
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(not torch.equal(tensor, start[name]) for name, tensor in lora_state_dict(model).items())


@pytest.mark.gpu
def test_the_peak_of_a_step_holds_one_dense_weight_at_a_time():
    width = 2048
    torch.manual_seed(0)
    dense = [nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    layers = [adapted(quantize_model_4bit(linear)) for linear in dense]
    del dense
    x = torch.randn(8, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    sum(y.float().sum() for y in LoRALinear.together(layers, x)).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sum(y.float().sum() for y in LoRALinear.together(layers, x)).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2 * width * width * 2
