"""The trainer: the arithmetic of a step, runs that go on as if they had never stopped, errors that lose nothing."""

import copy
import functools
import math
from itertools import chain

import pytest
import torch
from bitsandbytes import optim
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import engine.trainer
from engine import ExpertRouter, PagedAdamW, inject_lora, inject_moe_lora, quantize_model_4bit, training_state
from engine.data import IGNORED, Batch, TokenBlocks, create_test_dataset
from engine.errors import InputError
from engine.finetuning.methods import make_trainer, prepare
from engine.model import Decoder, ModelConfig, Parts, create_test_transformer
from engine.moe.feed_forward import MoEFeedForward
from engine.quantization.production import quantize_model_8bit
from engine.trainer import DivergedError, Trainer, TrainerOptions, evaluate

SEEDS = range(3)
VOCAB, LENGTH = 30, 10


def decoder(seed=0, parts=None, **changes):
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "max_seq_len": 12}
    return Decoder(ModelConfig(**sizes | changes), parts)


def blocks(count=24, seed=0, length=LENGTH):
    return TokenBlocks(torch.randint(VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(seed)))


class PartlyScored:
    """Samples that are random anew at every step, and of which very different parts are scored."""

    block_size = LENGTH

    def __len__(self):
        return 20

    def batch(self, indices, generator=None):
        ids = torch.randint(VOCAB, (len(indices), LENGTH + 1), generator=generator)
        unscored = torch.arange(LENGTH) < torch.randint(LENGTH, (len(indices), 1), generator=generator)
        return Batch(ids[:, :-1], ids[:, 1:].masked_fill(unscored, IGNORED))


def trainer(model=None, dataset=None, **options):
    """A small run; keywords that are not options go to the trainer itself."""
    own = {name: options.pop(name) for name in ("on_step", "cancelled") if name in options}
    return Trainer(
        decoder() if model is None else model,
        blocks() if dataset is None else dataset,
        TrainerOptions(**{"batch_size": 4, "learning_rate": 1e-2} | options),
        held_out=blocks(6, seed=1),
        **own,
    )


def adapted(seed, quant_type="nf4"):
    """4-bit weights that stay as they are, with adapters that learn beside them."""
    model = quantize_model_4bit(decoder(seed, d_model=32, dropout=0.3), quant_type)
    inject_lora(model, 2, 4.0, ("q_proj", "up_proj"))
    return model


def mix(config):
    """Experts that a router keeps busy by a bias that it moves."""
    router = ExpertRouter(config.d_model, 4, 2, bias_rate=0.01)
    return MoEFeedForward(config.d_model, config.ffn_dim, 4, 2, router=router)


def mixed(seed):
    return decoder(seed, Parts(feed_forward=mix), dropout=0.3)


def mixed_and_quantized(seed):
    model = quantize_model_4bit(decoder(seed, Parts(feed_forward=mix), d_model=32))
    inject_lora(model, 2, 4.0, ("q_proj",))
    return model


