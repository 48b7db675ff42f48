"""Networks that keep leading batch dimensions, and safe heads for scales.

An encoder maps `x` to the features of a guide, a decoder maps `z` to the features of a
likelihood; any `nn.Module` on `(..., in)` will do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class MLP(nn.Sequential):
    r"""A multilayer perceptron, $h_{k+1} = \phi(W_k h_k + b_k)$, linear at its end.

    Args:
        *widths: input, hidden layers, output.
        activation: makes $\phi$; smooth by default, which quadrature and HMC thank you for.

    Shape:
        `(..., widths[0])` to `(..., widths[-1])`.

    Raises:
        ValueError: fewer than two widths, or one that is not a positive integer.

    Example:
        >>> MLP(64, 128, 2)(torch.zeros(5, 3, 64)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(self, *widths: int, activation: Callable[[], nn.Module] = nn.SiLU) -> None:
        _check_widths(widths)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])


def positive(raw: Tensor, floor: float = 1e-4) -> Tensor:
    """Map the reals to (floor, ∞): softplus, since exp overflows on a wild first step.

    Example:
        >>> positive(torch.tensor([-1e3, 0.0, 1e3]))
        tensor([1.0000e-04, 6.9325e-01, 1.0000e+03])
    """
    return softplus(raw) + floor


def raw_positive(value: Tensor, floor: float = 1e-4) -> Tensor:
    """The inverse of `positive`.

    Example:
        >>> positive(raw_positive(torch.tensor([0.5, 3.0])))
        tensor([0.5000, 3.0000])
    """
    rest = value - floor
    return rest + torch.log(-torch.expm1(-rest))


class GatedLinear(nn.Module):
    r"""$(W x + b) \odot \sigma(V x + c)$, with no other non-linearity.

    References:
        Yann N. Dauphin, Angela Fan, Michael Auli, David Grangier. *Language Modeling with
        Gated Convolutional Networks*, 2017; as used by Tomczak & Welling, 2018.

    Example:
        >>> GatedLinear(4, 3)(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(inputs, outputs)
        for layer in (self.value, self.gate):
            nn.init.normal_(layer.weight, std=(2 / inputs) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., inputs)` to `(..., outputs)`."""
        return self.value(x) * self.gate(x).sigmoid()


class GatedMLP(nn.Sequential):
    """`MLP` with gated hidden layers, linear at its end; the VampPrior paper's networks.

    Args:
        *widths: input, hidden layers, output.

    Raises:
        ValueError: fewer than two widths, or one that is not a positive integer.

    Example:
        >>> GatedMLP(784, 300, 300, 80)(torch.zeros(5, 784)).shape
        torch.Size([5, 80])
    """

    def __init__(self, *widths: int) -> None:
        _check_widths(widths)
        hidden = [GatedLinear(a, b) for a, b in pairwise(widths[:-1])]
        super().__init__(*hidden, nn.Linear(widths[-2], widths[-1]))


