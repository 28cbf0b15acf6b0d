"""An adapted linear layer and its variants: start, learn, merge and come back."""

import copy
import math
from functools import partial

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import InputError
from engine.lora.layer import rank_stabilized_scaling
from engine.lora.linear import DoRALinear, LoRALinear, pissa_start
from engine.model import together

SEEDS = range(3)
KINDS = {
    "lora": LoRALinear,
    "rslora": partial(LoRALinear, scaling_rule=rank_stabilized_scaling),
    "dora": DoRALinear,
    "pissa": partial(LoRALinear, start=pissa_start),
    "dora from pissa": partial(DoRALinear, start=pissa_start),
}


class QuantizedLinear(nn.Linear):
    """Stands for a layer that holds its weight in a form of its own."""

    def forward(self, x):
        return F.linear(x, self.weight.round(), self.bias)


def base_linear(seed=0, kind=nn.Linear, bias=True, dtype=torch.float32):
    torch.manual_seed(seed)
    return kind(24, 16, bias=bias, dtype=dtype)


def learn(layer, seed=0):
    """Move every adapter's parameter away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base."):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return layer


def inputs(seed=0, dtype=torch.float32):
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_variant_starts_as_the_layer_it_was_given(kind, seed, training, bias):
    base = base_linear(seed, bias=bias)
    x, wanted = inputs(seed), base(inputs(seed))
    torch.testing.assert_close(kind(base, 4, 8).train(training)(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_variant_merges_into_the_same_function_and_back_to_the_bit(kind, seed, bias):
    layer = learn(kind(base_linear(seed, bias=bias), 4, 8), seed)
    x, given, weight = inputs(seed), layer(inputs(seed)), layer.base.weight
    bits = weight.detach().clone()
    layer.merge()
    layer.merge()  # again: nothing
    assert layer.merged
    assert not torch.equal(layer.base.weight, bits)
    torch.testing.assert_close(layer(x), given, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.base(x), given, atol=1e-5, rtol=1e-4)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.base.weight is weight
    assert torch.equal(layer.base.weight, bits)
    assert torch.equal(layer(x), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_to_the_bit_too(kind, dtype):
    layer = learn(kind(base_linear(dtype=dtype), 4, 8))
    bits = layer.base.weight.detach().clone()
    layer.merge()
    assert layer.base.weight.dtype == dtype
    layer.unmerge()
    assert torch.equal(layer.base.weight, bits)


@pytest.mark.parametrize("seed", SEEDS)
def test_delta_weight_is_the_change_from_the_given_weight(kind, seed):
    base = base_linear(seed)
    given = base.weight.detach().clone()
    layer = kind(base, 4, 8)
    torch.testing.assert_close(layer.delta_weight(), torch.zeros(16, 24), atol=1e-5, rtol=0)
    learn(layer, seed)
    delta = layer.delta_weight()
    assert delta.abs().max() > 0.01
    torch.testing.assert_close(layer.original_weight(), given, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(given + delta, layer.merged_weight(), atol=1e-5, rtol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer.delta_weight(), delta)  # merged or not


def test_a_merged_layer_holds_the_given_matrix_and_no_third():
    layer = learn(LoRALinear(base_linear(), 4))
    weight = layer.base.weight
    layer.merge()
    assert layer.frozen_weight is weight
    assert "_unmerged" not in layer.state_dict()
    assert sum(p.numel() for p in layer.parameters()) == 16 * 24 + 16 + 4 * (16 + 24)


def test_a_layer_that_is_copied_or_cast_while_merged_comes_back():
    layer = learn(LoRALinear(base_linear(), 4))
    bits = layer.base.weight.detach().clone()
    layer.merge()
    clone = copy.deepcopy(layer).double()
    clone.unmerge()
    assert clone.base.weight.dtype == torch.float64
    assert torch.equal(clone.base.weight, bits.double())
    assert layer.merged


@pytest.mark.parametrize("seed", SEEDS)
def test_pissa_takes_the_principal_part_out_of_the_frozen_weight(seed):
    base = base_linear(seed)
    singular = torch.linalg.svdvals(base.weight.detach())
    layer = LoRALinear(base, 4, 8, start=pissa_start)
    torch.testing.assert_close(torch.linalg.svdvals(layer.frozen_weight)[:-4], singular[4:], atol=1e-5, rtol=1e-4)
    update = layer.adapter.scaling * (layer.adapter.A @ layer.adapter.B)
    torch.testing.assert_close(torch.linalg.svdvals(update.detach())[:4], singular[:4], atol=1e-5, rtol=1e-4)
    A, B = layer.factors()
    assert A.shape == (24, 8)
    assert B.shape == (8, 16)


@pytest.mark.parametrize("seed", SEEDS)
def test_dora_is_its_formula(seed):
    base = base_linear(seed)
    layer = learn(DoRALinear(base, 4, 8), seed)
    directed = base.weight + layer.adapter.scaling * (layer.adapter.A @ layer.adapter.B).T
    expected = F.linear(inputs(seed), directed * (layer.magnitude / directed.norm(dim=1))[:, None], base.bias)
    torch.testing.assert_close(layer(inputs(seed)), expected, atol=1e-5, rtol=1e-4)


def test_dora_takes_the_norm_for_a_constant():
    base = base_linear()
    layer = learn(DoRALinear(base, 4, 8))
    layer(inputs()).sin().sum().backward()
    A, B = (factor.detach().clone().requires_grad_() for factor in (layer.adapter.A, layer.adapter.B))
    magnitude = layer.magnitude.detach().clone().requires_grad_()
    directed = base.weight + layer.adapter.scaling * (A @ B).T
    weight = directed * (magnitude / directed.detach().norm(dim=1))[:, None]
    F.linear(inputs(), weight, base.bias).sin().sum().backward()
    torch.testing.assert_close(layer.adapter.A.grad, A.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.adapter.B.grad, B.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(layer.magnitude.grad, magnitude.grad, atol=1e-4, rtol=1e-3)


def test_dora_survives_an_output_without_weights():
    base = base_linear()
    with torch.no_grad():
        base.weight[3] = 0
    layer = DoRALinear(base, 4)
    layer(inputs()).sum().backward()
    assert layer(inputs()).isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_drops_the_updates_inputs_in_training_only(seed):
    layer = learn(LoRALinear(base_linear(seed), 4, dropout=0.5), seed)
    x = inputs(seed)
    torch.manual_seed(seed)
    dropped = layer.train()(x)
    torch.manual_seed(seed)
    update = layer.adapter.scaling * (F.dropout(x, 0.5) @ layer.adapter.A @ layer.adapter.B)
    torch.testing.assert_close(dropped, layer.base(x) + update)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.allclose(layer(x), dropped)


def test_a_dropped_dora_is_finite_and_differs():
    layer = learn(DoRALinear(base_linear(), 4, dropout=0.5)).train()
    assert not torch.allclose(layer(inputs()), layer.eval()(inputs()))


def test_another_kind_of_base_computes_its_own_product():
    base = base_linear(kind=QuantizedLinear)
    layer = learn(LoRALinear(base, 4, 8))
    x = inputs()
    expected = base(x) + layer.adapter.scaling * (x @ layer.adapter.A @ layer.adapter.B)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.adapter.B.grad.abs().max() > 0
    for refused in (layer.merge, partial(DoRALinear, base, 4), partial(LoRALinear, base, 4, start=pissa_start)):
        with pytest.raises(InputError, match="is a QuantizedLinear"):
            refused()


def test_a_4_bit_base_learns_beside_its_own_product():
    given = base_linear()
    base = bitsandbytes.nn.Linear4bit(24, 16, compute_dtype=torch.float32, quant_type="nf4")
    base.load_state_dict(given.state_dict())
    base.to("cpu")  # quantizes
    x = inputs().requires_grad_()
    layer = LoRALinear(base, 4)
    torch.testing.assert_close(layer(x), base(x))
    learn(layer)
    update = layer.adapter.scaling * (x @ layer.adapter.A @ layer.adapter.B)
    torch.testing.assert_close(layer(x), base(x) + update)
    layer(x).sum().backward()
    assert layer.adapter.A.grad.abs().max() > 0
    assert x.grad.abs().max() > 0
    with pytest.raises(InputError, match="is a Linear4bit"):
        layer.merge()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("change", ["none", "merged", "quantized", "dropped", "unfrozen", "learning bias", "hooked"])
def test_layers_together_give_what_each_gives_alone(seed, kind, change):
    layers = [learn(kind(base_linear(seed + 10 * i), 2 + i, 8), seed + i).eval() for i in range(3)]
    seen = []
    if change == "merged":
        layers[1].merge()
    elif change == "quantized":
        layers[1] = learn(LoRALinear(base_linear(kind=QuantizedLinear), 4))
    elif change == "dropped":
        layers[1].train().dropout.p = 1.0  # all of it, so that it is the same twice
    elif change == "unfrozen":
        layers[1].base.requires_grad_(True)
    elif change == "learning bias":
        layers[1].base.bias.requires_grad_(True)
    elif change == "hooked":
        layers[1].register_forward_hook(lambda layer, given, output: seen.append(output))
    x = inputs().requires_grad_()
    learned = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]

    def run(function):
        outputs = function()
        return [*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), learned, materialize_grads=True)]

    found = run(lambda: together(layers, x))
    assert len(seen) == (change == "hooked")
    for one, other in zip(found, run(lambda: [layer(x) for layer in layers]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_base_of_whole_numbers_gets_float32_adapters():
    base = base_linear(kind=QuantizedLinear).requires_grad_(False)
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    assert LoRALinear(base, 4).adapter.A.dtype == torch.float32


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_base_of_which_a_part_is_unfrozen_learns(kind, name):
    layer = learn(kind(base_linear(), 4))
    wanted = layer(inputs())
    parameter = getattr(layer.base, name).requires_grad_(True)
    torch.testing.assert_close(layer(inputs()), wanted)
    layer(inputs()).sum().backward()
    assert parameter.grad.abs().max() > 0


PARTS = ["", "base", "adapter", "dropout"]
HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_hook_on_any_part_runs_and_changes_nothing(kind, part, hook):
    layers = [learn(kind(base_linear(seed), 4, 8), seed) for seed in SEEDS]
    wanted, seen = together(layers, inputs()), []
    watched = layers[1].get_submodule(part)
    getattr(watched, f"register_{hook}")(lambda module, *given: seen.append(module))
    x = inputs().requires_grad_()
    found = together(layers, x)
    sum(y.sum() for y in found).backward()
    assert seen == [watched]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_all_modules_see_every_layer_and_its_parts(hook):
    layers = [learn(LoRALinear(base_linear(seed), 4), seed) for seed in SEEDS]
    seen = []
    register = getattr(nn.modules.module, f"register_module_{hook}")
    handle = register(lambda module, *given: seen.append(module))
    try:
        sum(y.sum() for y in together(layers, inputs().requires_grad_())).backward()
    finally:
        handle.remove()
    wanted = {module for layer in layers for module in (layer, layer.base, layer.adapter, layer.dropout)}
    assert set(seen) == wanted


@pytest.mark.parametrize("part", ["base", "adapter", "dropout"])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_forward_that_was_replaced_on_a_part_is_called(kind, part):
    """As accelerate does on each module that it brings from elsewhere."""
    layers = [learn(kind(base_linear(seed), 4, 8), seed) for seed in SEEDS]
    wanted, seen = together(layers, inputs()), []
    watched = layers[1].get_submodule(part)
    forward = watched.forward
    watched.forward = lambda x: seen.append(part) or forward(x)
    for one, other in zip(together(layers, inputs()), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert seen == [part]


def test_a_layer_whose_forward_was_replaced_is_called_among_others():
    layers, seen = [LoRALinear(base_linear(seed), 4) for seed in SEEDS], []
    forward = layers[2].forward
    layers[2].forward = lambda x: seen.append(x.shape) or forward(x)
    together(layers, inputs())
    assert seen == [inputs().shape]


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_what_a_hook_makes_of_the_bases_output_counts(kind):
    base, x = base_linear(), inputs()
    base.register_forward_hook(lambda module, given, output: output + 1)
    wanted = base(x)
    torch.testing.assert_close(kind(base, 4)(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_anew_for_every_call_is_followed_and_not_merged(norm):
    base, x = norm(base_linear()), inputs()
    layer = LoRALinear(base, 4).eval()
    with torch.no_grad():
        next(p for name, p in base.named_parameters() if name.endswith(("weight_orig", "original"))).mul_(5).add_(0.1)
    torch.testing.assert_close(layer(x), base(x))
    with pytest.raises(InputError, match=r"need a plain nn\.Linear"):
        layer.merge()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
def test_adapters_take_the_bases_dtype_or_another(kind, dtype, adapter_dtype):
    layer = learn(kind(base_linear(dtype=dtype), 4, dtype=adapter_dtype))
    learned = {name: p for name, p in layer.named_parameters() if not name.startswith("base.")}
    magnitude = learned.pop("magnitude", None)
    assert magnitude is None or magnitude.dtype == torch.float32
    assert {p.dtype for p in learned.values()} == {adapter_dtype or dtype}
    y = layer(inputs(dtype=dtype))
    y.sum().backward()
    assert y.dtype == dtype
    assert {p.grad.dtype for p in learned.values()} == {adapter_dtype or dtype}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dora_starts_on_a_half_precision_base_as_exactly_as_the_base(seed, dtype):
    base, x = base_linear(seed, bias=False, dtype=dtype), inputs(seed, dtype)
    wanted, norms = base(x), base.weight.double().norm(dim=1)
    layer = DoRALinear(base, 4)
    assert torch.equal(layer(x), wanted)
    torch.testing.assert_close(layer.magnitude.double(), norms, atol=0, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_small_steps_move_a_magnitude_beside_a_half_precision_base(seed):
    layer = DoRALinear(base_linear(seed, dtype=torch.bfloat16), 4)
    before = layer.magnitude.detach().clone()
    optimizer = torch.optim.SGD([layer.magnitude], lr=1e-5)
    for _ in range(100):
        layer.magnitude.grad = torch.ones_like(layer.magnitude)
        optimizer.step()
    torch.testing.assert_close(layer.magnitude.detach(), before - 1e-3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [1e-3, -1e-3, 3e-4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_magnitude_that_moved_less_than_half_precision_resolves_moves_the_outputs(change, dtype):
    """Each output is rounded, some this way and some that; on average they move as the magnitude did."""
    layer = DoRALinear(base_linear(bias=False, dtype=dtype), 4)
    x = torch.randn(4000, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        layer.magnitude.mul_(1.3)  # from 1 on, half precision has no number that is nearer than half its resolution
        before = layer(x).double()
        layer.magnitude.mul_(1 + change)
        after = layer(x)
    assert after.dtype == dtype
    moved = (after.double() * before).sum() / before.square().sum() - 1
    assert moved.item() == pytest.approx(change, abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pissa_start_makes_up_for_the_rounding_of_its_factors(seed, dtype):
    """Where little but the principal part is in a weight, what is frozen is small, and all that is rounded is that."""
    generator = torch.Generator().manual_seed(seed)
    base = base_linear(seed, dtype=dtype)
    principal = torch.randn(16, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    with torch.no_grad():
        base.weight.copy_(principal)
    given = base.weight.double()
    layer = LoRALinear(base, 4, 8, start=pissa_start)
    assert layer.adapter.A.dtype == layer.base.weight.dtype == dtype
    update = layer.adapter.scaling * (layer.adapter.A.double() @ layer.adapter.B.double()).T
    largest_rest = layer.base.weight.abs().max().item()
    assert largest_rest < 0.1 * given.abs().max()
    assert (layer.base.weight.double() + update - given).abs().max() < torch.finfo(dtype).eps * largest_rest
    torch.testing.assert_close(layer.original_weight().double(), given, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_start_inside_the_weight_is_finite_or_refused_and_then_nothing_has_changed(alpha, dtype):
    base = base_linear(dtype=dtype)
    with torch.no_grad():
        base.weight.mul_(30_000)
    bits, given = base.weight.detach().clone(), base(inputs(dtype=dtype))
    if (alpha, dtype) == (1e-6, torch.float16):
        with pytest.raises(InputError, match=r"too large for torch\.float16 .*: give it float32 adapters, or a larger"):
            LoRALinear(base, 4, alpha, start=pissa_start)
        assert torch.equal(base.weight, bits)
    else:
        layer = LoRALinear(base, 4, alpha, start=pissa_start)
        assert all(parameter.isfinite().all() for parameter in layer.parameters())
        if dtype == torch.float32:
            torch.testing.assert_close(layer(inputs()), given, atol=1e-4 * given.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_stays_bounded_where_the_update_takes_an_output_away(seed, dtype):
    layer = DoRALinear(base_linear(seed, bias=False, dtype=dtype), 1)
    with torch.no_grad():
        row = layer.base.weight[3]
        layer.adapter.A.copy_(row[:, None] / row.norm())
        layer.adapter.B.zero_()
        layer.adapter.B[0, 3] = -row.norm()
    eps = torch.finfo(dtype).eps
    assert layer.merged_weight()[3].norm() <= 2 * eps**0.5 * layer.magnitude[3]
    assert layer(inputs(seed, dtype))[..., 3].abs().max() <= 40 * eps**0.5 * layer.magnitude[3]


def test_merging_does_not_depend_on_autocast(kind):
    layer = learn(kind(base_linear(), 4, 8))
    merged, delta = layer.merged_weight(), layer.delta_weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight(), merged)
        assert torch.equal(layer.delta_weight(), delta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_under_autocast(kind, dtype):
    layer = learn(kind(base_linear(dtype=dtype), 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(inputs(dtype=dtype))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(inputs(dtype=dtype)).float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_runs_where_there_are_shapes_only(kind):
    with torch.device("meta"):
        assert kind(nn.Linear(24, 16), 4)(torch.empty(2, 5, 24)).shape == (2, 5, 16)


def test_rank_stabilized_scaling_keeps_the_outputs_size_as_the_rank_grows():
    def size(rank, rule):
        torch.manual_seed(rank)
        layer = LoRALinear(nn.Linear(512, 512, bias=False), rank, 8, scaling_rule=rule)
        with torch.no_grad():
            layer.base.weight.zero_()
            layer.adapter.B.normal_()
            return layer(torch.randn(64, 512)).std().item()

    assert size(256, rank_stabilized_scaling) == pytest.approx(size(4, rank_stabilized_scaling), rel=0.3)
    assert LoRALinear(base_linear(), 4, 8).adapter.scaling == 2
    assert size(256, lambda alpha, rank: alpha / rank) < 0.2 * size(4, lambda alpha, rank: alpha / rank)


def test_an_update_that_is_not_finite_is_not_merged():
    layer = LoRALinear(base_linear(), 4)
    with torch.no_grad():
        layer.adapter.B[0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_out_of_range_is_an_error(dropout):
    with pytest.raises(InputError, match="at least 0 and below 1"):
        LoRALinear(base_linear(), 4, dropout=dropout)


def test_looks_like_the_layer_it_stands_for():
    base = base_linear()
    layer = LoRALinear(base, 4)
    assert (layer.in_features, layer.out_features) == (24, 16)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@pytest.mark.slow
def test_every_variant_compiles_to_one_graph(kind):
    torch._dynamo.reset()  # its limit of recompilations counts those of other tests
    layer = learn(kind(base_linear(), 4, 8))
    compiled = torch.compile(layer, fullgraph=True)
    x = inputs().requires_grad_()
    learned = [p for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad(compiled(x).sin().sum(), [x, *learned])
    wanted = torch.autograd.grad(layer(x).sin().sum(), [x, *learned])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
