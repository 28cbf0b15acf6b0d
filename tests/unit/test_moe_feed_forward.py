"""The layer is what its experts make of the tokens that they get; transformers' Mixtral says the same.

The kernels are checked through Triton's interpreter where there is no GPU, in a process of its own, since it must be
chosen before Triton is imported: `python -m tests.unit.test_moe_feed_forward`.
"""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.errors import InputError
from engine.model import Decoder, ModelConfig, Parts
from engine.moe import rows
from engine.moe.feed_forward import MoEFeedForward, load_mixtral_block
from engine.moe.observation import observing
from engine.moe.routing import ExpertRouter
from engine.moe.rows import Assignments, combine, gather, silu_times
from tests.interpreter import report, run_in_interpreter


def layer_and_input(seed, shape=(2, 9, 16), ffn_dim=24, num_experts=4, top_k=2, dtype=torch.float32, **routing):
    torch.manual_seed(seed)
    layer = MoEFeedForward(shape[-1], ffn_dim, num_experts, top_k, **routing).to(dtype)
    return layer, torch.randn(shape, dtype=dtype)


def expert_by_expert(layer, x, routing):
    """One assignment after the other, as the formula has it."""
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(tokens)
    for token, expert, gate in zip(routing.tokens.tolist(), routing.experts.tolist(), routing.gates, strict=True):
        gate_proj, up_proj = layer.gate_up_proj[expert].chunk(2)
        hidden = F.silu(tokens[token] @ gate_proj.T) * (tokens[token] @ up_proj.T)
        row = torch.zeros_like(y)
        row[token] = gate * (hidden @ layer.down_proj[expert].T)
        y = y + row
    return y.view(x.shape)


def observed(layer, *arguments):
    with observing(layer) as seen:
        y = layer(*arguments)
    ((_, routing),) = seen
    return y, routing


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "expert choice", "noisy", "random"])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_it_is_the_sum_over_the_chosen_experts(kind, capacity_factor):
    for seed in range(3):
        layer, x = layer_and_input(seed, kind=kind, capacity_factor=capacity_factor, dtype=torch.float64)
        x.requires_grad_()
        y, routing = observed(layer, x)
        wanted = expert_by_expert(layer, x, routing)
        torch.testing.assert_close(y, wanted)
        leaves = (x, layer.gate_up_proj, layer.down_proj, *([layer.router.weight] if kind != "random" else []))
        upstream = torch.randn_like(y)
        found_gradients = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        for one, other in zip(found_gradients, torch.autograd.grad(wanted, leaves, upstream), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sizes", [(16, 24, 4, 2), (32, 40, 8, 3), (12, 20, 5, 2), (7, 5, 3, 2)], ids=str)
def test_it_agrees_with_transformers_mixtral(sizes):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers 5")
    d_model, ffn_dim, num_experts, top_k = sizes
    for seed in range(3):
        torch.manual_seed(seed)
        block = mixtral.MixtralSparseMoeBlock(
            mixtral.MixtralConfig(
                hidden_size=d_model,
                intermediate_size=ffn_dim,
                num_local_experts=num_experts,
                num_experts_per_tok=top_k,
                num_attention_heads=1,
                experts_implementation="eager",
            )
        )
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        layer = load_mixtral_block(block)
        x = torch.randn(2, 30, d_model)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, wanted = layer(ours), block(theirs)
        torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
        upstream = torch.randn_like(y)
        pairs = (
            (layer.gate_up_proj, block.experts.gate_up_proj),
            (layer.down_proj, block.experts.down_proj),
            (layer.router.weight, block.gate.weight),
            (ours, theirs),
        )
        found = torch.autograd.grad(y, [one for one, _ in pairs], upstream)
        for one, other in zip(found, torch.autograd.grad(wanted, [each for _, each in pairs], upstream), strict=True):
            assert other.abs().max() > 1e-3
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_mixtral_block_of_another_activation_is_refused():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers 5")
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2, hidden_act="gelu")
    with pytest.raises(InputError, match="SiLU"):
        load_mixtral_block(mixtral.MixtralSparseMoeBlock(config))


