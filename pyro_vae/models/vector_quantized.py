"""The VQ-VAE told as a probabilistic model: a prior over codes, and a decoder of codes."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.pair import PairModule, plate_size


class Codebook(nn.Module):
    r"""`K` vectors, and a categorical prior over them at each of `M` positions.

    $$p(z) = \prod_{m=1}^M \sum_{k=1}^K \pi_{mk}\, [z_m = c_k]$$

    The weights start uniform, which makes the KL of a one-hot posterior the constant
    `M log K`; `fit` sets them to the frequencies of the codes of data, so that the model can
    generate.

    Args:
        codes: `K`, at least 2.
        width: `C`, of a code.
        positions: `M`.
        seed: of the first vectors.

    Raises:
        ValueError: fewer than 2 codes, or a width or number of positions below 1.

    References:
        Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu. *Neural Discrete Representation
        Learning*, 2017.

    Example:
        >>> codebook = Codebook(codes=16, width=4, positions=2)
        >>> vectors, index = codebook.quantize(torch.randn(5, 8))
        >>> codebook().log_prob(vectors)
        tensor([-5.5452, -5.5452, -5.5452, -5.5452, -5.5452])
    """

    log_weights: Tensor

    def __init__(self, codes: int, width: int, positions: int, *, seed: int = 0) -> None:
        super().__init__()
        if codes < 2 or width < 1 or positions < 1:
            raise ValueError(
                "a codebook wants codes >= 2, width >= 1, positions >= 1; "
                f"got {codes}, {width} and {positions}"
            )
        generator = torch.Generator().manual_seed(seed)
        self.vectors = nn.Parameter(torch.randn(codes, width, generator=generator))
        weights = torch.full((positions, codes), -float(torch.tensor(codes).log()))
        self.register_buffer("log_weights", weights)

    def forward(self, *context: Tensor) -> CodeDistribution:
        """Return the prior, event shape `(M C,)`."""
        return CodeDistribution(self)

    def quantize(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes of `(..., M C)`: their vectors, and their indices `(..., M)`."""
        parts = encoded.unflatten(-1, (len(self.log_weights), -1))
        index = (parts.unsqueeze(-2) - self.vectors).square().sum(-1).argmin(-1)
        return self.vectors[index].flatten(-2), index

    @torch.no_grad()
    def start(self, encoded: Tensor, *, seed: int = 0) -> None:
        """Put the vectors on encodings of data, `(N, M C)`, chosen at random."""
        parts = encoded.unflatten(-1, (len(self.log_weights), -1)).flatten(0, 1)
        if len(parts) < len(self.vectors):
            raise ValueError(
                f"{len(self.vectors)} codes want at least as many encodings; got {len(parts)}"
            )
        generator = torch.Generator().manual_seed(seed)
        self.vectors.copy_(
            parts[torch.randperm(len(parts), generator=generator)[: len(self.vectors)]]
        )

    @torch.no_grad()
    def fit(self, codes: Tensor) -> None:
        """Set the prior to the frequencies of `(N, M)` codes, with half a count added to each."""
        if codes.dim() != 2 or codes.shape[1] != len(self.log_weights):
            raise ValueError(
                f"codes must be (N, {len(self.log_weights)}); got {tuple(codes.shape)}"
            )
        counts = nn.functional.one_hot(codes, len(self.vectors)).sum(0) + 0.5
        self.log_weights.copy_((counts / counts.sum(-1, keepdim=True)).log())


class CodeDistribution(dist.TorchDistribution):
    """The prior of a `Codebook` over vectors that are codes."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, codebook: Codebook, batch_shape: Any = ()) -> None:
        self.codebook = codebook
        positions, (_, width) = len(codebook.log_weights), codebook.vectors.shape
        super().__init__(
            torch.Size(batch_shape), torch.Size([positions * width]), validate_args=False
        )

    @property
    def support(self) -> Any:
        """Vectors made of codes: a discrete set."""
        return _CODES

    def expand(self, batch_shape: Any, _instance: Any = None) -> CodeDistribution:
        """The same for a larger batch shape."""
        return CodeDistribution(self.codebook, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Σ log π of the codes nearest to `(..., M C)`, in nats."""
        _, index = self.codebook.quantize(value)
        weights = self.codebook.log_weights
        return weights.expand(*index.shape, -1).gather(-1, index.unsqueeze(-1)).sum((-1, -2))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw codes, and return their vectors."""
        shape = torch.Size(sample_shape) + self.batch_shape
        index = torch.distributions.Categorical(logits=self.codebook.log_weights).sample(shape)
        return self.codebook.vectors[index].flatten(-2).detach()


class _Codes(constraints.Constraint):
    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return torch.isfinite(value).all(-1)


_CODES = _Codes()


class VectorQuantizedVAE(PairModule):
    """A decoder of codes: `codebook` is its prior, `guides.QuantizedGuide` its guide.

    After fitting, `model.codebook.fit(guide.codes(x))` makes it generate.

    Args:
        decoder: maps `(..., M C)` to the features of the likelihood.
        codebook: the codes and their prior.
        likelihood: turns features into p(x | z).

    Warning:
        Its ELBO bounds log p(x) with all posterior mass on one code: a hard assignment, as in
        K-means. Compare it with other models only after `codebook.fit`.

    References:
        Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu. *Neural Discrete Representation
        Learning*, 2017.

    Example:
        >>> import pyro_vae as pv
        >>> codebook = Codebook(codes=16, width=4, positions=2)
        >>> decoder, likelihood = pv.networks.MLP(8, 64), pv.likelihoods.Bernoulli()
        >>> model = VectorQuantizedVAE(decoder, codebook, likelihood)
        >>> model(None, size=5).shape
        torch.Size([5, 64])
    """

    def __init__(self, decoder: nn.Module, codebook: Codebook, likelihood: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.codebook = codebook
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Score `x` of shape `(B, D)`, or generate `size` data when `x` is `None`."""
        with pyro.plate("data", plate_size(x, size)):
            z = pyro.sample("z", self.codebook())
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)


def perplexity(codes: Tensor, count: int) -> Tensor:
    r"""$\exp(-\sum_k \hat\pi_k \log \hat\pi_k)$: how many codes are in use, between 1 and `K`.

    Args:
        codes: indices, of any shape.
        count: `K`.

    Example:
        >>> perplexity(torch.tensor([0, 1, 2, 3]), 8)
        tensor(4.)
    """
    shares = torch.bincount(codes.flatten(), minlength=count) / codes.numel()
    return torch.special.entr(shares).sum().exp()
