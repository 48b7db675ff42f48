"""A tensor function recorded once as a graph, to replay or to compile."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Outputs = Any
"""A tensor, or a tuple of tensors."""


class CannotCaptureError(RuntimeError):
    """The function asks for the value of a tensor, or does what no graph can hold."""


class Recorded:
    """A function of tensors as the operations that one call of it made.

    What Python did between the operations (effect handlers, shapes, branches, numbers) happened
    once, at the recording. What tensors hold is looked up anew in every call: the inputs, the
    tensors that the function closes over, which it may change in place, and fresh draws of torch;
    draws of numpy or Python happened at the recording.

    Args:
        function: called once, with gradients on, on stand-ins that have shapes and no values:
            nothing is changed.
        inputs: tensors like those of later calls; their shapes are part of the recording.

    Attributes:
        constants: the tensors that the function closes over.
        present: of each output, whether it is a tensor, not `None`.

    Raises:
        CannotCaptureError: the function looks at a value, as `if x.sum() > 0` or `x.item()` do.

    Example:
        >>> weight = torch.ones(3)
        >>> double = Recorded(lambda x: 2 * weight * x, torch.zeros(3))
        >>> weight.fill_(5.0)
        tensor([5., 5., 5.])
        >>> double(torch.ones(3))
        tensor([10., 10., 10.])
    """

    def __init__(self, function: Callable[..., Outputs], *inputs: Tensor) -> None:
        before = _Untouched()

        def watched(*inputs: Tensor) -> Outputs:
            with before:
                return function(*inputs)

        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = make_fx(watched, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:  # whatever a foreign function raises on stand-ins
            raise CannotCaptureError(f"{type(error).__name__}: {_first_line(error)}") from error
        finally:
            before.restore()
        strange = [n for n in found.graph.find_nodes(op="get_attr") if not _is_tensor(found, n)]
        if strange:
            raise CannotCaptureError(f"the function uses {strange[0].target}, which is no tensor")
        self.graph, self.constants = _lifted(found)
        outputs = self.graph.graph.output_node().args[0]
        self.present = (
            [part is not None for part in outputs] if isinstance(outputs, tuple) else [True]
        )

    def __call__(self, *inputs: Tensor) -> Outputs:
        """Run the operations one by one."""
        with torch.no_grad():
            return self.graph(*self.constants, *inputs)

    def compiled(self, *inputs: Tensor) -> Callable[..., Outputs]:
        """The same function as machine code, for inputs of these shapes.

        Operations are fused by TorchInductor, without a guard at each call; random draws are
        those of the uncompiled function. On a GPU calls are replayed as a CUDA graph.

        Raises:
            CannotCaptureError: no compiler, or an operation that it does not know.
        """
        on_gpu = inputs[0].is_cuda
        options = {
            "fallback_random": True,  # the draws of the same seed, compiled or not
            "cpp_wrapper": not on_gpu,
            "triton.cudagraphs": on_gpu,
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = torch._inductor.compile(  # it rewrites the graph that it is given
                    GraphModule({}, copy.deepcopy(self.graph.graph)),
                    [*self.constants, *inputs],
                    options=options,
                )
                constants = self.constants
        except Exception as error:  # the compiler's own zoo
            raise CannotCaptureError(f"{type(error).__name__}: {_first_line(error)}") from error

        def call(*inputs: Tensor) -> Outputs:
            with torch.no_grad():
                return run(*constants, *inputs)

        return call


class _Untouched(TorchDispatchMode):
    """Remembers what operations change in place: those that see no stand-in do run."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, given in zip(func._schema.arguments, args, strict=False):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if changed and type(given) in (Tensor, Parameter) and id(given) not in self.values:
                with _disable_current_modes():
                    self.values[id(given)] = given.detach(), given.detach().clone()
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        """Put the values back."""
        for tensor, value in self.values.values():
            tensor.copy_(value)


def _is_tensor(module: GraphModule, node: Node) -> bool:
    return isinstance(getattr(module, str(node.target)), Tensor)


def _lifted(found: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The graph with the tensors that it closed over as its first inputs."""
    tensors = {
        id(value): value
        for node in found.graph.nodes
        if node.op == "get_attr"
        for value in [getattr(found, str(node.target))]
    }
    graph, places = Graph(), dict[Node, Node]()
    lifted = {key: graph.placeholder(f"constant_{n}") for n, key in enumerate(tensors)}
    for node in found.graph.nodes:
        if node.op == "get_attr":
            places[node] = lifted[id(getattr(found, str(node.target)))]
        else:
            places[node] = graph.node_copy(node, lambda other: places[other])
            places[node].meta = {}
    graph.eliminate_dead_code()
    return GraphModule({}, graph), [value.detach() for value in tensors.values()]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if not lines and error.__cause__ is not None:
        return _first_line(error.__cause__)
    return lines[0] if lines else "no reason given"
