"""What must hold of every router, checked on your text and your settings.

Legend: N tokens, E experts, K chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.experiments import _router
from engine.experiments.attention_tests import Check

if TYPE_CHECKING:
    from torch import Tensor

    from engine.moe.routing import ExpertRouter, Routing
    from engine.runtime.jobs import Job

_BIASED = ("softmax", "sigmoid", "noisy")
_BIAS_RATE = 0.01
_FFN_DIM = 32


class Params(_router.RouterParams):
    """The settings of the page."""


@dataclass(frozen=True)
class Result:
    """All checks, in the order of the computation."""

    checks: list[Check]


def run(params: Params, job: Job) -> Result:
    """Run every property on the current settings."""
    reading = _router.read(params, job)
    router = _router.make_router(params, reading.x)
    routing = _router.route(params, router, reading.x)
    checks = [
        *_of_the_choice(params, routing),
        *_of_the_gates(params, routing),
        *_of_capacity(params, routing),
        *_of_padding(params, router, reading.x),
        *_of_the_layer(params, router, reading.x),
        *_of_balance(params, routing),
    ]
    if params.kind in _BIASED:
        checks += _of_the_bias(params, reading.x)
    return Result(checks)


def _of_the_choice(params: Params, routing: Routing) -> list[Check]:
    checks = [
        _check(
            "Probabilities sum to 1",
            "|Σₑ p[n, e] − 1|, the largest of all tokens",
            (routing.probs.sum(-1) - 1).abs().max().item(),
            1e-5,
        )
    ]
    if params.kind == "expert choice":
        apart = int(routing.counts.max() - routing.counts.min())
        return [*checks, _check("Experts take equally many", "tokens of the fullest − of the emptiest", apart, 0)]
    in_order = routing.indices.sort(dim=1).values
    twice = int((in_order.diff(dim=1) == 0).sum())
    checks.append(_check("K different experts a token", "experts that a token chose twice", twice, 0))
    if params.kind == "softmax":
        chosen = routing.logits.gather(1, routing.indices).amin(1)
        left = routing.logits.scatter(1, routing.indices, float("-inf")).amax(1)
        wrong = int((left > chosen).sum())
        checks.append(_check("The K most probable", "tokens that left out a more probable expert", wrong, 0))
    return checks


def _of_the_gates(params: Params, routing: Routing) -> list[Check]:
    """The gates once more, in float64 and from the table of logits."""
    import torch

    logits = routing.logits.double()
    scores = logits.sigmoid() if params.kind == "sigmoid" else logits.softmax(-1)
    if params.kind == "random":
        scores = torch.ones_like(scores)
    if params.kind == "expert choice" or (params.top_k == 1 and params.kind != "random"):
        expected = scores
    else:
        expected = scores / scores.gather(1, routing.indices).sum(1, keepdim=True)
    found = (routing.gates - expected[routing.tokens, routing.experts]).abs()
    return [
        _check(
            "Gates follow the formula",
            "|gate − the same from the logits in float64|",
            found.max().item() if len(found) else 0.0,
            1e-5,
        )
    ]


def _of_capacity(params: Params, routing: Routing) -> list[Check]:
    from engine.moe.balance import capacity

    num_tokens = len(routing.logits)
    if params.kind == "expert choice":
        covered = len(routing.tokens.unique()) + len(routing.dropped)
        return [
            _check("No token is lost", "|tokens taken or left over − all tokens|", abs(covered - num_tokens), 0),
        ]
    lost = num_tokens * params.top_k - len(routing.tokens) - len(routing.dropped)
    checks = [_check("No choice is lost", "|N·K − choices carried out − choices refused|", abs(lost), 0)]
    if params.capacity_factor is not None:
        most = capacity(num_tokens, params.experts, params.top_k, params.capacity_factor)
        over = int((routing.counts - most).clamp(min=0).max())
        checks.append(_check("No expert is over capacity", f"tokens beyond the {most} that an expert takes", over, 0))
    return checks


def _of_padding(params: Params, router: ExpertRouter, x: Tensor) -> list[Check]:
    """Half as many tokens again as padding; noise and dice are drawn for it too, so the choices may be others."""
    import torch

    extra = len(x) // 2 + 1
    padding = torch.arange(len(x) + extra) >= len(x)
    longer = torch.cat([x, x[:1].expand(extra, -1)])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(params.seed + 1)
        padded = router.route(longer, padding)
        alone = None if params.kind in ("noisy", "random") else router.route(x)
    touched = int(padding[padded.tokens].sum()) + abs(padded.num_tokens - len(x))
    checks = [_check("Padding never counts", f"of {extra} padding tokens, those that an expert gets", touched, 0)]
    if alone is not None:
        apart = (padded.dense_gates()[: len(x)] - alone.dense_gates()).abs().max().item()
        checks.append(_check("Padding changes nothing", "|gates with padding − gates without|", apart, 1e-5))
    return checks


def _of_the_layer(params: Params, router: ExpertRouter, x: Tensor) -> list[Check]:
    """A small mixture behind this router, by grouped products and by a loop over the experts in float64."""
    import torch
    from torch.nn import functional as F

    from engine.moe.feed_forward import MoEFeedForward
    from engine.moe.observation import observing

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(params.seed)
        layer = MoEFeedForward(x.shape[-1], _FFN_DIM, params.experts, params.top_k, router=router)
        with observing(layer) as seen:
            found = layer(x)  # (N, D)
        ((_, routing),) = seen
        expected = torch.zeros_like(x, dtype=torch.float64)
        gates = routing.dense_gates().double()
        for expert in range(params.experts):
            gate, up = (x.double() @ layer.gate_up_proj[expert].double().T).chunk(2, -1)
            expected += gates[:, expert, None] * ((F.silu(gate) * up) @ layer.down_proj[expert].double().T)
    left_out = torch.ones(len(x), dtype=torch.bool)
    left_out[routing.tokens] = False
    checks = [
        _check(
            "The layer is the sum of its experts",
            "|grouped products − a loop over experts in float64| / the largest output",
            ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item(),
            1e-5,
        )
    ]
    if left_out.any():
        checks.append(
            _check(
                "Left out means zero",
                f"the largest output of the {int(left_out.sum())} tokens that no expert computes",
                found[left_out].abs().max().item(),
                0,
            )
        )
    return checks


def _of_balance(params: Params, routing: Routing) -> list[Check]:
    from engine.moe.balance import auxiliary_loss
    from engine.moe.statistics import load_of

    load = load_of(routing)
    share = routing.wanted.double() / routing.wanted.sum()  # (E,)
    expected = params.experts * (share * routing.probs.double().mean(0)).sum()
    decided = load.load if params.kind == "expert choice" else load.wanted
    violation = (decided.max() - decided.mean()) / decided.mean()
    return [
        _check(
            "Auxiliary loss follows the formula",
            f"|auxiliary loss − E·Σ f·P in float64|; it is {expected:.3f} here, 1 if balanced",
            abs(auxiliary_loss(routing).item() - expected.item()),
            1e-5,
        ),
        _check(
            "MaxVio follows the formula",
            f"|MaxVio − (max − mean) / mean|; it is {load.max_violation:.3f} here",
            abs(load.max_violation - violation),
            1e-9,
        ),
    ]


def _of_the_bias(params: Params, x: Tensor) -> list[Check]:
    """What a bias may do: steer the choice, never weigh; and where a training step moves it."""
    import torch

    from engine.moe.routing import ExpertRouter

    router = _router.make_router(params, x)
    plain = _router.route(params, router, x)
    router.selection_bias.copy_(torch.linspace(-1, 1, params.experts))
    biased = _router.route(params, router, x)
    moved = (plain.probs - biased.probs).abs().max().item()
    checks = [
        _check("The bias never weighs", "|probabilities with a bias from −1 to 1 − those without|", moved, 0),
        *(
            _check(f"{check.name}, with a bias", check.must, check.measured, check.bound)
            for check in _of_the_gates(params, biased)
        ),
    ]
    learner = ExpertRouter(x.shape[-1], params.experts, params.top_k, kind=params.kind, bias_rate=_BIAS_RATE)
    learner.load_state_dict(router.state_dict())
    learner.selection_bias.zero_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed + 1)
        routing = learner.route(x)
    routing.gates.sum().backward()
    excess = routing.wanted - routing.wanted.double().mean()  # (E,)
    wrong = int((learner.selection_bias.double() * excess > 0).sum() + (learner.selection_bias[excess != 0] == 0).sum())
    return [
        *checks,
        _check("A step moves the bias against the load", "experts whose bias moved the wrong way, or not", wrong, 0),
    ]


def _check(name: str, must: str, measured: float, bound: float) -> Check:
    return Check(name, must, float(measured), float(bound), bool(measured <= bound))
