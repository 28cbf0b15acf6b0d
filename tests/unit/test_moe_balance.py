"""What keeps experts busy: losses, capacity, the bias on the selection, and the figures that say how busy they are."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from engine.errors import InputError
from engine.moe.balance import admit, auxiliary_loss, capacity, z_loss
from engine.moe.routing import ExpertRouter
from engine.moe.selection_bias import SelectionBias, count_votes
from engine.moe.statistics import load_from_counts, load_of

SEEDS = range(4)


def router(seed=0, d_model=16, num_experts=4, top_k=1, **options):
    torch.manual_seed(seed + 1000)  # not what `normal` draws: the first tokens would be the experts' own rows
    return ExpertRouter(d_model, num_experts, top_k, **options)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestAuxiliaryLoss:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_is_the_sum_of_shares_times_mean_probabilities(self, seed, top_k):
        layer, x = router(seed, top_k=top_k), normal(2, 9, 16, seed=seed)
        probs, indices = layer(x)
        shares = np.bincount(indices.flatten().numpy(), minlength=4) / indices.numel()
        expected = 4 * (shares * probs.detach().flatten(0, 1).mean(0).numpy()).sum()
        assert auxiliary_loss(layer.route(x)).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("top_k", [1, 2])
    def test_is_one_when_balanced_and_experts_over_top_k_when_collapsed(self, top_k):
        layer = router(d_model=4, top_k=top_k)
        with torch.no_grad():
            layer.weight.copy_(50 * torch.eye(4))
        assert auxiliary_loss(layer.route(torch.eye(4).repeat(3, 1))).item() == pytest.approx(1, rel=1e-5)
        assert auxiliary_loss(layer.route(torch.eye(4)[:1].repeat(5, 1))).item() == pytest.approx(4 / top_k, rel=1e-5)

    def test_counts_what_capacity_refuses_and_not_what_is_padding(self):
        layer, x = router(top_k=2, capacity_factor=0.5), normal(3, 8, 16)
        free = router(top_k=2)
        assert torch.equal(auxiliary_loss(layer.route(x)), auxiliary_loss(free.route(x)))
        padding = torch.zeros(3, 8, dtype=torch.bool)
        padding[1:, 3:] = True
        expected = free.route(x[~padding])
        for loss in (auxiliary_loss, z_loss):
            torch.testing.assert_close(loss(free.route(x, padding)), loss(expected))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_descending_balances_a_collapsed_router(self, seed):
        layer, x = router(seed), normal(256, 16, seed=seed)
        x[:, 0] = 3.0
        with torch.no_grad():
            layer.weight[0, 0] = 2.0
        before = load_of(layer.route(x)).max_violation
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(200):
            optimizer.zero_grad()
            auxiliary_loss(layer.route(x)).backward()
            optimizer.step()
        assert before > 2
        assert load_of(layer.route(x)).max_violation < 0.5


class TestZLoss:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_is_the_mean_square_of_the_log_sum(self, seed):
        layer, x = router(seed), normal(2, 7, 16, seed=seed)
        logits = x.flatten(0, 1).double() @ layer.weight.double().T
        expected = logits.exp().sum(-1).log().square().mean()
        assert z_loss(layer.route(x)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_losses_of_nothing_are_zero_with_a_gradient():
    layer = router(num_experts=2)
    for x, padding in ((normal(0, 16), None), (normal(1, 3, 16), torch.ones(1, 3, dtype=torch.bool))):
        routing = layer.route(x, padding)
        (auxiliary_loss(routing) + z_loss(routing)).backward()
        assert auxiliary_loss(routing) == z_loss(routing) == 0
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


class TestCapacity:
    @given(st.integers(0, 500), st.integers(1, 40), st.integers(1, 8), st.floats(0, 4))
    def test_is_the_factor_times_the_fair_share_rounded_down(self, tokens, experts, top_k, factor):
        exact, found = factor * tokens * top_k / experts, capacity(tokens, experts, top_k, factor)
        assert exact - 1 < found
        assert found <= exact + 1e-8 or (found == 1 and tokens and factor >= 1)

    @pytest.mark.parametrize("factor", [1.0, 1.25])
    def test_a_single_token_has_room_unless_less_than_its_share_is_asked_for(self, factor):
        assert capacity(1, 64, 1, factor) == 1
        assert len(router(num_experts=16, top_k=2, capacity_factor=factor).route(normal(1, 16)).tokens) == 2
        assert capacity(1, 64, 1, 0.99) == capacity(0, 64, 1, factor) == 0

    def test_rounding_errors_do_not_count(self):
        assert capacity(100, 10, 1, 1.1) == 11
        assert capacity(30, 3, 1, 0.7) == 7

    @pytest.mark.parametrize("factor", [-0.1, math.inf, math.nan])
    def test_refuses_what_is_no_factor(self, factor):
        with pytest.raises(InputError, match=r"The capacity factor is .*at least 0"):
            capacity(10, 2, 1, factor)
        with pytest.raises(InputError, match=r"The capacity factor is"):
            router(capacity_factor=factor)


class TestAdmission:
    def test_first_choices_come_before_second_ones(self):
        choices = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 0]])
        assert admit(choices, 2).tolist() == [[True, False]] * 4
        assert admit(choices, 3).tolist() == [[True, True], [True, False], [True, True], [True, False]]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("limit", [0, 1, 3, 9, 40])
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_agrees_with_asking_one_after_the_other(self, seed, limit, top_k):
        choices = normal(20, 5, seed=seed).topk(top_k).indices
        left, expected = [limit] * 5, torch.zeros(20, top_k, dtype=torch.bool)
        for rank in range(top_k):
            for token in range(20):
                expert = choices[token, rank]
                expected[token, rank] = left[expert] > 0
                left[expert] -= 1
        assert torch.equal(admit(choices, limit), expected)

    @pytest.mark.parametrize("shape", [(0, 2), (0, 1)])
    def test_nobody_is_admitted_where_nobody_asks(self, shape):
        assert admit(torch.zeros(shape, dtype=torch.int64), 3).shape == shape


class TestLoad:
    def test_figures_of_a_known_load(self):
        load = load_from_counts([4, 2, 0, 0], wanted=[6, 2, 0, 0])
        np.testing.assert_allclose(load.relative, [3, 1, 0, 0])
        assert load.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
        assert load.entropy_share == pytest.approx(load.entropy / math.log(4))
        assert load.max_violation == pytest.approx(2)
        assert load.dead == (2, 3)
        assert load.dropped_share == pytest.approx(0.25)
        assert load.importance is None

    @given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
    def test_figures_keep_to_their_bounds(self, counts):
        load = load_from_counts(counts)
        E = len(counts)
        if not any(counts):
            assert load.dead == ()
            return
        assert load.relative.mean() == pytest.approx(1)
        assert -1e-12 <= load.entropy_share <= 1 + 1e-12
        assert -1e-12 <= load.max_violation <= E - 1 + 1e-12
        assert load.dropped_share == 0
        assert len(load.dead) == counts.count(0)

    @pytest.mark.parametrize("counts", [[5], [3, 3, 3]])
    def test_one_expert_and_equal_shares_are_balanced(self, counts):
        load = load_from_counts(counts)
        assert load.max_violation == 0
        assert load.dead == ()
        assert load.entropy == pytest.approx(math.log(len(counts)))
        assert load.entropy_share == pytest.approx(1)

    @pytest.mark.parametrize("experts", [1, 3])
    @pytest.mark.parametrize("experts_choose", [True, False])
    def test_of_nothing_there_are_no_figures_and_no_praise(self, experts, experts_choose):
        load = load_from_counts([0] * experts, experts_choose=experts_choose)
        figures = [*load.relative, load.entropy, load.entropy_share, load.max_violation, load.dropped_share]
        assert np.isnan(figures).all()
        assert load.dead == ()

    @pytest.mark.parametrize("kept", [[0, 0, 0, 0], [2, 2, 2, 0], [11, 4, 2, 0]])
    def test_capacity_flatters_no_router(self, kept):
        free, cut = load_from_counts([11, 4, 2, 0]), load_from_counts(kept, [11, 4, 2, 0])
        np.testing.assert_array_equal(cut.relative, free.relative)
        for name in ("entropy", "entropy_share", "max_violation", "dead"):
            assert getattr(cut, name) == getattr(free, name)
        assert cut.dropped_share == pytest.approx(1 - sum(kept) / 17)
        assert free.max_violation == pytest.approx(11 * 4 / 17 - 1)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_experts_that_choose_are_as_busy_as_they_chose_to_be(self, seed):
        load = load_of(router(seed, kind="expert choice", capacity_factor=0.4).route(normal(21, 16, seed=seed)))
        assert (load.wanted > load.load).any()
        assert load.max_violation == 0
        assert load.entropy_share == pytest.approx(1)

    def test_one_expert_that_does_everything(self):
        load = load_from_counts([0, 7, 0])
        assert load.max_violation == 2
        assert load.entropy == load.entropy_share == 0
        assert not math.copysign(1, load.entropy) < 0

    @pytest.mark.parametrize(
        ("counts", "wanted"), [([], None), ([1, -1], None), ([3], [2]), ([1, 2], [3]), ([[1]], None)]
    )
    def test_refuses_what_is_no_load(self, counts, wanted):
        with pytest.raises(InputError, match="give one count"):
            load_from_counts(counts, wanted)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_of_a_routing(self, seed):
        layer, x = router(seed, top_k=2, capacity_factor=0.75), normal(4, 16, 16, seed=seed)
        padding = torch.arange(16)[None] >= torch.tensor([16, 9, 4, 0])[:, None]
        routing = layer.route(x, padding)
        load = load_of(routing)
        probs, indices = layer(x)
        np.testing.assert_array_equal(load.wanted, np.bincount(indices[~padding].flatten(), minlength=4))
        np.testing.assert_array_equal(load.load, np.minimum(load.wanted, int(0.75 * 29 * 2 / 4)))
        np.testing.assert_allclose(load.importance, probs[~padding].detach().sum(0), rtol=1e-5)
        assert load.num_tokens == 29
        assert load.dropped_share == pytest.approx(len(routing.dropped) / 58)


def loss_of(layer, x, recomputed=None):
    def gates(x):
        return layer.route(x).dense_gates().square().sum(-1) * x.sum(-1).flatten()

    return (gates(x) if recomputed is None else checkpoint(gates, x, use_reentrant=recomputed)).sum()


class TestSelectionBias:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_first_nudge_is_one_step_against_the_load(self, seed):
        layer, x = router(seed, bias_rate=0.01), normal(3, 11, 16, seed=seed)
        counts = layer.route(x).counts.double()
        loss_of(layer, x).backward()
        expected = 0.01 * (counts.mean() - counts).sign().float()
        torch.testing.assert_close(layer.selection_bias, expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("seed", SEEDS)
    def test_checkpointing_changes_neither_the_nudges_nor_the_gradients(self, seed, reentrant):
        plain = router(seed, d_model=8, bias_rate=0.5, top_k=2)
        checkpointed = copy.deepcopy(plain)
        for step in range(6):
            first, second = (normal(2, 9, 8, seed=100 * seed + 2 * step + i).requires_grad_() for i in range(2))
            for layer, recomputed in ((plain, None), (checkpointed, reentrant)):
                layer.zero_grad()
                (loss_of(layer, first, recomputed) + loss_of(layer, second, recomputed)).backward()
            torch.testing.assert_close(checkpointed.weight.grad, plain.weight.grad)
            assert torch.equal(checkpointed.selection_bias, plain.selection_bias)
        assert plain.selection_bias.any()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_forward_passes_whose_backward_passes_follow_later_are_computed_again_as_they_were(self, reentrant):
        plain = router(1, d_model=8, bias_rate=5.0)
        checkpointed = copy.deepcopy(plain)
        inputs = [normal(1, 9, 8, seed=seed).requires_grad_() for seed in range(3)]
        for layer, recomputed in ((plain, None), (checkpointed, reentrant)):
            for loss in [loss_of(layer, x, recomputed) for x in inputs]:
                loss.backward()
        torch.testing.assert_close(checkpointed.weight.grad, plain.weight.grad)
        assert torch.equal(checkpointed.selection_bias, plain.selection_bias)

    def test_several_forward_passes_of_one_backward_pass_count_together(self):
        layer = router(d_model=2, num_experts=2, bias_rate=0.1)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2))
        (loss_of(layer, torch.tensor([[1.0, 0.0]])) + loss_of(layer, torch.tensor([[0.0, 1.0]]))).backward()
        assert torch.equal(layer.selection_bias, torch.zeros(2))
        loss_of(layer, torch.tensor([[1.0, 0.0]])).backward()
        torch.testing.assert_close(layer.selection_bias, torch.tensor([-0.1, 0.1]))

    def test_only_training_with_a_gradient_nudges(self):
        layer, x = router(bias_rate=0.1), normal(2, 9, 16)
        layer.route(x)
        with torch.no_grad():
            layer.route(x)
        layer.eval()
        loss_of(layer, x).backward()
        layer.train()
        layer.weight.requires_grad_(False)
        layer.route(x)
        loss_of(router(bias_rate=0.0), x).backward()
        assert torch.equal(layer.selection_bias, torch.zeros(4))

    def test_two_backward_passes_through_one_forward_pass_are_two_counts_of_one_nudge(self):
        layer, x = router(bias_rate=0.1), normal(2, 9, 16)
        loss = loss_of(layer, x)
        loss.backward(retain_graph=True)
        once = layer.selection_bias.clone()
        loss.backward()
        torch.testing.assert_close(layer.selection_bias, 2.2 * once)

    def test_steps_grow_while_the_sign_stays_and_are_halved_when_it_turns(self):
        bias = SelectionBias(2, 0.1)
        seen = []
        for load in ([3, 1], [3, 1], [1, 3], [2, 2], [1, 3], [3, 1]):
            gates = torch.ones(1, requires_grad=True)
            bias.watch(gates, lambda load=load: torch.tensor(load, dtype=torch.float32)).backward()
            bias.settle()
            seen.append(bias.values[1].item())
        steps = [0.1, 0.12, -0.06, 0.0, -0.072, 0.036]
        np.testing.assert_allclose(seen, np.cumsum(steps), rtol=1e-5)

    def test_fixed_steps_are_the_rate(self):
        bias = SelectionBias(3, 0.1, "fixed")
        for load in ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 4.0, 2.0]):
            bias.watch(torch.ones(1, requires_grad=True), lambda load=load: torch.tensor(load)).backward()
            bias.settle()
        torch.testing.assert_close(bias.values, torch.tensor([-0.1, 0.1, 0.0]))
        with pytest.raises(InputError, match="step of the bias is 'slow': choose adaptive or fixed"):
            router(bias_step="slow")

    def test_steps_stay_between_a_hundredth_and_a_thousand_times_the_rate(self):
        bias = SelectionBias(2, 0.01)
        for turning, bound in ((False, 10.0), (True, 1e-4)):
            for step in range(80):
                load = torch.tensor([3.0, 1.0] if not (turning and step % 2) else [1.0, 3.0])
                bias.watch(torch.ones(1, requires_grad=True), lambda load=load: load).backward()
                bias.settle()
            torch.testing.assert_close(bias.nudges.abs(), torch.full((2,), bound), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy"])
    def test_balances_a_router_that_would_collapse_and_leaves_gates_alone(self, seed, kind):
        layer = router(seed, num_experts=8, top_k=2, bias_rate=0.01, kind=kind)
        with torch.no_grad():
            layer.weight[0] += 1.0
        offset = torch.ones(16)
        for step in range(250):
            loss_of(layer, normal(512, 16, seed=step) + offset).backward()
        x = normal(4096, 16, seed=10_000 + seed) + offset
        layer.eval()
        assert load_of(layer.route(x)).max_violation < 0.15
        routing = layer.route(x)
        scores = layer.logits(x).sigmoid() if kind == "sigmoid" else layer.logits(x).softmax(-1)
        chosen = scores.gather(1, routing.indices)
        expected = torch.zeros_like(scores).scatter(1, routing.indices, chosen / chosen.sum(1, keepdim=True))
        torch.testing.assert_close(routing.dense_gates(), expected)

    def test_state_copies_and_dtypes_keep_it_to_the_bit(self):
        layer, x = router(bias_rate=1e-4), normal(5, 7, 16)
        loss_of(layer, x).backward()
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        kept = layer.selection_bias.clone()
        assert kept.abs().max() > 0
        assert set(state) == {"weight", "balancer.values", "balancer.nudges"}
        other = router(7, bias_rate=1e-4)
        other.load_state_dict(state)
        for twin in (other, copy.deepcopy(layer), copy.deepcopy(layer).half().bfloat16().float()):
            assert torch.equal(twin.selection_bias, kept)
            assert twin.selection_bias.dtype == torch.float32
        loss_of(layer, x).backward()  # what waits is part of the copy
        torch.testing.assert_close(copy.deepcopy(layer).selection_bias, 2.2 * kept)
        loss_of(other, x).backward()
        assert torch.equal(other.state_dict()["balancer.values"], layer.selection_bias)

    def test_changing_the_mode_settles_it(self):
        layer = router(bias_rate=0.1)
        loss_of(layer, normal(5, 7, 16)).backward()
        layer.eval()
        assert layer.balancer.values.abs().max() > 0

    @pytest.mark.parametrize("rate", [-1.0, math.inf, math.nan])
    def test_refuses_what_is_no_rate(self, rate):
        with pytest.raises(InputError, match="The bias rate is"):
            router(bias_rate=rate)

    def test_prints_its_rate(self):
        assert "4, rate=0.1" in repr(router(bias_rate=0.1))

    @pytest.mark.parametrize("seed", SEEDS)
    def test_texts_count_once_for_what_most_of_their_tokens_chose(self, seed):
        layer, x = router(seed, d_model=2, num_experts=2, bias_rate=0.1, balance="texts"), None
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2))
        first, second = torch.eye(2)
        x = torch.stack([torch.stack([first, first, second]), torch.stack([second, second, second])])  # 2 to 4 tokens
        loss_of(layer, x).backward()
        assert torch.equal(layer.selection_bias, torch.zeros(2))
        loss_of(layer, x[:1]).backward()
        torch.testing.assert_close(layer.selection_bias, torch.tensor([-0.1, 0.1]))

    def test_padding_and_empty_texts_do_not_vote(self):
        layer = router(d_model=2, num_experts=2, bias_rate=0.1, balance="texts")
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2))
        x = torch.eye(2)[torch.tensor([[0, 0, 1], [0, 0, 0]])]
        padding = torch.tensor([[True, True, False], [True, True, True]])
        (layer.route(x, padding).gates.sum()).backward()
        torch.testing.assert_close(layer.selection_bias, torch.tensor([0.1, -0.1]))


class TestVotes:
    """Of texts, counted one by one in plain Python."""

    def test_what_most_tokens_chose_gets_the_vote_and_the_lowest_number_if_several_did(self):
        texts = [[3, 3, 1], [2, 1, 2], [0, 3, 3], [3, 2, 1], [2, 2, 3]]
        assert count_votes(torch.tensor(texts)[:, :, None], 4).tolist() == [0, 1, 2, 2]
        assert count_votes(torch.tensor([[[2], [1]], [[1], [2]], [[3], [2]]]), 4).tolist() == [0, 2, 1, 0]

    def test_a_text_has_as_many_votes_as_a_token_has_experts_but_none_for_what_it_does_not_use(self):
        three_used = [[3, 1], [3, 2], [1, 3]]
        two_used = [[2, 0], [0, 2], [2, 0]]
        assert count_votes(torch.tensor([three_used]), 4).tolist() == [0, 1, 0, 1]
        assert count_votes(torch.tensor([three_used, two_used]), 4).tolist() == [1, 1, 1, 1]
        assert count_votes(torch.tensor([[[2], [2]]]), 3).tolist() == [0, 0, 1]
        assert count_votes(torch.tensor([[[1, 2], [-1, -1]]]), 3).tolist() == [0, 1, 1]

    def test_padding_is_not_counted_however_much_of_it_there_is(self):
        texts = [[-1, -1, -1, 2], [-1, -1, -1, -1], [1, -1, -1, 1]]
        assert count_votes(torch.tensor(texts)[:, :, None], 3).tolist() == [0, 1, 1]

    @pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 2), (0, 0, 1)])
    def test_nothing_votes_for_nobody(self, shape):
        assert count_votes(torch.zeros(shape, dtype=torch.int64), 3).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("top_k", [1, 2, 3])
    def test_agrees_with_a_plain_count(self, seed, top_k):
        scores = normal(6, 5, 4, seed=seed)
        chosen = scores.topk(top_k).indices
        chosen[normal(6, 5, seed=seed + 50) > 0.8] = -1
        expected = [0] * 4
        for text in chosen.flatten(1).tolist():
            ranked = sorted(set(text) - {-1}, key=lambda expert: (-text.count(expert), expert))
            for expert in ranked[:top_k]:
                expected[expert] += 1
        assert count_votes(chosen, 4).tolist() == expected