def tuned(seed):
    """A mixture of adapters beside frozen weights."""
    model = decoder(seed)
    torch.manual_seed(seed)
    inject_moe_lora(model, 4, 2, 2, ("up_proj",))
    return model


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop:
    """Says that the run is cancelled once it was asked `after` times."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return self.left < 0


class TestLearningRate:
    @pytest.mark.parametrize(
        ("warmup", "final_rate", "total", "expected"),
        [
            (0.2, 0.1, 10, [0.5, 1.0, 1.0, 0.9657, 0.8682, 0.7222, 0.55, 0.3778, 0.2318, 0.1343]),
            (0.0, 0.0, 4, [1.0, 0.8536, 0.5, 0.1464]),
            (1.0, 0.3, 4, [0.25, 0.5, 0.75, 1.0]),
            (0.0, 1.0, 3, [1.0, 1.0, 1.0]),
            (0.05, 0.1, 1, [1.0]),
        ],
    )
    def test_rises_in_a_line_and_falls_along_a_cosine(self, warmup, final_rate, total, expected):
        """Values worked out by hand from min(s / w, f + (1 − f)(1 + cos π·(s − w)/(S − w)) / 2)."""
        rates = []
        run = trainer(
            learning_rate=1e-3,
            warmup=warmup,
            final_rate=final_rate,
            on_step=lambda step: rates.append(step.learning_rate),
        )
        run.train_steps(total)
        assert [rate / 1e-3 for rate in rates] == pytest.approx(expected, abs=1e-4)

    @given(warmup=st.floats(0, 1), final_rate=st.floats(0, 1), total=st.integers(1, 3000))
    @settings(max_examples=50, derandomize=True, deadline=None)
    def test_has_one_peak_and_never_leaves_its_bounds(self, warmup, final_rate, total):
        run = trainer(warmup=warmup, final_rate=final_rate, learning_rate=1.0)
        run.total_steps = total
        rates = [run.learning_rate(step) for step in range(total)]
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert max(rates) == pytest.approx(1.0)
        assert rates[-1] >= min(final_rate, 1 / total) - 1e-9


def reference_steps(model, batches, options, rates):
    """AdamW with clipping, written out (Loshchilov and Hutter 2019, algorithm 2): losses and gradient norms."""
    losses, norms, moments = [], [], {}
    for number, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        logits = model(batch.inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)
        gradients = dict(zip(weights(model), torch.autograd.grad(loss, list(model.parameters())), strict=True))
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
        for name, parameter in model.named_parameters():
            gradient = gradients[name] * min(1.0, options.max_grad_norm / norm)
            first, second = moments.get(name, (torch.zeros_like(gradient), torch.zeros_like(gradient)))
            first = options.beta1 * first + (1 - options.beta1) * gradient
            second = options.beta2 * second + (1 - options.beta2) * gradient**2
            moments[name] = first, second
            step = (first / (1 - options.beta1**number)) / ((second / (1 - options.beta2**number)).sqrt() + 1e-8)
            decay = options.weight_decay if parameter.dim() > 1 else 0.0
            parameter.data -= rate * (step + decay * parameter.data)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


class TestSteps:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("max_grad_norm", [0.1, 100.0])
    @pytest.mark.parametrize("dataset", [None, PartlyScored()])
    def test_are_adamw_written_out(self, seed, max_grad_norm, dataset):
        reports, seen = [], []
        model = decoder(seed)
        theirs = copy.deepcopy(model)
        run = trainer(model, dataset, max_grad_norm=max_grad_norm, weight_decay=0.5, seed=seed, on_step=reports.append)
        batch = run.dataset.batch
        run.dataset = copy.copy(run.dataset)
        run.dataset.batch = lambda *given: seen.append(batch(*given)) or seen[-1]
        losses = run.train_steps(4)
        rates = [report.learning_rate for report in reports]
        expected_losses, expected_norms = reference_steps(theirs, seen, run.options, rates)
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert [report.loss for report in reports] == losses
        assert [report.grad_norm for report in reports] == pytest.approx(expected_norms, rel=1e-4)
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, theirs.get_parameter(name), atol=2e-6, rtol=1e-4)

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("dataset", [None, PartlyScored()])
    def test_accumulated_batches_equal_the_big_one(self, seed, dataset):
        """Also where one batch has more scored tokens than another: the mean is over tokens, not over batches."""
        results = []
        for accumulate in (1, 2, 4):
            model, reports = decoder(seed), []
            run = trainer(model, dataset, batch_size=8 // accumulate, accumulate=accumulate, on_step=reports.append)
            losses = run.train_steps(3)
            results.append((losses, [report.grad_norm for report in reports], weights(model)))
        for losses, norms, after in results[1:]:
            assert losses == pytest.approx(results[0][0], rel=1e-5)
            assert norms == pytest.approx(results[0][1], rel=1e-4)
            for name, weight in after.items():
                torch.testing.assert_close(weight, results[0][2][name], atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_gradient_checkpointing_computes_twice_and_changes_nothing(self, seed):
        results = []
        for checkpointing in (False, True):
            model, passes = decoder(seed, dropout=0.3), []
            model.layers[0].mlp.register_forward_hook(lambda *given, passes=passes: passes.append(1))
            losses = trainer(model, gradient_checkpointing=checkpointing, seed=seed).train_steps(4)
            results.append((losses, weights(model)))
            assert len(passes) == (8 if checkpointing else 4)
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
        for name, weight in results[0][1].items():
            torch.testing.assert_close(weight, results[1][1][name], atol=1e-6, rtol=1e-5)

    def test_compiled_steps_are_the_same_steps(self, monkeypatch):
        """Captured as a graph and run as it is, which needs no compiler on the machine."""
        captured = []

        def backend(graph, inputs):
            captured.append(graph)
            return graph.forward

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        plain, compiled = decoder(), decoder()
        expected = trainer(plain).train_steps(3)
        assert not captured
        assert trainer(compiled, compile=True).train_steps(3) == pytest.approx(expected, rel=1e-5)
        assert captured
        assert plain.state_dict().keys() == compiled.state_dict().keys()

    @pytest.mark.parametrize("seed", SEEDS)
    def test_bfloat16_stays_close_and_keeps_the_weights_in_float32(self, seed):
        exact, rough = decoder(seed), decoder(seed)
        expected = trainer(exact).train_steps(5)
        losses = trainer(rough, precision="bfloat16").train_steps(5)
        assert losses != expected
        assert losses == pytest.approx(expected, rel=0.02)
        assert {weight.dtype for weight in weights(rough).values()} == {torch.float32}

    @pytest.mark.parametrize("seed", SEEDS)
    def test_what_is_held_out_is_read_in_the_precision_that_is_trained_in(self, seed):
        exact, rough = (trainer(decoder(seed), precision=precision).evaluate() for precision in ("float32", "bfloat16"))
        assert exact != rough
        assert rough == pytest.approx(exact, rel=0.02)

    def test_a_report_says_what_the_step_cost(self):
        reports = []
        trainer(on_step=reports.append).train_steps(3)
        assert [(report.step, report.total) for report in reports] == [(1, 3), (2, 3), (3, 3)]
        assert all(report.tokens_per_second > 0 for report in reports)
        assert all(report.memory_bytes > 10_000_000 for report in reports)

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_tokens_are_counted_over_all_of_a_step_and_without_what_fills_up(self, monkeypatch, accumulate):
        ids = blocks(12).ids
        lengths = torch.arange(12) % 5 + 4

        class Filled(TokenBlocks):
            def batch(self, indices, generator=None):
                inputs, targets = super().batch(indices)
                place = torch.arange(LENGTH)
                unscored = (place >= lengths[indices][:, None]) | (place < 2)
                return Batch(inputs, targets.masked_fill(unscored, IGNORED))

        clock = iter(range(100))
        monkeypatch.setattr(engine.trainer.time, "perf_counter", lambda: float(next(clock)))  # a step is a second
        reports = []
        run = trainer(dataset=Filled(ids), batch_size=12 // accumulate, accumulate=accumulate, on_step=reports.append)
        run.train_steps(2)
        assert [report.tokens_per_second for report in reports] == [float(lengths.sum())] * 2

    def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(self):
        """24 samples, 5 a step: four steps an epoch, and the four samples that fill no step are others each time."""
        shown = []

        class Watched(TokenBlocks):
            def batch(self, indices, generator=None):
                shown.append(indices.tolist())
                return super().batch(indices)

        trainer(dataset=Watched(blocks().ids), batch_size=5).train(3)
        assert [len(chosen) for chosen in shown] == [5] * 12
        epochs = [list(chain.from_iterable(shown[start : start + 4])) for start in (0, 4, 8)]
        assert all(len(set(epoch)) == 20 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert len({frozenset(epoch) for epoch in epochs}) > 1

    def test_fewer_samples_than_a_step_takes_are_a_step(self):
        shown = []
        few = blocks(3)
        few.batch = lambda indices, generator=None: shown.append(indices) or TokenBlocks.batch(few, indices)
        assert len(trainer(dataset=few, batch_size=8).train(2)) == 2
        assert [sorted(chosen.tolist()) for chosen in shown] == [[0, 1, 2]] * 2

    def test_equal_seeds_give_the_same_run_and_others_do_not(self):
        runs = [trainer(decoder(dropout=0.2), seed=seed).train_steps(4) for seed in (0, 0, 1)]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    def test_seeds_steps_and_purposes_draw_differently(self):
        """PyTorch's generator forgets all but the lowest 32 bits of what it is seeded with."""
        orders, draws = set(), set()

        class Watched(TokenBlocks):
            def batch(self, indices, generator=None):
                orders.add(tuple(indices.tolist()))
                draws.add(tuple(torch.randperm(20, generator=generator).tolist()))
                return super().batch(indices)

        for seed in (0, 1, 7, 2**30 - 1):
            trainer(dataset=Watched(blocks(20).ids), batch_size=20, seed=seed).train_steps(3)
        assert len(orders) == 12
        assert len(draws) == 12
        assert not orders & draws

    def test_samples_follow_from_the_seed_whatever_else_draws_numbers(self):
        expected = trainer(dataset=PartlyScored()).train_steps(4)
        assert trainer(dataset=PartlyScored(), on_step=lambda report: torch.rand(3)).train_steps(4) == expected

    @pytest.mark.parametrize("optimizer", ["AdamW", "paged AdamW"])
    @pytest.mark.parametrize("ended", [True, False])
    def test_a_new_run_starts_with_nothing_remembered(self, optimizer, ended):
        """It takes the steps of a new trainer on the same weights, whether the run before it ended or was cut off."""
        run = trainer(decoder(dropout=0.2), optimizer=optimizer, cancelled=None if ended else Stop(2))
        run.train_steps(4)
        run.cancelled, copied = None, copy.deepcopy(run.model)
        expected = trainer(copied, optimizer=optimizer).train_steps(4)
        assert run.train_steps(4) == expected
        assert same(weights(run.model), weights(copied))

    @pytest.mark.parametrize("training", [True, False])
    def test_every_module_s_mode_is_put_back(self, training):
        model = decoder(dropout=0.1).train(training)
        model.layers[1].train(not training)
        modes = [module.training for module in model.modules()]
        run = trainer(model)
        run.evaluate()
        assert [module.training for module in model.modules()] == modes
        run.train_steps(1)
        assert [module.training for module in model.modules()] == modes


