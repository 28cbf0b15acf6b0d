"""The model of `production_config`, whole: what it is and learns; its bounds are in test_measured_targets.py."""

import pytest
import torch

from engine import (
    Trainer,
    TrainerOptions,
    create_optimized_model,
    generate,
    get_model_memory_mb,
    production_config,
)
from engine.data import TokenBlocks
from engine.model import evaluating
from engine.targets.target import read_targets


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_optimized_model(production_config())


def tokens(*shape, seed=0):
    return torch.randint(production_config().vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_with_its_experts_it_is_less_than_half_as_large_as_without_anything(model):
    assert get_model_memory_mb(model) < 0.5 * 4 * production_config().num_parameters / 1e6


def test_a_later_token_changes_nothing_before_it(model):
    ids = tokens(1, 24)
    other = ids.clone()
    other[0, 20] = (other[0, 20] + 1) % production_config().vocab_size
    with evaluating(model):
        before, after = model(ids), model(other)
    torch.testing.assert_close(after[:, :20], before[:, :20], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after[:, 20:], before[:, 20:], atol=1e-2)


def test_it_continues_a_text_with_its_cache_as_without(model):
    prompt = tokens(1, 6, seed=1)
    text = prompt
    with evaluating(model):
        for _ in range(4):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, prompt, 4), text)


def test_a_step_reaches_every_adapter(model):
    blocks = TokenBlocks(tokens(4, 17, seed=2))
    Trainer(model, blocks, TrainerOptions(batch_size=2), held_out=blocks).train_steps(2)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.any() for name, gradient in gradients.items() if ".experts." not in name)  # some have no token


@pytest.fixture(scope="module")
def on_gpu():
    torch.manual_seed(0)
    return create_optimized_model(production_config()).cuda()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_in_bfloat16_too_steps_on_2_times_1024_tokens_stay_below_the_target(on_gpu):
    (target,) = (target for target in read_targets() if target.key == "production_memory")
    blocks = TokenBlocks(tokens(target.settings["batch"], target.settings["length"] + 1))
    torch.cuda.reset_peak_memory_stats()
    options = TrainerOptions(batch_size=target.settings["batch"], precision="bfloat16")
    Trainer(on_gpu, blocks, options, held_out=blocks).train_steps(2)
    assert target.bound.holds(torch.cuda.max_memory_allocated() / 1e9)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_ids_may_be_on_another_device(on_gpu):
    assert on_gpu(tokens(1, 8)).is_cuda
