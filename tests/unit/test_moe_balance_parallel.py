"""Routers in several processes, each with its part of a batch, have one bias: that of the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import ExpertRouter

ROOT = Path(__file__).parents[2]
ROUNDS, RANKS, TEXTS, TOKENS, D = 6, 2, 4, 5, 8
CASES = [("tokens", "fixed", "bare"), ("texts", "adaptive", "DDP"), ("tokens", "adaptive", "checkpointed")]
PARTS = f"""
import torch
from engine import ExpertRouter

def router(balance, step):
    torch.manual_seed(1000)
    return ExpertRouter({D}, 4, 2, bias_rate=0.1, bias_step=step, balance=balance)

def part(number, rank):  # what one rank is given: texts of its own, the second one nothing but padding once
    generator = torch.Generator().manual_seed(10 * number + rank)
    x = torch.randn({TEXTS}, {TOKENS}, {D}, generator=generator) + 2 * rank * torch.eye({D})[rank]
    padding = torch.zeros({TEXTS}, {TOKENS}, dtype=torch.bool)
    if rank and number == 2:
        padding[:] = True
    return x, padding

def learn(router, x, padding):
    router.route(x, padding).dense_gates().square().sum().backward()
"""
WORKER = (
    PARTS
    + f"""
import json, sys
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

class Gates(nn.Module):
    def __init__(self, balance, step):
        super().__init__()
        self.router = router(balance, step)

    def forward(self, x, padding):
        return self.router.route(x, padding).dense_gates().square().sum()

def train(rank, balance, step, wrapped):
    module = Gates(balance, step)
    model = nn.parallel.DistributedDataParallel(module) if wrapped == "DDP" else module
    for number in range({ROUNDS}):
        x, padding = part(number, rank)
        if wrapped == "checkpointed":
            checkpoint(model, x.requires_grad_(), padding, use_reentrant=number % 2 == 0).backward()
        else:
            model(x, padding).backward()
        if rank == (wrapped == "DDP"):  # what one process reads, saves or evaluates by itself keeps no other waiting
            module.router.selection_bias
            module.state_dict()
            module.eval()(x, padding)
            module.train()
    return module.router.selection_bias.tolist()

rank = int(sys.argv[1])
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size={RANKS})
print(json.dumps([train(rank, *case) for case in {CASES}]))
distributed.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def in_processes(tmp_path_factory) -> list[list[list[float]]]:
    """The bias that each of the processes ends with, for each case."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(meeting)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(process.returncode for process in started), ended
    return [json.loads(said) for said, _ in ended]


def in_one_process(balance: str, step: str) -> list[float]:
    names: dict = {}
    exec(PARTS, names)
    router: ExpertRouter = names["router"](balance, step)
    for number in range(ROUNDS):
        x, padding = (torch.cat(parts) for parts in zip(*(names["part"](number, r) for r in range(RANKS)), strict=True))
        names["learn"](router, x, padding)
    return router.selection_bias.tolist()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_process_has_the_bias_of_the_joined_batch(in_processes, case):
    balance, step, _ = case
    alone = in_one_process(balance, step)
    assert any(alone)
    assert [biases[CASES.index(case)] for biases in in_processes] == [alone] * RANKS