class TestPagedOptimizer:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_takes_the_steps_of_the_plain_one_where_nothing_is_paged(self, seed):
        plain, paged = decoder(seed), decoder(seed)
        expected = trainer(plain, weight_decay=0.5, beta1=0.8, seed=seed).train_steps(5)
        run = trainer(paged, weight_decay=0.5, beta1=0.8, seed=seed, optimizer="paged AdamW")
        assert run.train_steps(5) == expected
        assert same(weights(paged), weights(plain))

    @pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
    @pytest.mark.parametrize(("begins", "ends"), [("paged", "paged"), ("plain", "paged"), ("paged", "plain")])
    def test_a_checkpoint_of_bitsandbytes_goes_on_with_torch_s_and_the_other_way_round(
        self, monkeypatch, tmp_path, begins, ends
    ):
        """On the CPU bitsandbytes keeps the same numbers under the same names, though it does not page them."""
        makers = {"paged": optim.PagedAdamW, "plain": PagedAdamW}

        def run(which, seed, cancelled=None):
            monkeypatch.setattr(engine.trainer, "PagedAdamW", makers[which])
            return trainer(decoder(seed), optimizer="paged AdamW", weight_decay=0.5, cancelled=cancelled)

        whole = run("plain", 0)
        expected = whole.train_steps(8)
        first = run(begins, 0, Stop(3))
        begun = first.train_steps(8)
        first.save(tmp_path / "run.safetensors")
        second = run(ends, 7)
        second.load(tmp_path / "run.safetensors")
        kept = {"state1", "state2", "step"} if ends == "paged" else {"exp_avg", "exp_avg_sq", "step"}
        assert all(state.keys() == kept for state in second._optimizer.state.values())
        assert begun + second.resume() == pytest.approx(expected, rel=1e-4)
        for name, weight in weights(second.model).items():
            moved = (weight - weights(decoder(0))[name]).norm()
            assert (weight - weights(whole.model)[name]).norm() < 0.01 * moved

    def test_a_checkpoint_says_which_one_it_was(self, tmp_path):
        run = trainer(optimizer="paged AdamW")
        run.train_steps(1)
        run.save(tmp_path / "run.safetensors")
        other = trainer()
        other.load(tmp_path / "run.safetensors")
        assert other.options.optimizer == "paged AdamW"


class TestFrozenWeights:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("optimizer", ["AdamW", "paged AdamW"])
    def test_stay_as_they_are_whatever_gradient_was_left_in_them(self, seed, optimizer):
        """A gradient from before they were frozen would decay them, and shorten the others' if it were clipped."""
        results = []
        for left in (0.0, 1e6):
            model = decoder(seed)
            inject_lora(model, 2, 4.0, ("q_proj", "up_proj"))
            frozen = {name: value for name, value in weights(model).items() if "adapter" not in name}
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, left)
            losses = trainer(model, seed=seed, optimizer=optimizer).train_steps(3)
            after = weights(model)
            assert all(torch.equal(after[name], value) for name, value in frozen.items())
            assert any(after[name].any() for name in after if name.endswith("adapter.B"))
            results.append((losses, after))
        assert results[0][0] == results[1][0]
        assert same(results[0][1], results[1][1])

    def test_that_are_all_there_is_can_be_evaluated_and_are_one_sentence_to_train(self):
        run = trainer(decoder().requires_grad_(False))
        assert run.evaluate() > 0
        with pytest.raises(InputError, match="Every weight of the model is frozen: give it adapters"):
            run.train_steps(1)


class TestEarlyStopping:
    """Held-out losses are given, so that it is known when it should stop and which weights are best."""

    def run(self, losses, patience, evaluate_every=2, monkeypatch=None, **given):
        run = trainer(evaluate_every=evaluate_every, patience=patience, **given)
        left = iter(losses)
        monkeypatch.setattr(run, "evaluate", lambda: next(left))
        return run

    @pytest.mark.parametrize(
        ("losses", "patience", "stops_after", "best"),
        [
            ([3.0, 2.0, 2.5, 2.4, 1.0], 2, 4, 2),
            ([3.0, 2.0, 2.0, 1.9, 9.0], 1, 3, 2),
            ([3.0, 2.0, 2.5, 1.9, 2.0], 2, None, 4),
            ([3.0, 1.0, 2.0, 3.0, 4.0], 9, None, 2),
            ([5.0, 4.0, 3.0, 2.0, 1.0], 1, None, 5),
            ([3.0, 4.0, 5.0, 6.0, 7.0], 3, 4, 1),
            ([math.nan, 4.0, math.nan, math.inf, 3.0], 2, 4, 2),
            ([5.0, 4.0, 3.0, 4.0, 5.0], 2, 5, 3),
        ],
    )
    def test_ends_the_run_with_the_weights_of_its_best_evaluation(
        self, monkeypatch, losses, patience, stops_after, best
    ):
        learned, reports, model = {}, [], decoder(dropout=0.2)
        run = self.run(losses, patience, monkeypatch=monkeypatch, model=model, on_step=reports.append)
        given = run.evaluate
        monkeypatch.setattr(run, "evaluate", lambda: learned.update({run.step: weights(model)}) or given())
        found = run.train_steps(10)
        stopped = stops_after is not None
        assert len(found) == len(reports) == (2 * stops_after if stopped else 10)
        assert run.stopped_early is stopped
        seen = losses[:stops_after]
        assert [step for step, _ in run.evaluations] == [2 * number for number in range(1, len(seen) + 1)]
        assert [loss for _, loss in run.evaluations] == pytest.approx(seen, nan_ok=True)
        told = [report.held_out_loss for report in reports]
        assert told[::2] == [None] * (len(told) // 2)
        assert told[1::2] == pytest.approx(seen, nan_ok=True)
        assert same(weights(model), learned[2 * best])
        assert run.resume() == []

    @pytest.mark.parametrize("patience", [None, 3])
    @pytest.mark.parametrize(("every", "steps"), [(4, 10), (4, 8), (20, 10), (1, 1)])
    def test_the_last_step_is_followed_by_an_evaluation_whatever_divides_the_steps(
        self, monkeypatch, every, steps, patience
    ):
        run = self.run([3.0, 2.0, 1.0], patience, every, monkeypatch)
        run.train_steps(steps)
        assert [step for step, _ in run.evaluations] == [*range(every, steps, every), steps]

    def test_the_tail_of_a_run_that_is_no_better_is_put_back(self, monkeypatch):
        learned = {}
        run = self.run([], 9, 4, monkeypatch)
        given = iter([3.0, 1.0, 2.0])
        monkeypatch.setattr(run, "evaluate", lambda: learned.update({run.step: weights(run.model)}) or next(given))
        run.train_steps(10)
        assert learned.keys() == {4, 8, 10}
        assert same(weights(run.model), learned[8])
        assert not run.stopped_early

    def test_a_cancelled_run_keeps_its_last_weights_and_goes_on_with_them(self, monkeypatch):
        expected = trainer(decoder(dropout=0.3)).train_steps(6)
        run = self.run([1.0, 2.0, 3.0], 9, monkeypatch=monkeypatch, model=decoder(dropout=0.3), cancelled=Stop(5))
        begun = run.train_steps(6)
        run.cancelled = None
        assert begun + run.resume() == expected

    @pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    @pytest.mark.parametrize("patience", [1, 9])
    def test_what_the_optimizer_remembers_of_other_weights_is_forgotten(self, monkeypatch, tmp_path, losses, patience):
        """Also in a file: a run that has ended is loaded with as little."""
        run = self.run(losses, patience, monkeypatch=monkeypatch)
        run.train_steps(6)
        assert not run._optimizer.state
        run.save(tmp_path / "run.safetensors")
        other = trainer(decoder(5))
        other.load(tmp_path / "run.safetensors")
        assert same(weights(other.model), weights(run.model))
        assert other.resume() == []

    def test_a_loss_that_is_never_a_number_stops_too_and_keeps_the_last_weights(self, monkeypatch):
        run = self.run([math.nan] * 5, 2, monkeypatch=monkeypatch)
        assert len(run.train_steps(10)) == 4
        assert all(weight.isfinite().all() for weight in weights(run.model).values())

    @pytest.mark.parametrize("seed", SEEDS)
    def test_what_a_model_learns_by_heart_stops_where_the_held_out_loss_was_lowest(self, seed):
        """Random tokens: what helps with those learned does not help with others."""
        options = {"learning_rate": 0.03, "warmup": 0.0, "seed": seed, "evaluate_every": 3}
        whole = trainer(decoder(seed), **options)
        whole.train_steps(60)
        run = trainer(decoder(seed), patience=3, **options)
        losses = run.train_steps(60)
        lowest = min(loss for _, loss in run.evaluations)
        assert run.stopped_early
        assert len(losses) < 60
        assert run.evaluations == whole.evaluations[: len(run.evaluations)]
        assert run.evaluate() == pytest.approx(lowest, rel=1e-6)
        assert min(loss for _, loss in run.evaluations[-3:]) >= lowest

    @pytest.mark.parametrize("mixture", [False, True])
    def test_evaluating_changes_no_step(self, mixture):
        results = []
        for every in (None, 1, 2):
            model = mixed(0) if mixture else decoder(dropout=0.3)
            losses = trainer(model, evaluate_every=every, accumulate=2).train_steps(6)
            results.append((losses, training_state.tensors_of(model)))
        for losses, after in results[1:]:
            assert losses == results[0][0]
            assert same(after, results[0][1])

    def test_epochs_are_averaged_over_the_steps_they_have(self, monkeypatch):
        """24 samples, 4 a step: nine steps are an epoch of six and a part of three."""
        steps = []
        run = self.run([1.0, 1.5, 1.5, 0.0], 2, 3, monkeypatch, on_step=lambda report: steps.append(report.loss))
        assert run.train(5) == pytest.approx([sum(steps[:6]) / 6, sum(steps[6:]) / 3])
        assert len(steps) == 9

    def test_a_new_run_starts_counting_anew(self, monkeypatch):
        run = self.run([1.0, 2.0, 3.0, 2.5], 1, monkeypatch=monkeypatch)
        assert len(run.train_steps(10)) == 4
        assert len(run.train_steps(4)) == 4
        assert [loss for _, loss in run.evaluations] == [3.0, 2.5]

    @pytest.mark.parametrize("after", [1, 2, 5, 7, 8])
    def test_an_interrupted_run_stops_where_the_whole_one_does(self, monkeypatch, tmp_path, after):
        losses = [3.0, 2.0, 2.5, 2.4, 1.0]
        whole = self.run(losses, 2, monkeypatch=monkeypatch, model=decoder(dropout=0.3))
        expected = whole.train_steps(10)
        given = {"model": decoder(dropout=0.3), "cancelled": Stop(after)}
        first = self.run(losses, 2, monkeypatch=monkeypatch, **given)
        begun = first.train_steps(10)
        first.save(tmp_path / "run.safetensors")
        second = trainer(decoder(9, dropout=0.3))
        second.load(tmp_path / "run.safetensors")
        left = iter(losses[after // 2 :])
        monkeypatch.setattr(second, "evaluate", lambda: next(left))
        assert begun + second.resume() == expected
        assert second.evaluations == whole.evaluations
        assert second.stopped_early
        assert same(weights(second.model), weights(whole.model))

    @pytest.mark.parametrize("spoil", ["all gone", "gone", "other shape", "no number"])
    def test_best_weights_that_cannot_be_are_a_damaged_checkpoint(self, monkeypatch, tmp_path, spoil):
        run = self.run([1.0], 2, monkeypatch=monkeypatch)
        run.train_steps(2)
        run.save(tmp_path / "run.safetensors")
        tensors, facts = training_state.read(tmp_path / "run.safetensors")
        value = tensors.pop("best.norm.weight")
        if spoil == "all gone":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("best.")}
        elif spoil != "gone":
            tensors["best.norm.weight"] = torch.zeros(3) if spoil == "other shape" else value + math.nan
        training_state.write(tmp_path / "run.safetensors", tensors, facts)
        other = trainer(decoder(4))
        before = weights(other.model)
        with pytest.raises(InputError, match="damaged or incomplete"):
            other.load(tmp_path / "run.safetensors")
        assert same(weights(other.model), before)
        assert other.evaluations == []

    def test_only_what_learns_is_kept(self, monkeypatch, tmp_path):
        model = decoder()
        inject_lora(model, 2, 4.0, ("q_proj",))
        run = self.run([1.0], 2, monkeypatch=monkeypatch, model=model)
        run.train_steps(2)
        run.save(tmp_path / "run.safetensors")
        tensors, _ = training_state.read(tmp_path / "run.safetensors")
        best = set(training_state.part(tensors, "best."))
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert best == learning | {name for name, _ in model.named_buffers()}


class TestContract:
    def test_one_loss_an_epoch_and_the_evaluation_falls_below_eight_tenths(self):
        torch.manual_seed(0)
        run = Trainer(create_test_transformer(1, 32), create_test_dataset(1000))
        before = run.evaluate()
        losses = run.train(epochs=5)
        assert before == pytest.approx(math.log(1000), rel=0.05)
        assert len(losses) == 5
        assert losses == sorted(losses, reverse=True)
        assert run.evaluate() < 0.8 * before

    def test_what_is_evaluated_was_not_learned(self):
        dataset = create_test_dataset(50)
        run = Trainer(create_test_transformer(1, 16), dataset)
        assert torch.equal(torch.cat([run.dataset.ids, run.held_out.ids]), dataset.ids)
        assert len(run.held_out) == 5

    @pytest.mark.parametrize("batch_size", [1, 4, 100])
    def test_an_evaluation_is_the_mean_over_all_tokens(self, batch_size):
        model, held_out = decoder(dropout=0.5), blocks(7, seed=3)
        expected = F.cross_entropy(
            model.eval()(held_out.ids[:, :-1]).flatten(0, 1), held_out.ids[:, 1:].flatten()
        ).item()
        assert evaluate(model.train(), held_out, batch_size) == pytest.approx(expected, rel=1e-6)
        assert model.training


class TestCancelling:
    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_keeps_what_was_learned(self, after):
        cancelled, whole = decoder(), decoder()
        start, states = weights(whole), []
        trainer(whole, on_step=lambda report: states.append(weights(whole))).train_steps(8)
        losses = trainer(cancelled, cancelled=Stop(after)).train_steps(8)
        assert len(losses) == after
        assert same(weights(cancelled), states[after - 1] if after else start)

    def test_epochs_begun_count_with_the_steps_they_have(self):
        """24 samples, 4 a step: eight steps are an epoch of six and a part of two."""
        steps = []
        run = trainer(cancelled=Stop(8), on_step=lambda report: steps.append(report.loss))
        assert run.train(5) == pytest.approx([sum(steps[:6]) / 6, sum(steps[6:]) / 2])

    def test_an_error_of_the_callback_leaves_the_mode_and_the_steps_taken(self):
        def fail(report):
            if report.step == 2:
                raise RuntimeError("the page is gone")

        model = decoder().eval()
        run = trainer(model, on_step=fail)
        with pytest.raises(RuntimeError):
            run.train_steps(5)
        assert (run.step, model.training) == (2, False)


class TestResuming:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("after", [0, 1, 7])
    @pytest.mark.parametrize("dataset", [None, PartlyScored()])
    def test_from_a_file_takes_the_very_steps_that_were_left(self, tmp_path, seed, after, dataset):
        chosen = {"seed": seed, "accumulate": 2, "weight_decay": 0.3}
        whole = decoder(seed, dropout=0.3)
        expected = trainer(whole, dataset, **chosen).train_steps(10)
        first = trainer(decoder(seed, dropout=0.3), dataset, cancelled=Stop(after), **chosen)
        assert first.train_steps(10) == expected[:after]
        first.save(tmp_path / "run.safetensors")
        torch.manual_seed(1234)
        other = decoder(seed + 99, dropout=0.3)
        second = trainer(other, dataset, batch_size=1, learning_rate=3.0)
        second.train_steps(1)
        second.load(tmp_path / "run.safetensors")
        assert second.resume() == expected[after:]
        assert same(weights(other), weights(whole))
        assert second.options == first.options

    @pytest.mark.parametrize("seed", SEEDS)
    def test_in_the_same_process_too(self, seed):
        expected = trainer(decoder(seed, dropout=0.3)).train_steps(6)
        run = trainer(decoder(seed, dropout=0.3), cancelled=Stop(2))
        begun = run.train_steps(6)
        run.cancelled = None
        assert begun + run.resume() == expected
        assert run.resume() == []

    @pytest.mark.parametrize("method", ["LoRA", "LoRA+", "DoRA", "PiSSA"])
    @pytest.mark.parametrize("after", [0, 1, 4])
    def test_with_adapters_too_of_which_alone_something_is_remembered(self, tmp_path, method, after):
        def run(seed, stop=None):
            torch.manual_seed(seed)
            adapted = prepare(decoder(0, dropout=0.3), method, 2, 4.0, ("q_proj", "up_proj"))
            options = TrainerOptions(batch_size=4, learning_rate=1e-2, seed=3)
            return make_trainer(adapted, method, blocks(), options, cancelled=stop)

        whole = run(0)
        expected = whole.train_steps(6)
        first = run(0, Stop(after))
        assert first.train_steps(6) == expected[:after]
        first.save(tmp_path / "run.safetensors")
        tensors, _ = training_state.read(tmp_path / "run.safetensors")
        remembered = {name.removeprefix("optimizer.").rpartition(".")[0] for name in tensors if "optimizer." in name}
        learning = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
        assert remembered == (learning if after else set())
        second = run(99)
        second.load(tmp_path / "run.safetensors")
        assert second.resume() == expected[after:]
        assert same(weights(second.model), weights(whole.model))

    @pytest.mark.parametrize("after", [0, 1, 4])
    @pytest.mark.parametrize("kind", ["quantized", "mixed", "mixed and quantized", "mixed adapters"])
    def test_with_four_bits_and_with_routers_too(self, tmp_path, kind, after):
        def run(seed, stop=None):
            model = {"quantized": adapted, "mixed": mixed, "mixed and quantized": mixed_and_quantized}.get(kind, tuned)
            chosen = {"evaluate_every": 2, "patience": 5, "accumulate": 2, "batch_size": 3, "seed": 3}
            return trainer(model(seed), cancelled=stop, **chosen)

        whole = run(0)
        expected = whole.train_steps(6)
        assert expected[-1] != expected[0]
        first = run(0, Stop(after))
        assert first.train_steps(6) == expected[:after]
        first.save(tmp_path / "run.safetensors")
        ids = blocks(4, seed=8).ids
        for used in (False, True):
            second = run(99)
            if used:
                second.train_steps(1)
            second.load(tmp_path / "run.safetensors")
            assert second.resume() == expected[after:]
            assert second.evaluations == whole.evaluations
            assert same(training_state.tensors_of(second.model), training_state.tensors_of(whole.model))
            assert torch.equal(second.model.eval()(ids), whole.model.eval()(ids))

    @pytest.mark.parametrize("used", [False, True])
    def test_eight_bits_go_with_their_scales(self, tmp_path, used):
        """bitsandbytes moves the scales from the weight to its layer in the first forward pass."""
        first, second = (trainer(quantize_model_8bit(decoder(seed))) for seed in (0, 5))
        first.train_steps(2)
        first.save(tmp_path / "run.safetensors")
        if used:
            second.evaluate()
        second.load(tmp_path / "run.safetensors")
        ids = blocks(4, seed=8).ids[:, :-1]
        assert torch.equal(second.model.eval()(ids), first.model.eval()(ids))
        assert same(training_state.tensors_of(second.model), training_state.tensors_of(first.model))

    def test_eight_bits_without_their_scales_are_of_another_model(self, tmp_path):
        run = trainer(quantize_model_8bit(decoder()))
        run.save(tmp_path / "run.safetensors")
        tensors, facts = training_state.read(tmp_path / "run.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("SCB")}
        training_state.write(tmp_path / "run.safetensors", kept, facts)
        with pytest.raises(InputError, match=r"of another model: its layers\.0\..*\.weight\.SCB is missing"):
            run.load(tmp_path / "run.safetensors")

    def test_codes_of_another_codebook_are_of_another_model(self, tmp_path):
        first, second = (trainer(adapted(0, quant_type)) for quant_type in ("nf4", "fp4"))
        first.save(tmp_path / "run.safetensors")
        with pytest.raises(InputError, match=r"its layers\.0\..*fp4\.absmax is missing"):
            second.load(tmp_path / "run.safetensors")

    @pytest.mark.parametrize("frozen_there", [True, False])
    def test_of_a_model_with_other_weights_frozen_it_is_not_called_damaged(self, tmp_path, frozen_there):
        models = decoder(), decoder(5)
        models[0 if frozen_there else 1].embed_tokens.requires_grad_(False)
        first, second = map(trainer, models)
        first.train_steps(2)
        first.save(tmp_path / "run.safetensors")
        before = weights(second.model)
        with pytest.raises(InputError, match=r"trained other weights: embed_tokens\.weight is (frozen|trained) in it"):
            second.load(tmp_path / "run.safetensors")
        assert same(weights(second.model), before)

    def test_tied_weights_are_stored_once_and_stay_tied(self, tmp_path):
        model = decoder()
        run = trainer(model)
        run.train_steps(2)
        run.save(tmp_path / "run.safetensors")
        tensors, _ = training_state.read(tmp_path / "run.safetensors")
        assert sum(value.numel() for name, value in tensors.items() if name.startswith("model.")) == (
            model.config.num_parameters
        )
        other = trainer(decoder(5))
        other.load(tmp_path / "run.safetensors")
        assert other.model.lm_head.weight is other.model.embed_tokens.weight

    def test_a_file_is_whole_or_not_there(self, tmp_path, monkeypatch):
        run, path = trainer(), tmp_path / "deep" / "run.safetensors"
        run.train_steps(1)
        run.save(path)
        before = path.read_bytes()

        def fail(tensors, unfinished, metadata):
            unfinished.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(training_state, "save_file", fail)
        run.train_steps(2)
        with pytest.raises(OSError, match="No space"):
            run.save(path)
        assert path.read_bytes() == before

    def test_nothing_in_the_file_is_pickled(self, tmp_path):
        run = trainer()
        run.train_steps(1)
        run.save(tmp_path / "run.safetensors")
        with safe_open(tmp_path / "run.safetensors", framework="np") as file:
            kinds = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118, it is no dict
        assert kinds == {"model", "optimizer", "random"}


class TestForeignCheckpoints:
    """Whatever cannot be loaded is one sentence, and the run goes on as if nobody had tried."""

    def refuse(self, make, words):
        """A run of five steps in which after two of them a load fails takes the steps of one in which none does."""
        expected = trainer(decoder(dropout=0.2)).train_steps(5)
        run = trainer(decoder(dropout=0.2), cancelled=Stop(2))
        begun = run.train_steps(5)
        run.cancelled = None
        state = torch.get_rng_state()
        path = make()
        torch.set_rng_state(state)
        with pytest.raises(InputError, match=words) as raised:
            run.load(path)
        message = str(raised.value)
        assert "\n" not in message
        assert message.endswith(".")
        assert begun + run.resume() == expected

    def saved(self, path, run=None):
        run = run or trainer()
        run.train_steps(2)
        run.save(path)
        return path

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"d_model": 32}, r"embed_tokens\.weight is 30×32 in float32, here it is 30×16 in float32"),
            ({"num_layers": 1}, r"layers\.1\..* is missing, here it is"),
            ({"num_layers": 3}, r"layers\.2\..* here it is missing"),
            ({"tie_embeddings": False}, r"lm_head\.weight is 30×16 in float32, here it is missing"),
        ],
    )
    def test_of_another_shape(self, tmp_path, changes, words):
        self.refuse(lambda: self.saved(tmp_path / "run.safetensors", trainer(decoder(**changes))), words)

    @pytest.mark.parametrize("count", [23, 25])
    def test_of_another_dataset(self, tmp_path, count):
        make = functools.partial(self.saved, tmp_path / "run.safetensors", trainer(dataset=blocks(count)))
        self.refuse(make, f"trained on {count} samples of 10 tokens, here are 24 of 10")

    @pytest.mark.parametrize("changed", [0, 12, 23])
    def test_of_another_text_of_the_same_sizes(self, tmp_path, changed):
        ids = blocks(24).ids.clone()
        ids[changed, 3] = (ids[changed, 3] + 1) % VOCAB
        make = functools.partial(self.saved, tmp_path / "run.safetensors", trainer(dataset=TokenBlocks(ids)))
        self.refuse(make, "other samples of the same sizes")

    def test_of_the_same_samples_of_which_other_parts_are_drawn(self, tmp_path):
        class OtherDraws(PartlyScored):
            def batch(self, indices, generator=None):
                torch.rand(1, generator=generator)
                return super().batch(indices, generator)

        run = trainer(dataset=PartlyScored())
        run.train_steps(1)
        run.save(tmp_path / "run.safetensors")
        with pytest.raises(InputError, match="other samples of the same sizes"):
            trainer(dataset=OtherDraws()).load(tmp_path / "run.safetensors")

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
    def test_truncated(self, tmp_path, share):
        def make():
            path = self.saved(tmp_path / "run.safetensors")
            whole = path.read_bytes()
            path.write_bytes(whole[: int(share * len(whole))])
            return path

        self.refuse(make, "damaged or incomplete")

    def test_missing(self, tmp_path):
        self.refuse(lambda: tmp_path / "none.safetensors", r"There is no checkpoint .*none\.safetensors")

    def test_a_folder(self, tmp_path):
        self.refuse(lambda: tmp_path, "damaged or incomplete")

    def test_weights_alone(self, tmp_path):
        def make():
            save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "weights.safetensors")
            return tmp_path / "weights.safetensors"

        self.refuse(make, "no checkpoint of a training run")

    @pytest.mark.parametrize(
        "facts", ["{}", "[]", "{", '{"step": 1, "samples": 24, "block_size": 10, "options": 3}', "[" * 100_000]
    )
    def test_a_header_that_says_something_else(self, tmp_path, facts):
        def make():
            tensors, _ = training_state.read(self.saved(tmp_path / "run.safetensors"))
            save_file(tensors, tmp_path / "run.safetensors", metadata={"workbench_training": facts})
            return tmp_path / "run.safetensors"

        self.refuse(make, "damaged or incomplete")

    @pytest.mark.parametrize("gone", ["optimizer.", ".exp_avg_sq"])
    def test_an_optimizer_that_remembers_nothing_or_half(self, tmp_path, gone):
        def make():
            tensors, facts = training_state.read(self.saved(tmp_path / "run.safetensors"))
            kept = {name: tensor for name, tensor in tensors.items() if gone not in name}
            training_state.write(tmp_path / "run.safetensors", kept, facts)
            return tmp_path / "run.safetensors"

        self.refuse(make, "damaged or incomplete")

    def test_a_place_beyond_the_end_of_the_run(self, tmp_path):
        def make():
            tensors, facts = training_state.read(self.saved(tmp_path / "run.safetensors"))
            training_state.write(tmp_path / "run.safetensors", tensors, facts | {"step": 9, "total_steps": 6})
            return tmp_path / "run.safetensors"

        self.refuse(make, "damaged or incomplete")

    @pytest.mark.parametrize("name", ["random.cpu", "optimizer.norm.weight.exp_avg", "optimizer.norm.weight.step"])
    @pytest.mark.parametrize("change", ["gone", "other shape"])
    def test_a_part_that_is_not_what_it_should_be(self, tmp_path, name, change):
        def make():
            tensors, facts = training_state.read(self.saved(tmp_path / "run.safetensors"))
            value = tensors.pop(name)
            if change == "other shape":
                tensors[name] = torch.zeros(3, dtype=value.dtype)
            training_state.write(tmp_path / "run.safetensors", tensors, facts)
            return tmp_path / "run.safetensors"

        self.refuse(make, "damaged or incomplete")

    @pytest.mark.parametrize(
        ("name", "spoil"),
        [
            ("random.cpu", torch.zeros_like),
            ("random.cpu", torch.Tensor.float),
            ("optimizer.norm.weight.exp_avg", lambda value: value + math.nan),
            ("optimizer.norm.weight.exp_avg_sq", lambda value: value + math.nan),
            ("optimizer.norm.weight.exp_avg_sq", lambda value: -value - 1),
            ("optimizer.norm.weight.exp_avg_sq", torch.Tensor.long),
            ("optimizer.norm.weight.step", lambda value: value * math.inf),
            ("optimizer.norm.weight.step", torch.zeros_like),
            ("model.norm.weight", lambda value: value + math.nan),
        ],
    )
    def test_a_part_of_the_right_shape_that_training_cannot_have_left(self, tmp_path, name, spoil):
        def make():
            tensors, facts = training_state.read(self.saved(tmp_path / "run.safetensors", trainer(decoder(8))))
            training_state.write(tmp_path / "run.safetensors", tensors | {name: spoil(tensors[name])}, facts)
            return tmp_path / "run.safetensors"

        self.refuse(make, "damaged or incomplete")

    def test_weights_in_another_dtype(self, tmp_path):
        def make():
            tensors, facts = training_state.read(self.saved(tmp_path / "run.safetensors"))
            changed = {"model.norm.weight": tensors["model.norm.weight"].bfloat16()}
            training_state.write(tmp_path / "run.safetensors", tensors | changed, facts)
            return tmp_path / "run.safetensors"

        self.refuse(make, r"norm\.weight is 16 in bfloat16, here it is 16 in float32")


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class TestDiverging:
    def test_no_number_in_the_loss_stops_and_names_the_step(self):
        model, states = decoder(), []

        def spoil(report):
            if report.step == 3:
                with torch.no_grad():
                    model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
            states.append(weights(model))

        run = trainer(model, on_step=spoil)
        with pytest.raises(
            DivergedError, match=r"step 4 of 6: the loss is no number any more.*try a tenth of what was set, 0\.001"
        ) as raised:
            run.train_steps(6)
        assert raised.value.step == 4
        assert run.step == 3
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, states[-1][name], rtol=0, atol=0, equal_nan=True)

    def test_no_number_in_the_gradient_stops_before_it_reaches_the_weights(self):
        class Spoiling(torch.nn.Module):
            def __init__(self, config):
                super().__init__()
                self.linear = torch.nn.Linear(config.d_model, config.d_model)
                self.count = 0

            def forward(self, x):
                self.count += 1
                return SpoiledGradient.apply(self.linear(x)) if self.count == 3 else self.linear(x)

        model = decoder(num_layers=1, parts=Parts(feed_forward=Spoiling))
        with pytest.raises(DivergedError, match="step 3 of 5: the gradient is no number") as raised:
            trainer(model).train_steps(5)
        assert raised.value.step == 3
        assert all(weight.isfinite().all() for weight in weights(model).values())

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("rate", [3.0, 100.0])
    def test_a_rate_far_too_high_is_one_sentence(self, seed, rate):
        words = rf"diverged at step \d+ of 200: .*learning rate was .*try a tenth of what was set, {rate / 10:g}\."
        with pytest.raises(DivergedError, match=words):
            trainer(decoder(seed), learning_rate=rate, warmup=0.0, seed=seed).train_steps(200)

    @pytest.mark.parametrize(
        ("warmup", "spoiled_after", "said"),
        [
            (0.5, 1, r"was 4, in its warm-up, on the way to 10: try a tenth of what was set, 1\.$"),
            (0.5, 4, r"was 10: try a tenth of what was set, 1\.$"),
            (0.0, 8, r"was \d\.\d+, after at most 10: try a tenth of what was set, 1\.$"),
        ],
        ids=["on its way up", "at the top", "on its way down"],
    )
    def test_the_rate_is_said_with_where_it_was_on_its_way(self, warmup, spoiled_after, said):
        model = decoder()

        def spoil(report):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()  # whatever so high a rate has done, this guesses
                if report.step == spoiled_after:
                    model.layers[0].mlp.up_proj.weight[0, 0] = math.nan

        run = trainer(model, on_step=spoil, learning_rate=10.0, warmup=warmup)
        with pytest.raises(DivergedError, match=said) as raised:
            run.train_steps(10)
        assert raised.value.step == spoiled_after + 1

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (4, 1), (1, 8)])
    def test_a_rare_token_among_few_is_no_divergence(self, seed, batch_size, length):
        rare = (torch.rand(200, length + 1, generator=torch.Generator().manual_seed(seed)) < 0.05).long()
        model = decoder(seed, vocab_size=2)
        options = TrainerOptions(batch_size=batch_size, seed=seed)
        assert len(Trainer(model, TokenBlocks(rare), options).train_steps(80)) == 80

    def test_a_rate_that_works_is_not_stopped(self):
        losses = trainer(learning_rate=1e-2).train_steps(60)
        assert losses[-1] < losses[0]