def test_a_mixtral_block_of_one_expert_a_token_is_refused():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral", reason="needs transformers 5")
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(InputError, match="top_k is 1"):
        load_mixtral_block(mixtral.MixtralSparseMoeBlock(config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype):
    for seed in range(3):
        layer, x = layer_and_input(seed, dtype=torch.float64)
        exact, routing = observed(layer, x)
        y, other_routing = observed(copy.deepcopy(layer).to(dtype), x.to(dtype))
        chosen, others_chosen = (each.indices.sort().values for each in (routing, other_routing))
        same = (chosen == others_chosen).all(-1).view(x.shape[:2])  # a token on the border may change sides
        assert y.dtype == dtype
        assert same.float().mean() >= 0.8
        apart = (y.double() - exact)[same].abs().max()
        assert apart <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_padding_goes_to_no_expert_and_does_not_matter():
    for seed in range(3):
        layer, x = layer_and_input(seed)
        padding = torch.rand(x.shape[:2]) < 0.4
        y = layer(x, padding)
        assert (y[padding] == 0).all()
        disturbed = torch.where(padding[..., None], 1e3 * torch.randn_like(x), x)
        assert torch.equal(layer(disturbed, padding), y)
        torch.testing.assert_close(y[~padding], layer(x[~padding][None])[0])


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (1, 1, 16)], ids=str)
def test_few_tokens_or_none(shape):
    layer, x = layer_and_input(0, shape)
    y = layer(x.requires_grad_())
    assert y.shape == x.shape
    y.sum().backward()
    for each in (x, *layer.parameters()):
        assert each.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_batch_of_padding_only(dtype):
    layer, x = layer_and_input(0, dtype=dtype)
    y = layer(x.requires_grad_(), torch.ones(x.shape[:2], dtype=torch.bool))
    assert (y == 0).all()
    y.sum().backward()
    assert (layer.gate_up_proj.grad == 0).all()
    assert (layer.down_proj.grad == 0).all()


def test_when_capacity_drops_everything_the_output_is_zero():
    layer, x = layer_and_input(0, capacity_factor=0.01)
    y, routing = observed(layer, x.requires_grad_())
    assert len(routing.tokens) == 0
    assert len(routing.dropped) == 2 * 18
    assert (y == 0).all()
    y.sum().backward()
    assert (layer.down_proj.grad == 0).all()


def test_one_expert_is_a_swiglu():
    layer, x = layer_and_input(0, num_experts=1, top_k=1)
    y, routing = observed(layer, x)
    gate, up = (x @ layer.gate_up_proj[0].T).chunk(2, dim=-1)
    torch.testing.assert_close(y, (F.silu(gate) * up) @ layer.down_proj[0].T)
    assert (routing.gates == 1).all()


def test_experts_without_tokens_get_no_gradient():
    layer, x = layer_and_input(0, (1, 1, 16), num_experts=6)
    y, routing = observed(layer, x)
    y.sum().backward()
    idle = routing.counts == 0
    assert idle.sum() == 4
    for weights in (layer.gate_up_proj, layer.down_proj):
        assert (weights.grad[idle] == 0).all()
        assert (weights.grad[~idle].abs().amax(dim=(1, 2)) > 0).all()


def test_wrong_sizes_are_named():
    with pytest.raises(InputError, match=r"ffn_dim \(0\)"):
        MoEFeedForward(8, 0, 4)
    with pytest.raises(InputError, match=r"\(3, 8\).*\(4, 8\)"):
        MoEFeedForward(8, 8, 4, router=ExpertRouter(8, 3))
    with pytest.raises(InputError):
        MoEFeedForward(8, 8, 2, 3)


def test_the_state_survives_saving_and_copying():
    layer, x = layer_and_input(0)
    other, _ = layer_and_input(1)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_autocast_computes_in_its_dtype():
    layer, x = layer_and_input(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=3e-2, rtol=3e-2)


@pytest.mark.slow
def test_it_compiles():
    layer, x = layer_and_input(0)
    x.requires_grad_()
    upstream = torch.randn(x.shape)
    wanted = layer(x)
    found = torch.compile(layer)(x)
    torch.testing.assert_close(found, wanted)
    leaves = (x, *layer.parameters())
    for one, other in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


CONFIG = ModelConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=2, max_seq_len=16)
PARTS = Parts(feed_forward=lambda config: MoEFeedForward(config.d_model, 48, 4))


def test_a_decoder_of_it_learns():
    torch.manual_seed(0)
    model = Decoder(CONFIG, PARTS)
    ids = torch.randint(50, (4, 16))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_decoder_draws_the_experts_as_its_other_matrices_and_the_router_itself():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, d_model=128, num_layers=3, num_heads=2)
    model = Decoder(config, Parts(feed_forward=lambda config: MoEFeedForward(config.d_model, 256, 4)))
    std = (2 / (5 * 128)) ** 0.5
    for block in model.layers:
        gate_up, down, router = block.mlp.gate_up_proj, block.mlp.down_proj, block.mlp.router.weight
        assert gate_up.std().item() == pytest.approx(std, rel=0.03)
        assert down.std().item() == pytest.approx(std / 6**0.5, rel=0.03)
        assert torch.corrcoef(down.flatten(1)).triu(1).abs().max() < 0.05
        torch.testing.assert_close(router.norm(dim=1), torch.ones(4))  # as it draws itself
    before = model.layers[0].mlp.router.weight.clone()
    model.reset_parameters()
    assert not torch.equal(model.layers[0].mlp.router.weight, before)


def test_a_model_is_observed_layer_by_layer():
    torch.manual_seed(0)
    model = Decoder(CONFIG, PARTS)
    ids = torch.randint(50, (2, 7))
    with observing(model) as seen:
        first = model(ids)
        model(ids[:, :3])
    assert [name for name, _ in seen] == 2 * ["layers.0.mlp", "layers.1.mlp"]
    assert [routing.num_tokens for _, routing in seen] == [14, 14, 6, 6]
    assert seen[0][1].probs.requires_grad
    assert torch.equal(model(ids), first)
    assert len(seen) == 4


def test_checkpointing_is_seen_once_and_what_is_seen_can_be_trained_on():
    torch.manual_seed(0)
    model = Decoder(CONFIG, PARTS)
    ids = torch.randint(50, (2, 7))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        with observing(model) as seen:
            loss = model(ids).sum() + sum(routing.logits.logsumexp(-1).square().mean() for _, routing in seen)
            loss.backward()
        assert len(seen) == 2
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_observations_nest_and_end_with_an_error():
    layer, x = layer_and_input(0)
    with observing(layer) as outer:
        with observing(layer) as inner:
            layer(x)
        with pytest.raises(InputError), observing(layer):
            layer(x[..., :3])
        layer(x)
    layer(x)
    assert (len(outer), len(inner)) == (2, 1)
    assert layer.router.observers == []


# Rows: what the kernels compute, and the plain definitions


