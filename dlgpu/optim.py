"""Optimizers: torch.optim's classes, arguments and state. The update of all parameters is ops/optimizers.py's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlgpu.ops import optimizers as ops

__all__ = ["Adam", "AdamW"]


class Adam(torch.optim.Adam):
    """torch.optim.Adam with all parameters of a step, of all groups, in one kernel launch after a small one.

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    where g is the gradient + weight_decay p, negated before that if maximize; with decoupled_weight_decay p is first
    multiplied by 1 - lr weight_decay instead; with amsgrad the largest v so far stands for v.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as torch.optim.Adam. lr may be a
            tensor of one element; on a GPU it is read there, so that a captured graph sees it change.
        foreach, fused: accepted, kept in the state_dict, and without effect: there is one way to step.
        capturable: accepted, without effect: once a first step has made the state, a step on a GPU can be captured.
        differentiable: must be False.

    Parameters are float32, bfloat16 or float16 (float64 on the CPU, or by torch's own functions); arithmetic is float32
    (float64 for float64). The state is torch's, in the parameter's dtype, and state_dict goes both ways in mid-training;
    `step` is on the GPU for parameters there, as with torch's fused=True. No step waits for the GPU.

    Raises:
        ValueError: an argument out of range, as torch.
        NotImplementedError: differentiable=True, or complex parameters: torch.optim.Adam takes them.
        RuntimeError: in step, a sparse gradient: torch.optim.SparseAdam takes it.

    Sources: Kingma and Ba, arXiv:1412.6980; amsgrad, Reddi et al., arXiv:1904.09237.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -4.0])
    >>> Adam([p], lr=0.1).step()
    >>> p.data
    tensor([ 0.9000, -0.9000])
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._cache = ops.Cache()
        # By name: in AdamW the next class is torch's AdamW, which takes other arguments.
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        # Torch sets it with fused=True: GradScaler would leave it to step to unscale and to skip.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        if param_group.get("differentiable", self.defaults["differentiable"]):
            self._refuse_differentiable()
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy of an optimizer has none; one that loads a state_dict keeps what its captured graphs read.
        if "_cache" not in self.__dict__:
            self._cache = ops.Cache()
        self._cache.plan = None

    def _refuse_differentiable(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: differentiable=True is not supported: the step writes in place, below autograd; use "
            f"torch.optim.{type(self).__name__}"
        )

    # torch.compiler.disable would import Dynamo here, this does at the first call.
    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, states, members = [], [], [], []
        for number, group in enumerate(self.param_groups):
            if group["differentiable"]:
                self._refuse_differentiable()
            for p in group["params"]:
                g = p.grad
                if g is not None:
                    state = self.state[p]
                    if not state:
                        state.update(ops.new_state(p, g, group["amsgrad"]))
                    params.append(p)
                    grads.append(g)
                    states.append(state)
                    members.append(number)
        ops.adam_step(params, grads, states, members, self.param_groups, self._cache)
        return loss


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW: Adam with decoupled weight decay, p = p (1 - lr weight_decay) before each update.

    Arguments, dtypes, state and errors are Adam's; weight_decay is 1e-2 by default.

    Source: Loshchilov and Hutter, arXiv:1711.05101.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -4.0])
    >>> AdamW([p], lr=0.1, weight_decay=0.5).step()
    >>> p.data
    tensor([ 0.8500, -0.8500])
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )
