"""Adam's update as tensor operations, for a step that is recorded whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer


class AdamUpdate:
    r"""The update of an ordinary `torch.optim.Adam` or `AdamW`, on that optimizer's own state.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,
      \quad \theta \leftarrow \theta - \eta\,\frac{m / (1 - \beta_1^t)}
      {\sqrt{v / (1 - \beta_2^t)} + \epsilon}$$

    What depends on the step `t` is put into `numbers` beforehand, by `prepare`: the update
    itself reads tensors only, so a recording of it holds for every step and learning rate.
    The optimizer's own `step()` may be called in between, after `settle` and before `read`.

    Args:
        optimizer: one for which `knows` holds.
        parameters: those it was made with.

    References:
        Diederik P. Kingma, Jimmy Ba. *Adam: A Method for Stochastic Optimization*, 2015.
        Ilya Loshchilov, Frank Hutter. *Decoupled Weight Decay Regularization*, 2019.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        self.group = optimizer.param_groups[0]
        self.decoupled = self.group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
        self.numbers = torch.zeros(3, device=parameters[0].device, dtype=parameters[0].dtype)
        for parameter in parameters:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros(
                        (), dtype=torch.float32, device=_home(optimizer, parameter)
                    ),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        self.state = [optimizer.state[parameter] for parameter in parameters]
        self.parameters = parameters
        self.read()

    @staticmethod
    def knows(optimizer: Optimizer) -> bool:
        """Whether this is the plain rule: one group, no AMSGrad, no sign change."""
        return (
            type(optimizer) in (Adam, AdamW)
            and len(optimizer.param_groups) == 1
            and not optimizer.param_groups[0]["amsgrad"]
            and not optimizer.param_groups[0]["maximize"]
        )

    def settle(self) -> None:
        """Tell the optimizer how many steps were taken."""
        for state in self.state:
            state["step"].fill_(self.taken)

    def read(self) -> None:
        """Learn from the optimizer how many steps were taken."""
        self.taken = int(self.state[0]["step"].item())

    def prepare(self) -> None:
        """Count a step, and put step size, √(1 − β₂ᵗ) and decay of the weights into place."""
        self.taken += 1
        step, lr = self.taken, float(self.group["lr"])
        first, second = self.group["betas"]
        shrink = 1 - lr * self.group["weight_decay"] if self.decoupled else 1.0
        numbers = [lr / (1 - first**step), (1 - second**step) ** 0.5, shrink]
        self.numbers.copy_(torch.tensor(numbers, dtype=self.numbers.dtype))

    def __call__(self, gradients: list[Tensor]) -> None:
        """Move the parameters."""
        size, correction, shrink = self.numbers.unbind()
        (first, second), decay = self.group["betas"], self.group["weight_decay"]
        for parameter, state, g in zip(self.parameters, self.state, gradients, strict=True):
            if decay and self.decoupled:
                parameter.mul_(shrink)
            elif decay:
                g = g + decay * parameter
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            parameter.sub_(size * m / (v.sqrt() / correction + self.group["eps"]))


def _home(optimizer: Optimizer, parameter: Tensor) -> torch.device:
    """Where the optimizer keeps the count of steps."""
    group = optimizer.param_groups[0]
    on_device = group["fused"] or group["capturable"]
    return parameter.device if on_device else torch.device("cpu")
