"""Optimizers: torch.optim's classes, arguments and state. The update of all parameters is ops/optimizers.py's.

Every class takes three keyword arguments that torch's do not have:

    max_grad_norm   a number: gradients whose norm over all groups is larger are scaled down to it, as
                    torch.nn.utils.clip_grad_norm_ would, in the same launches and one more, without waiting for the device
                    and without writing to the gradients. `optimizer.grad_norm` then holds the norm before clipping, a
                    tensor of no dimensions that the next step overwrites. It may be changed between steps.
    master_weights  True keeps a float32 copy of each bfloat16 or float16 parameter and steps that; the parameter is its
                    rounding. It is in the state_dict, as `master_param`. What is written into a parameter from outside, in
                    a way that moves its version counter (so not through `.data`), is taken over at the next step.
    state_dtype     torch.float32 or torch.bfloat16 for the states, `step` apart; None is torch's choice, the parameter's
                    dtype, or float32 for parameters with a master. float64 parameters keep float64.

torch.amp.GradScaler needs no `unscale_`: its `step` hands the scale and whether there was an infinity to the kernels, and a
skipped step leaves every bit as it is. Gradients stay scaled, where torch's fused=True writes them back unscaled.

Arithmetic is float32 (float64 for float64 parameters) whatever the dtypes are. Of numbers only lr may be a tensor on a GPU;
it is read there, so that a captured graph sees it change. No step waits for the GPU, except that float64 parameters there
are stepped by torch's own functions, which may. The first step makes the state, so it comes before a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlgpu.ops import optimizers as ops

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]


class _MultiTensor(torch.optim.Optimizer):
    """What the classes share; the next class is torch's own."""

    _rule: ops.Rule
    _cache: ops.Cache
    _extras: ops.Extras
    # GradScaler then leaves it to `step` to unscale and to skip. Of the class, so that copies have it.
    _step_supports_amp_scaling = True

    def _set_extras(
        self,
        max_grad_norm: float | None,
        master_weights: bool,
        state_dtype: torch.dtype | None,
        initial: float = 0,
    ) -> None:
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"Invalid state_dtype: {state_dtype}, expected None, torch.float32 or torch.bfloat16"
            )
        self._cache = ops.Cache()
        self._extras = ops.Extras(None, bool(master_weights), state_dtype, initial)
        self.max_grad_norm = max_grad_norm

    @property
    def max_grad_norm(self) -> float | None:
        """The norm to clip to, None not to clip."""
        return self._extras.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {value}")
        self._extras = self._extras._replace(max_grad_norm=None if value is None else float(value))

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of the gradients in the last step that clipped, before clipping, on the parameters' device."""
        return self._cache.norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        if param_group.get("differentiable", self.defaults["differentiable"]):
            self._refuse_differentiable()
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_extras": self._extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of an optimizer has none; one that loads a state_dict keeps what its captured graphs read.
        if "_cache" not in self.__dict__:
            self._cache = ops.Cache()
        super().__setstate__(state)
        self._cache.forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states that have a dtype of their own, and masters, are not cast to the parameter's."""
        seen: list[dict[str, Any]] = []
        # Other hooks may have put another dict in place of what was given: the last one sees what is loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = [number for group in seen[0]["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, params, strict=True):
            for name, value in seen[0]["state"].get(number, {}).items():
                dtype = torch.float32 if name == ops.MASTER else self._extras.dtype(p)
                if dtype is not None and name in (ops.MASTER, *self._rule.slots) and value is not None:
                    self.state[p][name] = value.to(device=p.device, dtype=dtype)

    def _refuse_differentiable(self) -> None:
        name = self._rule.name
        raise NotImplementedError(
            f"{name}: differentiable=True is not supported: the step writes in place, below autograd; use "
            f"torch.optim.{name}"
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
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        members: list[int] = []
        for number, group in enumerate(self.param_groups):
            if group["differentiable"]:
                self._refuse_differentiable()
            those = group["params"]
            found = [g for p in those if (g := p.grad) is not None]
            if len(found) != len(those):
                those = [p for p in those if p.grad is not None]
            params += those
            grads += found
            members += [number] * len(those)
        ops.step(
            self._rule,
            params,
            grads,
            members,
            self.param_groups,
            self.state,
            self._cache,
            self._extras,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        return loss


class SGD(_MultiTensor, torch.optim.SGD):
    """torch.optim.SGD with all parameters of a step, of all groups, in one kernel launch after a small one.

        b = g at the first step, then momentum b + (1 - dampening) g
        p = p - lr b,   or p - lr (g + momentum b) with nesterov,   or p - lr g without momentum

    where g is the gradient, negated if maximize, + weight_decay p.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as torch.optim.SGD. lr may be a tensor of one
            element.
        foreach, fused: accepted, kept in the state_dict, and without effect: there is one way to step.
        differentiable: must be False.
        max_grad_norm, master_weights, state_dtype: see the module.

    Raises:
        ValueError: an argument out of range, as torch.
        NotImplementedError: differentiable=True, or complex parameters: torch.optim.SGD takes them.
        RuntimeError: in step, a sparse gradient: torch.optim.SGD takes it.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, 2013, as torch changed it.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -4.0])
    >>> SGD([p], lr=0.1, max_grad_norm=1.0).step()
    >>> p.data
    tensor([ 0.9876, -0.9008])
    """

    _rule = ops.SGD

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | torch.Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, master_weights, state_dtype)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )


class Adagrad(_MultiTensor, torch.optim.Adagrad):
    """torch.optim.Adagrad with all parameters of a step, of all groups, in one kernel launch after a small one.

        s = s + g^2,   p = p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

    where g is the gradient, negated if maximize, + weight_decay p.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as torch.optim.Adagrad. lr may be a
            tensor of one element.
        foreach, fused: accepted, kept in the state_dict, and without effect: there is one way to step.
        differentiable: must be False.
        max_grad_norm, master_weights, state_dtype: see the module.

    Raises:
        ValueError: an argument out of range, as torch.
        NotImplementedError: differentiable=True, or complex parameters: torch.optim.Adagrad takes them.
        RuntimeError: in step, a sparse gradient: torch.optim.Adagrad takes it.

    Source: Duchi et al., Adaptive Subgradient Methods, JMLR 12, 2011.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -4.0])
    >>> Adagrad([p], lr=0.1).step()
    >>> p.data
    tensor([ 0.9000, -0.9000])
    """

    _rule = ops.ADAGRAD

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, master_weights, state_dtype, initial_accumulator_value)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )


class RMSprop(_MultiTensor, torch.optim.RMSprop):
    """torch.optim.RMSprop with all parameters of a step, of all groups, in one kernel launch after a small one.

        v = alpha v + (1 - alpha) g^2,   d = g / (sqrt(v) + eps),   p = p - lr d

    where g is the gradient, negated if maximize, + weight_decay p; if centered, v - m^2 stands under the root with
    m = alpha m + (1 - alpha) g; with momentum, b = momentum b + d stands for d.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize: as torch.optim.RMSprop. lr may be a tensor of
            one element.
        capturable: accepted, without effect: once a first step has made the state, a step on a GPU can be captured.
        foreach: accepted, kept in the state_dict, and without effect: there is one way to step.
        differentiable: must be False.
        max_grad_norm, master_weights, state_dtype: see the module.

    Raises:
        ValueError: an argument out of range, as torch.
        NotImplementedError: differentiable=True, or complex parameters: torch.optim.RMSprop takes them.
        RuntimeError: in step, a sparse gradient: torch.optim.SparseAdam takes it.

    Sources: Tieleman and Hinton, Coursera lecture 6.5, 2012; centered, Graves, arXiv:1308.0850.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> p.grad = torch.tensor([0.5, -4.0])
    >>> RMSprop([p], lr=0.01).step()
    >>> p.data
    tensor([ 0.9000, -0.9000])
    """

    _rule = ops.RMSPROP

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, master_weights, state_dtype)
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )


class Adam(_MultiTensor, torch.optim.Adam):
    """torch.optim.Adam with all parameters of a step, of all groups, in one kernel launch after a small one.

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    where g is the gradient, negated if maximize, + weight_decay p; with decoupled_weight_decay p is first multiplied by
    1 - lr weight_decay instead; with amsgrad the largest v so far stands for v.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as torch.optim.Adam. lr may be a
            tensor of one element.
        foreach, fused: accepted, kept in the state_dict, and without effect: there is one way to step.
        capturable: accepted, without effect: once a first step has made the state, a step on a GPU can be captured.
        differentiable: must be False.
        max_grad_norm, master_weights, state_dtype: see the module.

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

    _rule = ops.ADAM

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
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._set_extras(max_grad_norm, master_weights, state_dtype)
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

    _rule = ops.ADAMW

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
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
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
            max_grad_norm=max_grad_norm,
            master_weights=master_weights,
            state_dtype=state_dtype,
        )
