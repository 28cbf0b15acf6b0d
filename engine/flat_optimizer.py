"""An optimizer that takes one step over many parameters at once, in float32 whatever they are kept in.

    optimizer = FlatOptimizer(lora_parameters(model), partial(PagedAdamW8bit, lr=2e-4))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

Legend: N numbers in all parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim import Optimizer

from engine.errors import InputError


class FlatOptimizer(Optimizer):
    """Lays parameters end to end in one float32 tensor and lets another optimizer update that.

    Adapters are hundreds of small matrices, and an optimizer that launches its kernel for each of them, as
    bitsandbytes' do, costs mostly launches. Here a step gathers the gradients, updates once and hands the values back:
    launches that hardly grow with the number of parameters. Between steps nothing flat is held but the float32 values.

    They are why bfloat16 parameters learn here as float32 ones do: steps too small to move a bfloat16 number add up in
    float32, and the parameters are their rounded sums. So the model computes with bfloat16 parameters and casts none.
    Gradients of several backward passes before a step still add up in the parameters' own dtype.

    The parameters stay the model's own: saved, loaded and moved under their names. What was changed since the last
    step, by loading a state into the model say, counts as it is.

    The numbers are those of one update each, except where an optimizer looks at more than one number at a time. Of
    bitsandbytes' 8-bit ones, blocks of 256 numbers with one scale may straddle two parameters (if 256 divides all their
    sizes, none does), and parameters of fewer than 4096 numbers, whose state they keep in 32 bits, get 8 as well. A
    parameter without a gradient is updated as if it were 0, where others leave it alone.

    What looks for the parameters or their gradients in `param_groups`, as gradient scaling for float16 does, does not
    find them there; nor does an inner optimizer that wants a closure get one, or `deepcopy` a working copy.

    Args:
        parameters: at least one, all of one dtype of at most 32 bits and on one device.
        make: makes the optimizer of one (N,) float32 parameter from the list of it.

    Raises:
        InputError: there are no parameters, or they differ in dtype or device, or are float64.

    Source: float32 copies of the weights: Micikevicius et al. 2018, section 3.1, https://arxiv.org/abs/1710.03740.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
        self.parameters = list(parameters)
        kinds = {(str(parameter.dtype).removeprefix("torch."), str(parameter.device)) for parameter in self.parameters}
        if len(kinds) != 1 or self.parameters[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds)) or "no parameters"
            raise InputError(
                f"A flat optimizer takes parameters of one dtype, up to float32, on one device, not {found}."
            )
        self.flat = nn.Parameter(self._values().float().clone())  # of one float32 parameter it would be its own storage
        self.inner = make([self.flat])
        super().__init__([self.flat], self.inner.defaults)
        self.param_groups = self.inner.param_groups  # where a schedule sets the rate

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters from their gradients; `closure` computes those, and the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        values = self._values()  # (N,)
        self.flat.copy_(torch.where(self.flat.to(values.dtype) == values, self.flat, values))
        self.flat.grad = _flatten_dense_tensors([_gradient(parameter) for parameter in self.parameters]).float()
        self.inner.step()
        self.flat.grad = None
        rounded = self.flat.detach().to(values.dtype)
        torch._foreach_copy_(self.parameters, _unflatten_dense_tensors(rounded, self.parameters))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the parameters' gradients, or set them to 0."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The float32 values and the inner optimizer's state."""
        return {"flat": self.flat.detach(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of the same parameters; the model's own values are loaded into the model."""
        with torch.no_grad():
            self.flat.copy_(state_dict["flat"])
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def _values(self) -> Tensor:
        return _flatten_dense_tensors(self.parameters)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
