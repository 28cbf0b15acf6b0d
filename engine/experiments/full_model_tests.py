"""What must hold of a model with any of the techniques on it, checked on the settings of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine.experiments import full_model
from engine.experiments._full_model import SWITCHES, SwitchParams
from engine.experiments.attention_tests import Check
from engine.experiments.full_model_step import check_time, needed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from engine.model import Decoder
    from engine.runtime.jobs import Job

_ROUNDING = 1e-4
"""Of the largest number compared: what float32 may differ by when a sum is taken in another order."""

_HALF_PRECISION = 2e-2
"""The same on a GPU, where FlashAttention computes in float16, by other kernels for one token than for many, and a
router may choose another of two experts that are nearly equal."""

_TEXTS, _TOKENS, _SPOKEN = 2, 48, 8
_STEPS, _RATE = 2, 3e-3
_PARTS = 4


class Params(SwitchParams):
    """The settings of the page; the batch is small here, whatever it is set to."""

    lane: ClassVar = "long"
    time_limit: ClassVar[float] = 300.0

    def memory_bytes(self) -> int:
        """What is predicted of a step, with a margin, twice: there are two models at a time."""
        return 2 * needed_bytes(self.model_copy(update={"batch_size": _TEXTS, "length": _TOKENS}))


@dataclass(frozen=True)
class Result:
    """All checks, in the order of a run."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Check fresh models with each switch alone, then the one of the settings, before and after it learns.

    Raises:
        DoesNotFitError: it would take a processor too long.
    """
    import torch

    from engine.experiments._on_workers.full_model_step import build
    from engine.measure import exclusive

    check_time(params.model_copy(update={"batch_size": _TEXTS, "length": _TOKENS}), job.device)
    generator = torch.Generator().manual_seed(params.seed)
    ids = torch.randint(params.architecture().vocab_size, (_TEXTS, _TOKENS), generator=generator).to(job.device)
    with exclusive(job.device):  # FlashAttention does not compare its kernels meanwhile
        job.report(0, _PARTS)
        checks = _alone(params, job.device, ids)
        job.report(1, _PARTS)
        model = build(params, job.device)
        checks += _counted(params, model)
        job.report(2, _PARTS)
        checks += _learned(model, ids)
        job.report(3, _PARTS)
        checks += [_causal(model, ids), _generated(model, ids)]
    job.report(_PARTS, _PARTS)
    return Result(checks)


def _alone(params: Params, device: str, ids: Tensor) -> list[Check]:
    """Every switch alone on a model that has none, before anything learns."""
    from engine.experiments._on_workers.full_model_step import build

    off = dict.fromkeys(SWITCHES, False)
    plain = _logits(build(params, device, **off), ids)
    scale, checks = plain.abs().max().item(), []
    for name, label in SWITCHES.items():
        given = _logits(build(params, device, **off | {name: True}), ids)
        if name == "quantization":
            error = ((given - plain).var() / plain.var()).item()
            checks.append(_check(f"{label} alone errs a little", "variance of the error over the logits'", error, 0.25))
        else:
            apart = (given - plain).abs().max().item()
            bound = _rounding(device) * scale
            checks.append(_check(f"{label} alone changes nothing yet", "largest change of a fresh logit", apart, bound))
    return checks


def _counted(params: Params, model: Decoder) -> list[Check]:
    from engine.quantization.production import get_model_memory_mb

    predicted = full_model.predict(params, on_cuda=False)
    total = sum(_numbers(parameter) for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    nbytes = round(1e6 * get_model_memory_mb(model))
    return [
        _check("All numbers are predicted", "|counted − predicted|", abs(total - predicted.total.total), 0),
        _check("So are those that learn", "|counted − predicted|", abs(learning - predicted.total.learning), 0),
        _check("And the bytes", "|counted − predicted|", abs(nbytes - sum(predicted.model_bytes.values())), 0),
    ]


def _numbers(parameter: Tensor) -> int:
    """Of a parameter; of one in 4 bits those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _learned(model: Decoder, ids: Tensor) -> list[Check]:
    """A few steps: what is frozen stays to the bit, and what learns moves.

    B of an expert starts at 0 and stays there until it has a token.
    """
    import torch

    from engine.moe.observation import observing
    from engine.trainer import summed_loss

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=_RATE)
    losses, read = [], {}
    for _ in range(_STEPS + 1):
        with observing(model) as seen:
            loss = summed_loss(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        losses.append(loss.item())
        loss.backward()
        if len(losses) <= _STEPS:
            optimizer.step()
            for layer, routing in seen:
                read[layer] = read.get(layer, 0) + routing.counts
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    frozen = [name for name, parameter in after.items() if not parameter.requires_grad]
    changed = sum(not torch.equal(before[name], after[name]) for name in frozen)
    idle = {f"{layer}.experts.{e}.B" for layer, counts in read.items() for e in (counts == 0).nonzero()[:, 0].tolist()}
    asked = after.keys() - set(frozen) - idle
    still = sum(torch.equal(before[name], after[name]) for name in asked)
    spared = f", B of {len(idle)} experts without a token not among them" if idle else ""
    return [
        _check(
            "What is frozen stays", f"of {len(frozen)} frozen tensors, those that {_STEPS} steps changed", changed, 0
        ),
        _check("What learns moves", f"of {len(asked)} tensors, those that did not{spared}", still, 0),
        _check("The loss falls", f"loss after {_STEPS} steps on one batch, bound by the first", losses[-1], losses[0]),
    ]


def _causal(model: Decoder, ids: Tensor) -> Check:
    """Another last half of a text, and the logits of the first half."""
    half = ids.shape[1] // 2
    other = ids.clone()
    other[:, half:] = (other[:, half:] + 1) % model.config.vocab_size
    given = _logits(model, ids)[:, :half]
    apart = (given - _logits(model, other)[:, :half]).abs().max().item()
    bound = _ROUNDING * given.abs().max().item()
    return _check("No token sees a later one", "largest change of an earlier logit", apart, bound)


def _generated(model: Decoder, ids: Tensor) -> Check:
    """Greedy words with a cache, and what the model gives for the same text without one."""
    from engine.generation import generate

    text = generate(model, ids[:, :_SPOKEN], _SPOKEN)
    logits = _logits(model, text)[:, _SPOKEN - 1 : -1]
    chosen = logits.gather(2, text[:, _SPOKEN:, None].to(logits.device))[..., 0]
    apart = (logits.amax(-1) - chosen).max().item()
    bound = _rounding(ids.device.type) * logits.abs().max().item()
    must = "by how much a word said with a cache is less likely than the best without, as logits"
    return _check("Generation needs no cache to say the same", must, apart, bound)


def _rounding(device: str) -> float:
    return _ROUNDING if device == "cpu" else _HALF_PRECISION


def _logits(model: Decoder, ids: Tensor) -> Tensor:
    from engine.model import evaluating

    with evaluating(model):
        return model(ids)


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), float(bound), measured <= bound)
