"""A parent with siblings, and what the tests of siblings ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from models import randomize_adapters
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rasa_ext import RaSALinear, apply

K = 24
NAMES = ("q_proj", "k_proj", "v_proj")


def nothing(x: Tensor) -> None:
    pass


class Attention(nn.Module):
    """q, k and v of one x, or k and v of memory; `between` runs after q."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(K, 16)
        self.k_proj = nn.Linear(K, 8, bias=False)
        self.v_proj = nn.Linear(K, 8)
        self.between: Callable[[Tensor], Tensor | None] = nothing

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q = self.q_proj(x) * 0.5
        x = x if memory is None else memory
        replaced = self.between(x)
        x = x if replaced is None else replaced
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.narrow = nn.Linear(32, K)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.narrow(layer(x)).tanh()
        return x


def adapted(model: nn.Module, **kwargs) -> nn.Module:
    apply(model, **{"r": 4, "k": 1, "target_modules": NAMES, "dropout": 0.0} | kwargs)
    return randomize_adapters(model)


def make_attention(**kwargs) -> Attention:
    torch.manual_seed(0)
    return adapted(Attention(), **kwargs)


def make_model(**kwargs) -> Model:
    torch.manual_seed(0)
    return adapted(Model(), **kwargs)


class Calls(TorchDispatchMode):
    """How many layers each call of the forward op computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.rasa_ext.rasa_linears.default:
            self.layers.append(len(args[1]))
        elif func is torch.ops.rasa_ext.rasa_linear.default:  # in inference mode
            self.layers.append(1)
        return func(*args, **(kwargs or {}))


def calls_of(fn: Callable[[], object]) -> list[int]:
    with Calls() as calls:
        fn()
    return calls.layers


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    """By backward(), which reentrant checkpointing asks for."""
    for t in of:
        t.grad = None
    y.square().sum().backward()
    grads = [t.grad for t in of]
    for t in of:
        t.grad = None
    return grads


def outputs_and_gradients(model: nn.Module, x: Tensor, run=None) -> list[Tensor]:
    """The output, and the gradients of x and of what trains, with one seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = model(x) if run is None else run(x)
    return [y.detach(), *gradients(y, [x, *trained(model)])]


def assert_same(first: list[Tensor], second: list[Tensor], x_is_exact: bool = True) -> None:
    """Bit by bit but, unless x_is_exact, x's gradient: a sum in another order."""
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if i == 1 and not x_is_exact:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b), i


@contextmanager
def separate(model: nn.Module) -> Iterator[None]:
    """Within it, every layer is computed on its own: a hook that does nothing is on each."""
    layers = [m for m in model.modules() if isinstance(m, RaSALinear)]
    handles = [layer.register_forward_hook(lambda *args: None) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def kept_tensors(group) -> int:
    return sum(len(turn.outputs) for turn in group._turns.values())