class Merge(nn.Module):
    """A network of several inputs: one branch each, side by side into a head.

    Args:
        *branches: networks, the n-th for the n-th input.
        head: maps their joined outputs.

    Shape:
        `(..., in_n)` for each input, leading dimensions broadcast, to `(..., out)`.

    Example:
        >>> network = Merge(MLP(4, 8), MLP(2, 8), head=MLP(16, 3))
        >>> network(torch.zeros(5, 4), torch.zeros(7, 5, 2)).shape
        torch.Size([7, 5, 3])
    """

    def __init__(self, *branches: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.head = head

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map one tensor a branch to `(..., out)`."""
        parts = [branch(x) for branch, x in zip(self.branches, inputs, strict=True)]
        leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.head(torch.cat([part.expand(*leading, -1) for part in parts], -1))


class OneHot(nn.Module):
    """Class indices `(...)` as `(..., classes)` of zeros and a one.

    Args:
        classes: how many there are.

    Raises:
        ValueError: an index outside `0..classes - 1`.

    Example:
        >>> OneHot(3)(torch.tensor([2]))
        tensor([[0., 0., 1.]])
    """

    rows: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.eye(classes), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """Return floats of the module's dtype."""
        _check_index(y, len(self.rows), "class", "classes")
        return self.rows[y.long()]


class Tokens(nn.Module):
    """Tokens with positions: a sum of two embeddings for each place, flattened.

    Args:
        vocabulary: how many tokens there are.
        length: `T`, the places.
        width: of an embedding.

    Shape:
        `(..., T)` integers to `(..., T * width)`.

    Raises:
        ValueError: a token outside `0..vocabulary - 1`.

    Example:
        >>> Tokens(10, 4, 8)(torch.zeros(5, 4)).shape
        torch.Size([5, 32])
    """

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """Embed and flatten."""
        _check_index(x, self.token.num_embeddings, "token", "the vocabulary of")
        return (self.token(x.long()) + self.position).flatten(-2)


class Conv(nn.Sequential):
    """A 3×3 convolution and SiLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.SiLU())


class GatedConv(nn.Module):
    """A 3×3 convolution times the sigmoid of another."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.both = nn.Conv2d(inputs, 2 * outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, inputs, H, W)` to `(N, outputs, H', W')`."""
        return nn.functional.glu(self.both(x), dim=1)


class ConvEncoder(nn.Module):
    """Convolutions of stride 2 on images given as rows, then a linear layer.

    Args:
        image_shape: `(height, width)`, of any size.
        channels: of each convolution.
        outputs: features at the end.
        block: `Conv` or `GatedConv`.

    Shape:
        `(..., height * width)` to `(..., outputs)`.

    Example:
        >>> ConvEncoder((28, 20), (8, 16), 4, block=GatedConv)(torch.zeros(5, 560)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self, image_shape: tuple[int, int], channels: tuple[int, ...], outputs: int, *,
        block: Callable[[int, int, int], nn.Module] = Conv,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_shape = image_shape
        self.convolutions = nn.Sequential(*(block(a, b, 2) for a, b in pairwise((1, *channels))))
        height, width = _halved(image_shape, len(channels))
        self.head = nn.Linear(channels[-1] * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of pixels to features."""
        images = x.reshape(-1, 1, *self.image_shape)
        return self.head(self.convolutions(images).flatten(1)).reshape(*x.shape[:-1], -1)


class ConvDecoder(nn.Module):
    """A linear layer, then upsampling and convolutions, to features of each pixel.

    Args:
        inputs: `L`.
        channels: of each convolution, from the smallest image on.
        image_shape: `(height, width)`, of any size.
        features: of each pixel, as the likelihood wants them: `likelihood.features(1)`.
        block: `Conv` or `GatedConv`.

    Shape:
        `(..., inputs)` to `(..., features * height * width)`.

    Example:
        >>> ConvDecoder(2, (16, 8), (28, 20))(torch.zeros(7, 5, 2)).shape
        torch.Size([7, 5, 560])
    """

    def __init__(
        self, inputs: int, channels: tuple[int, ...], image_shape: tuple[int, int], *,
        features: int = 1, block: Callable[[int, int, int], nn.Module] = Conv,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes = [_halved(image_shape, k) for k in reversed(range(len(channels) + 1))]
        self.start = nn.Linear(inputs, channels[0] * self.sizes[0][0] * self.sizes[0][1])
        widths = (channels[0], *channels)
        self.blocks = nn.ModuleList(block(a, b, 1) for a, b in pairwise(widths))
        self.head = nn.Conv2d(channels[-1], features, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents to features, in blocks of one for each pixel."""
        images = self.start(z).reshape(z.shape[:-1].numel(), -1, *self.sizes[0])
        for size, block in zip(self.sizes[1:], self.blocks, strict=True):
            images = block(nn.functional.interpolate(images, size=size))
        return self.head(images).reshape(*z.shape[:-1], -1)


def _halved(shape: tuple[int, int], times: int) -> tuple[int, int]:
    height, width = shape
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _check_widths(widths: tuple[int, ...]) -> None:
    if len(widths) < 2 or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(f"a network wants at least two widths, integers >= 1; got {widths}")


def _check_index(index: Tensor, count: int, what: str, of: str) -> None:
    good = (index >= 0) & (index < count) & (index == index.round())
    if not good.all():
        bad = index[~good][0].item()
        raise ValueError(f"{what} {bad:g} is out of range 0..{count - 1}, {of} {count}")