class TestBadInput:
    @pytest.mark.parametrize(("method", "name"), [("train", "epochs"), ("train_steps", "steps")])
    @pytest.mark.parametrize("count", [0, -1])
    def test_no_training_is_one_sentence(self, method, name, count):
        with pytest.raises(InputError, match=f"{name} is {count}: give 1 or more"):
            getattr(trainer(), method)(count)

    @pytest.mark.parametrize("token", [-1, VOCAB])
    @pytest.mark.parametrize("place", ["dataset", "held_out"])
    def test_a_token_that_the_model_lacks_is_one_sentence(self, token, place):
        given = {"dataset": blocks(), "held_out": blocks(6)}
        given[place].ids[1, 2] = token
        with pytest.raises(InputError, match=f"Token {token} does not exist: the model has tokens 0 to 29"):
            Trainer(decoder(), **given)

    @pytest.mark.parametrize("place", ["dataset", "held_out"])
    def test_blocks_beyond_the_context_are_one_sentence(self, place):
        given = {"dataset": blocks(), "held_out": blocks(6)} | {place: blocks(length=13)}
        with pytest.raises(InputError, match=r"13 tokens, the model's context holds 12: choose shorter"):
            Trainer(decoder(), **given)

    def test_a_dataset_that_cannot_be_split_is_one_sentence(self):
        class Endless:
            block_size = 10

            def __len__(self):
                return 5

        with pytest.raises(InputError, match="A Endless has no part of its own to test on: give held_out"):
            Trainer(decoder(), Endless())

    def test_a_single_block_is_one_sentence(self):
        with pytest.raises(InputError, match="one block"):
            Trainer(decoder(), blocks(1))

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"learning_rate": 0}, "learning_rate is 0: .*greater than 0"),
            ({"learning_rate": math.nan}, "learning_rate is nan"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"precision": "int8"}, "precision is 'int8': .*'float32' or 'bfloat16'"),
            ({"beta2": 1.0}, r"beta2 is 1\.0"),
            ({"speed": 3}, "speed is 3: .*not permitted"),
            ({"optimizer": "SGD"}, "optimizer is 'SGD': .*'AdamW' or 'paged AdamW'"),
            ({"evaluate_every": 0}, "evaluate_every is 0"),
            ({"patience": 0, "evaluate_every": 1}, "patience is 0"),
            ({"patience": 2}, "patience is 2 evaluations, and there are none: set evaluate_every"),
        ],
    )
    def test_a_wrong_option_is_one_sentence(self, wrong, words):
        with pytest.raises(InputError, match=words) as raised:
            TrainerOptions(**wrong)
        assert "\n" not in str(raised.value)