def drawn_rows(seed, num_tokens, num_rows, width, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(max(1, num_tokens), (num_rows,), generator=generator)  # some have many rows, some none
    values = torch.randn(num_rows, width, generator=generator)
    gates = torch.rand(num_rows, generator=generator)
    x = torch.randn(num_tokens, width, generator=generator)
    moved = [each.to(device, dtype) for each in (x, values, gates)]
    return *moved, Assignments(tokens.to(device), num_tokens)


SHAPES = ((9, 20, 16), (5, 0, 8), (1, 7, 33), (12, 12, 300), (40, 3, 1))


def dtypes(device):
    """The interpreter rounds to bfloat16 in its own way."""
    return (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def near(found, exact, dtype):
    assert found.shape == exact.shape
    assert found.dtype == dtype
    if found.numel():
        assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * max(1, exact.abs().max().item())


def check_rows_are_summed_by_token(device):
    from engine.moe import kernels

    for seed, shape in enumerate(SHAPES):
        for dtype in dtypes(device):
            _, values, gates, assignments = drawn_rows(seed, *shape, dtype, device)
            exact = torch.zeros(shape[0], shape[2], dtype=torch.float64, device=device)
            plain = exact.index_add(0, assignments.tokens, values.double())
            gated = exact.index_add(0, assignments.tokens, gates.double()[:, None] * values.double())
            near(kernels.sum_rows(values, None, *assignments.by_token), plain, dtype)
            near(kernels.sum_rows(values, gates, *assignments.by_token), gated, dtype)


def check_gradients_of_the_sum(device):
    from engine.moe import kernels

    for seed, shape in enumerate(SHAPES):
        for dtype in dtypes(device):
            upstream, values, gates, assignments = drawn_rows(seed, *shape, dtype, device)
            given = upstream.double()[assignments.tokens]
            for_rows, for_gates = kernels.sum_rows_backward(upstream, values, gates, assignments.tokens)
            near(for_rows, gates.double()[:, None] * given, dtype)
            near(for_gates, (values.double() * given).sum(1), dtype)


def check_rows_wider_than_a_program(device):
    from engine.moe import kernels

    width = kernels.COLUMNS + 100
    upstream, values, gates, assignments = drawn_rows(3, 3, 5, width, torch.float32, device)
    exact = torch.zeros(3, width, dtype=torch.float64, device=device)
    exact = exact.index_add(0, assignments.tokens, gates.double()[:, None] * values.double())
    near(kernels.sum_rows(values, gates, *assignments.by_token), exact, torch.float32)
    _, for_gates = kernels.sum_rows_backward(upstream, values, gates, assignments.tokens)
    near(for_gates, (values.double() * upstream.double()[assignments.tokens]).sum(1), torch.float32)
    gate_up = torch.cat([values, values.flip(1)], dim=1)
    near(kernels.silu_times(gate_up), F.silu(values.double()) * values.double().flip(1), torch.float32)


def check_silu_times(device):
    from engine.moe import kernels

    for seed, (num_rows, width) in enumerate(((5, 24), (0, 8), (3, 1), (4, 300))):
        for dtype in dtypes(device):
            generator = torch.Generator().manual_seed(seed)
            gate_up = (8 * torch.randn(num_rows, 2 * width, generator=generator)).to(device, dtype)
            upstream = torch.randn(num_rows, width, generator=generator).to(device, dtype)
            exact = gate_up.double().requires_grad_()
            gate, up = exact.chunk(2, dim=1)
            wanted = F.silu(gate) * up
            near(kernels.silu_times(gate_up), wanted.detach(), dtype)
            (gradient,) = torch.autograd.grad(wanted, exact, upstream.double())
            near(kernels.silu_times_backward(upstream, gate_up), gradient, dtype)


def check_any_layout(device):
    from engine.moe import kernels

    upstream, values, gates, assignments = drawn_rows(4, 6, 12, 16, torch.float32, device)
    for move in (lambda x: x.mT.contiguous().mT, lambda x: torch.stack([x, x], dim=-1)[..., 0]):
        for one, other in zip(
            kernels.sum_rows_backward(move(upstream), move(values), gates, assignments.tokens),
            kernels.sum_rows_backward(upstream, values, gates, assignments.tokens),
            strict=True,
        ):
            assert torch.equal(one, other)
        by_token = assignments.by_token
        assert torch.equal(kernels.sum_rows(move(values), gates, *by_token), kernels.sum_rows(values, gates, *by_token))
        assert torch.equal(kernels.silu_times(move(values)), kernels.silu_times(values))


def check_the_layer_is_the_same_with_the_kernels(device):
    from engine.moe import kernels

    plain, used = (lambda like: None), (lambda like: kernels)
    for seed, capacity_factor in enumerate((None, 0.6)):
        layer, x = layer_and_input(seed, capacity_factor=capacity_factor)
        layer, x = layer.to(device), x.to(device).requires_grad_()
        padding = torch.rand(x.shape[:2]).to(device) < 0.3
        upstream = torch.randn(x.shape).to(device)
        found = []
        for way in (used, plain):
            with patch.object(rows, "kernels_for", way):
                y = layer(x, padding)
                found.append([y, *torch.autograd.grad(y, (x, *layer.parameters()), upstream)])
        for one, other in zip(*found, strict=True):
            assert other.abs().max() > 0
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


CHECKS = {name: check for name, check in globals().items() if name.startswith("check_")}


@pytest.fixture(scope="module")
def interpreted():
    """What failed in the interpreter, by the check's name."""
    return run_in_interpreter("tests.unit.test_moe_feed_forward")


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    CHECKS[name]("cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gathering_and_combining_are_each_others_transpose(device):
    for seed, shape in enumerate(SHAPES):
        x, values, _, assignments = drawn_rows(seed, *shape, torch.float32, device)
        x.requires_grad_()
        gathered = gather(x, assignments)
        assert torch.equal(gathered, x[assignments.tokens])
        (gradient,) = torch.autograd.grad(gathered, x, values)
        ones = torch.ones(len(values), device=device)
        torch.testing.assert_close(gradient, combine(values, ones, assignments))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_rows_gradients_are_right(device, monkeypatch):
    for seed, shape in enumerate(SHAPES):
        upstream, values, gates, assignments = drawn_rows(seed, *shape, torch.float32, device)
        gate_up = torch.cat([values, values.flip(0)], dim=1)
        leaves = [each.requires_grad_() for each in (values, gates, gate_up)]

        def both(leaves=leaves, assignments=assignments, upstream=upstream):
            y, hidden = combine(*leaves[:2], assignments), silu_times(leaves[2])
            return y, hidden, *torch.autograd.grad((y, hidden), leaves, (upstream, torch.ones_like(hidden)))

        found = both()
        with monkeypatch.context() as patch:
            patch.setattr(rows, "kernels_for", lambda like: None)
            leaves[:] = [each.detach().double().requires_grad_() for each in leaves]
            wanted = both(leaves, assignments, upstream.double())
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    report(CHECKS)
