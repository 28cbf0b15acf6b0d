"""The paged optimizer, and the model that shows what it is for."""

import gc
import logging

import pytest
import torch
from torch import nn

from engine import PagedAdamW, create_large_test_model, optim, simulate_training_step
from engine.errors import DoesNotFitError
from engine.optim import large_test_shape

MIB = 2**20


class TestOnTheCPU:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("grouped", [False, True])
    def test_is_adamw_step_by_step(self, seed, grouped):
        models, losses = [], []
        for make in (torch.optim.AdamW, PagedAdamW):
            torch.manual_seed(seed)
            model = nn.Linear(6, 6)
            params = [{"params": iter([model.weight]), "weight_decay": 0.5}, {"params": model.bias}]
            optimizer = make(params if grouped else model.parameters(), lr=0.01)
            x = torch.randn(4, 6)
            for _ in range(5):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
            models.append(model)
            losses.append(loss.item())
        assert losses[0] == losses[1]
        for plain, paged in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(plain, paged)

    def test_says_once_that_it_is_plain(self, caplog):
        optim._say_plain.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                PagedAdamW(nn.Linear(2, 2).parameters())
        assert len([record for record in caplog.records if "plain AdamW" in record.message]) == 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the model goes to CUDA")
    @pytest.mark.parametrize("large_batch", [False, True])
    @pytest.mark.parametrize("budget", [{}, {"budget": 24 * 10**9}, {"budget": 1}])
    def test_steps_train_the_test_model_whatever_the_budget(self, large_batch, budget):
        torch.manual_seed(0)
        model = create_large_test_model(**budget)
        assert (model.budget, model.limit) == (0, "")
        optimizer = PagedAdamW(model.parameters(), lr=1e-2)
        losses = [simulate_training_step(model, optimizer, large_batch) for _ in range(20)]
        assert losses[-1] < 0.5 * losses[0]

    def test_a_failed_step_leaves_neither_gradients_nor_state_nor_its_frames(self):
        """Running out of memory is played here: the second step's update raises what CUDA's allocator does."""
        model = nn.Sequential(nn.Linear(4, 4, bias=False))
        optimizer = torch.optim.AdamW(model.parameters())
        simulate_training_step(model, optimizer)
        assert optimizer.state
        ordinary = optimizer.step

        def run_out():
            ordinary()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        optimizer.step = run_out
        with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory") as raised:
            simulate_training_step(model, optimizer)
        assert not optimizer.state
        assert all(parameter.grad is None for parameter in model.parameters())
        assert raised.value.__context__ is None  # whose traceback would keep the step's tensors alive
        assert "_step" not in [entry.name for entry in raised.traceback]


class TestTheShapeOfTheTestModel:
    @pytest.mark.parametrize(
        "budgets", [range(512 * MIB, 1024 * MIB, MIB), range(2**30, 80 * 2**30, 97 * MIB), [8 * 10**9, 141 * 10**9]]
    )
    def test_the_state_of_plain_adamw_never_fits_and_weights_and_gradients_do(self, budgets):
        for budget in budgets:
            width, layers = large_test_shape(budget)
            weights = 4 * layers * width**2
            assert 4 * weights > 1.1 * budget
            assert 2 * weights <= 0.6 * budget

    @pytest.mark.parametrize("budget", [512 * MIB, 600 * MIB, 2**30, 3 * 2**30, 24 * 10**9, 141 * 10**9])
    def test_a_large_batch_has_room_beside_weights_and_gradients(self, budget):
        """Every layer keeps its input; two gradients of such, cuBLAS' workspaces and the allocator's rounding come."""
        width, layers = large_test_shape(budget)
        weights = 4 * layers * width**2
        activations = 4 * optim._LARGE_BATCH * width * (layers + 4)
        assert 2 * weights + activations + 64 * MIB + 60 * MIB < budget

    def test_every_matrix_is_large_enough_to_be_paged(self):
        assert large_test_shape(512 * MIB)[0] ** 2 > 100_000

    @pytest.mark.parametrize("budget", [-1, 0, 56 * MIB, 512 * MIB - 1])
    def test_too_little_is_refused_with_what_to_do(self, budget):
        with pytest.raises(DoesNotFitError, match=r"needs 512 MiB, and the budget is .*: give more"):
            large_test_shape(budget)
        with pytest.raises(DoesNotFitError, match=r"half of what cuda:0 has free is .*: end what else"):
            large_test_shape(budget, "half of what cuda:0 has free")


@pytest.mark.gpu
class TestOnCUDA:
    @pytest.mark.parametrize("large_batch", [False, True])
    @pytest.mark.parametrize("budget", [512 * MIB, 640 * MIB, 3 * 2**30, 8 * 10**9])
    def test_plain_adamw_runs_out_where_paged_completes(self, large_batch, budget):
        before = torch.cuda.get_per_process_memory_fraction()
        model = create_large_test_model(budget)
        assert (model.budget, model.limit) == (budget, "the budget")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            simulate_training_step(model, torch.optim.AdamW(model.parameters()), large_batch)
        paged = PagedAdamW(model.parameters())
        losses = [simulate_training_step(model, paged, large_batch) for _ in range(3)]
        assert all(loss == pytest.approx(loss) for loss in losses)  # none is NaN
        del model, paged
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(before)

    def test_a_budget_that_the_card_does_not_have_becomes_half_of_what_is_free(self):
        torch.cuda.empty_cache()
        half = torch.cuda.mem_get_info()[0] // 2
        model = create_large_test_model(10**15)
        assert "has free" in model.limit
        assert model.budget == pytest.approx(half, rel=0.05)
        assert sum(parameter.nbytes for parameter in model.parameters()) <= 0.3 * model.budget
        del model
        gc.collect()
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_paged_adamw_is_adamw(self, seed, weight_decay):
        """On equal gradients: a model's would differ where its weights do in the last bit, and AdamW enlarges that."""
        torch.manual_seed(seed)
        start, gradients = torch.randn(512, 512), torch.randn(5, 512, 512)  # large enough to be paged
        lr, weights = 1e-2, []
        for make in (torch.optim.AdamW, PagedAdamW):
            weight = nn.Parameter(start.cuda())
            optimizer = make([weight], lr=lr, weight_decay=weight_decay)
            for gradient in gradients:
                weight.grad = gradient.cuda()
                optimizer.step()
            weights.append(weight.detach())
        assert (weights[0] - start.cuda()).abs().mean() > lr
        decayed_later = len(gradients) * lr**2 * weight_decay * 4  # of an update of some lr, rarely of more than 4 lr
        torch.testing.assert_close(weights[0], weights[1], atol=1e-3 * lr + decayed_later, rtol=1e-6)