@pytest.mark.gpu
class TestOnAGPU:
    @pytest.mark.parametrize("options", [{}, {"precision": "bfloat16", "accumulate": 2}])
    def test_takes_the_steps_that_a_cpu_takes(self, options):
        expected = trainer(decoder(), **options).train_steps(5)
        assert trainer(decoder().cuda(), **options).train_steps(5) == pytest.approx(expected, rel=0.02)

    def test_a_resumed_run_takes_the_very_steps_that_were_left(self, tmp_path):
        expected = trainer(decoder(dropout=0.3).cuda()).train_steps(8)
        first = trainer(decoder(dropout=0.3).cuda(), cancelled=Stop(3))
        first.train_steps(8)
        first.save(tmp_path / "run.safetensors")
        torch.manual_seed(99)
        second = trainer(decoder(7, dropout=0.3).cuda())
        second.load(tmp_path / "run.safetensors")
        assert second.resume() == expected[3:]

    @pytest.mark.parametrize("d_model", [16, 512])
    def test_the_paged_optimizer_takes_the_steps_of_the_plain_one(self, tmp_path, d_model):
        """In a small model nothing is paged; in the larger one what is remembered of the projections is."""

        def run(seed=0, optimizer="paged AdamW", cancelled=None):
            model = decoder(seed, d_model=d_model).cuda()
            return trainer(model, optimizer=optimizer, learning_rate=1e-3, cancelled=cancelled)

        whole = run().train_steps(8)
        assert whole == pytest.approx(run(optimizer="AdamW").train_steps(8), rel=1e-3)
        first = run(cancelled=Stop(3))
        begun = first.train_steps(8)
        first.save(tmp_path / "run.safetensors")
        second = run(7, optimizer="AdamW")
        second.load(tmp_path / "run.safetensors")
        paged = [getattr(state["state1"], "is_paged", False) for state in second._optimizer.state.values()]
        assert any(paged) is (d_model == 512)
        assert begun + second.resume() == pytest.approx(whole, rel=1e-5)

    @pytest.mark.parametrize("optimizer", ["AdamW", "paged AdamW"])
    @pytest.mark.parametrize(("begins", "ends"), [("cpu", "cuda"), ("cuda", "cpu")])
    def test_a_checkpoint_moves_between_devices(self, tmp_path, begins, ends, optimizer):
        expected = trainer(decoder()).train_steps(8)
        first = trainer(decoder().to(begins), cancelled=Stop(3), optimizer=optimizer)
        first.train_steps(8)
        first.save(tmp_path / "run.safetensors")
        second = trainer(decoder(7).to(ends))
        second.load(tmp_path / "run.safetensors")
        assert second.resume() == pytest.approx(expected[3:], rel=1e-3)

    def test_compiled_steps_are_the_same_steps(self):
        expected = trainer(decoder().cuda(), precision="bfloat16").train_steps(5)
        compiled = trainer(decoder().cuda(), precision="bfloat16", compile=True).train_steps(5)
        assert compiled == pytest.approx(expected, rel=0.02)

    def test_gradient_checkpointing_saves_memory(self):
        peaks = []
        for checkpointing in (False, True):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            reports = []
            model = decoder(num_layers=12, d_model=128, max_seq_len=512).cuda()
            dataset = blocks(32, length=512)
            trainer(
                model, dataset, batch_size=32, gradient_checkpointing=checkpointing, on_step=reports.append
            ).train_steps(2)
            peaks.append(reports[-1].memory_bytes)
            del model
        assert peaks[1] < 0.5 * peaks[0]
