"""One training step of a model with any of the techniques on it, timed and weighed on this device.

Legend: B batch, T tokens of a text.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time

import torch
from torch import Tensor

from engine import llama, pretrained
from engine.architecture import ModelConfig
from engine.experiments import full_model
from engine.experiments._full_model import SwitchParams
from engine.experiments.full_model_step import ALL_WEIGHTS, Step
from engine.flash import choice
from engine.full_model import optimize
from engine.measure import Evidence, exclusive, measure_time, peak_memory
from engine.model import Decoder
from engine.quantization.production import get_model_memory_mb
from engine.trainer import summed_loss

_LEARNING_RATE = 1e-5
_NEVER = 2**62  # calls
_FEWEST, _MOST = 3, 20
"""Steps that are timed at once."""


def build(params: SwitchParams, device: str, **switches: bool) -> Decoder:
    """The model of the settings on the device, but for `switches`; with one seed all begin with the same weights."""
    torch.manual_seed(params.seed)
    config = params.architecture(**switches)
    if params.begin == "fresh":
        plain = Decoder(config)
    else:
        plain = llama.from_transformers(pretrained.load("storyteller").model)
    return optimize(plain.to(device), config, params.learning).train()


def measure(params: SwitchParams, device: str) -> Step:
    """Build the model, take steps on random tokens, time some of them and weigh the last."""
    trial = Trial(params, device)
    trial.time()
    return trial.told()


class Trial:
    """A model that takes steps on one batch of random tokens, timed in one go or in several, and weighed.

    The device is held while it does, so that `FlashAttention` does not begin to compare its kernels: it does so by
    itself after some calls, but never within a measurement.

    Args:
        params: the settings.
        device: torch device.
        switches: names of those that are to be other than they are set.
    """

    def __init__(self, params: SwitchParams, device: str, **switches: bool) -> None:
        began = time.monotonic()
        self._params, self._device, self._on_cuda = params, device, torch.device(device).type == "cuda"
        self._predicted = full_model.predict(params, on_cuda=self._on_cuda, **switches)
        self._timed: list[Evidence] = []
        with exclusive(device):
            _warm(device)
            before = self._allocated()
            self._model = build(params, device, **switches)
            learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            self._optimizer = torch.optim.AdamW(learning, lr=_LEARNING_RATE, fused=True)
            shape, generator = (params.batch_size, params.length), torch.Generator().manual_seed(params.seed)
            self._inputs, self._targets = (
                torch.randint(self._model.config.vocab_size, shape, generator=generator).to(device) for _ in range(2)
            )
            self._loss = self._step().item()  # the first step makes the optimizer's state
            self._held = self._allocated() - before if self._on_cuda else self._counted()
            self._quick = self._seconds()
        self._spent = time.monotonic() - began

    def time(self, seconds: float = 0.5) -> None:
        """Time steps for about so long.

        Args:
            seconds: that the timed ones are to take, but `_FEWEST` are timed at least and `_MOST` at most.
        """
        began = time.monotonic()
        evidence = measure_time(
            self._step,
            self._device,
            dtype=torch.float32,
            shape=f"a training step on {self._params.batch_size} × {self._params.length} random tokens",
            runs=min(_MOST, max(_FEWEST, int(seconds / self._quick))),
        )
        self._timed.append(evidence)
        self._spent += time.monotonic() - began

    def told(self) -> Step:
        """What was measured, and the memory of one step more."""
        began = time.monotonic()
        config, first = self._model.config, self._timed[0]
        with exclusive(self._device):
            peak = self._held + peak_memory(self._step, self._device)
            attention = _kernel(self._params, config, self._device) if config.use_flashattention else ALL_WEIGHTS
        rounds = len(self._timed)
        evidence = dataclasses.replace(
            first,
            **{
                name: statistics.median(getattr(each, name) for each in self._timed)
                for name in ("median_ms", "low_ms", "high_ms")
            },
            runs=sum(each.runs for each in self._timed),
            warmup=first.warmup if rounds == 1 else f"{first.warmup} before each of {rounds} rounds",
        )
        return Step(
            on=self._predicted.on,
            evidence=evidence,
            rounds=tuple(each.median_ms for each in self._timed),
            tokens=self._inputs.numel(),
            model_bytes=round(1e6 * get_model_memory_mb(self._model)),
            state_bytes=self._state_bytes(),
            peak_bytes=peak,
            predicted_bytes=self._predicted.memory.peak.total,
            loss=self._loss,
            attention=attention,
            seconds=self._spent + time.monotonic() - began,
        )

    def _step(self) -> Tensor:
        """Forward, backward, update; returns the loss before it, in nats a token."""
        loss = summed_loss(self._model, self._inputs, self._targets) / self._inputs.numel()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _seconds(self) -> float:
        began = time.perf_counter()
        self._step().item()  # which waits for a GPU
        return time.perf_counter() - began

    def _allocated(self) -> int:
        """On a GPU, without what stands in cycles, as dropped 4-bit weights do: it may be freed at any moment."""
        if not self._on_cuda:
            return 0
        gc.collect()
        return torch.cuda.memory_allocated(self._device)

    def _counted(self) -> int:
        weights = round(1e6 * get_model_memory_mb(self._model))
        return weights + self._state_bytes() + self._inputs.nbytes + self._targets.nbytes

    def _state_bytes(self) -> int:
        return sum(value.nbytes for values in self._optimizer.state.values() for value in values.values())


def _warm(device: str) -> None:
    """Have a GPU's libraries take what they keep for good, which is no part of a step."""
    if torch.device(device).type == "cuda":
        x = torch.ones(8, 8, device=device, requires_grad=True)
        (x @ x).sum().backward()


def _kernel(params: SwitchParams, config: ModelConfig, device: str) -> str:
    """What computes FlashAttention here at present, by its name for people."""
    shapes = (
        (params.batch_size, heads, params.length, config.head_dim) for heads in (config.num_heads, config.num_kv_heads)
    )
    half = torch.device(device).type == "cuda"
    Q, K = (torch.empty(shape, device=device, dtype=torch.float16 if half else torch.float32) for shape in shapes)
    return choice.resolve(Q, K, K, causal=True, scale=None, grad=True, calls_before_measuring=_NEVER).label
