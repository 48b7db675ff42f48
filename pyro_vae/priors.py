"""Priors p(z): modules that return a distribution with event shape `(L,)` when called.

A prior is called with the context of its model: nothing in a VAE, the labels in a conditional
VAE, the latents above in a hierarchy. Those that do not depend on it ignore it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import linear
from torch.utils._python_dispatch import _disable_current_modes

from pyro_vae.checks import refuse
from pyro_vae.flows import FlowDistribution, spline_flow
from pyro_vae.networks import positive, raw_positive
from pyro_vae.pair import evaluating


class StandardNormal(nn.Module):
    r"""$p(z) = \mathcal N(0, I_L)$.

    Args:
        latent_dim: `L`.

    Raises:
        ValueError: `latent_dim` is no integer of at least 1.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> StandardNormal(2)().log_prob(torch.zeros(2)).item()
        -1.8378770351409912
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim))
        self.register_buffer("scale", torch.ones(latent_dim))

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        """Return the distribution, event shape `(L,)`."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class DiagonalNormal(nn.Module):
    r"""$p(z) = \mathcal N(\mu, \mathrm{diag}\,\sigma^2)$, both learned.

    Args:
        latent_dim: `L`.

    Warning:
        A decoder whose first layer is affine can express the same: it adds nothing there.

    Raises:
        ValueError: `latent_dim` is no integer of at least 1.

    References:
        Matthew D. Hoffman, Matthew J. Johnson. *ELBO Surgery*, 2016.

    Example:
        >>> DiagonalNormal(2)().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(raw_positive(torch.ones(latent_dim)))

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        """Return the distribution, event shape `(L,)`."""
        return dist.Normal(self.loc, positive(self.raw_scale)).to_event(1)


class NormalMixture(dist.MixtureSameFamily):  # type: ignore[misc]  # Any, to mypy
    """A mixture of factorised Gaussians that NUTS and `Predictive` accept, for any `L`.

    Pyro's `MixtureSameFamily` declares a support that nothing can transform to the reals.

    Example:
        >>> parts = dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)
        >>> mixture = NormalMixture(dist.Categorical(torch.ones(2) / 2), parts)
        >>> mixture.responsibilities(torch.tensor([[0.0], [5.0]]))
        tensor([[5.0000e-01, 5.0000e-01],
                [4.2484e-18, 1.0000e+00]])
    """

    support = constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same for a larger batch shape; its components are not repeated."""
        return ExpandedDistribution(self, torch.Size(batch_shape))

    def log_prob(self, z: Tensor) -> Tensor:
        """Score latents, `(..., L)` to `(...)` nats."""
        if self._validate_args:
            self._validate_sample(z)
        joint = self._joint(z)
        floor = joint.detach().amax(-1, keepdim=True) - 80  # exp of less is subnormal, and slow
        return joint.clamp_min(floor).logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw latents; factorised components from the chosen one alone, not from all K."""
        normal = self._factorised()
        if normal is None:
            return super().sample(torch.Size(sample_shape))
        with torch.no_grad():
            component = self.mixture_distribution.sample(torch.Size(sample_shape))
            return torch.normal(normal.loc[component], normal.scale[component])

    def responsibilities(self, z: Tensor) -> Tensor:
        """The probability of each component given `z`, `(..., L)` to `(..., K)`."""
        return self._joint(z).softmax(-1)

    def usage(self, z: Tensor) -> Tensor:
        """How much each component is used by latents `(..., L)`: `(K,)`, sums to 1."""
        shares = self.responsibilities(z)
        return shares.reshape(-1, shares.shape[-1]).mean(0)

    def _joint(self, z: Tensor) -> Tensor:
        """Log π_k N_k(z), `(..., L)` to `(..., K)`."""
        log_weight, normal = self.mixture_distribution.logits, self._factorised()
        if normal is not None:
            return _factorised_log_prob(z, normal.loc, normal.scale, log_weight)
        return self.component_distribution.log_prob(z.unsqueeze(-2)) + log_weight

    def _factorised(self) -> Any:
        """The normals `(K, L)` of the components, if one mixture of such is what this is."""
        parts = self.component_distribution
        if not isinstance(parts, dist.Independent) or self.mixture_distribution.batch_shape:
            return None
        normal = parts.base_dist
        plain = isinstance(normal, dist.Normal) and parts.reinterpreted_batch_ndims == 1
        return normal if plain and normal.loc.dim() == 2 else None


def _factorised_log_prob(z: Tensor, loc: Tensor, scale: Tensor, log_weight: Tensor) -> Tensor:
    r"""Log densities of all components by one matrix product, not `(..., K, L)` numbers.

    $(z - \mu)^2 / \sigma^2$ multiplied out cancels to an error of $\varepsilon \sum_l (z_l^2 +
    \mu_l^2) / \sigma_l^2$ nats, at $z = \mu = 10, \sigma = 10^{-3}, L = 40$ 500 in
    float32: hence float64, where it is 1e-6.
    """
    wide, loc, scale = z.double(), loc.double(), scale.double()
    precision = scale.square().reciprocal()
    shift = loc * precision
    constant = -(loc * shift / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(-1) + log_weight
    forms = torch.cat([-precision / 2, shift, constant.unsqueeze(-1)], -1)
    features = torch.cat([wide.square(), wide, torch.ones_like(wide[..., :1])], -1)
    return linear(features, forms).to(z.dtype)


class GaussianMixture(nn.Module):
    r"""$p(z) = \sum_k \pi_k \mathcal N(z; \mu_k, \mathrm{diag}\,\sigma_k^2)$, all learned.

    Args:
        latent_dim: `L`.
        components: `K`, at least 2.
        seed: of the first means, drawn from $\mathcal N(0, I)$.

    Raises:
        ValueError: `latent_dim` below 1, or a mixture of one.

    References:
        Nat Dilokthanakul et al. *Deep Unsupervised Clustering with Gaussian Mixture
        Variational Autoencoders*, 2016.

    Example:
        >>> prior = GaussianMixture(2, 10)
        >>> prior().sample((5,)).shape, prior().usage(torch.zeros(5, 2)).shape
        (torch.Size([5, 2]), torch.Size([10]))
    """

    def __init__(self, latent_dim: int, components: int, *, seed: int = 0) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        _check_components(components)
        generator = torch.Generator().manual_seed(seed)
        shape = (components, latent_dim)
        self.loc = nn.Parameter(torch.randn(shape, generator=generator))
        self.raw_scale = nn.Parameter(raw_positive(torch.full(shape, 0.7)))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self, *context: Tensor) -> NormalMixture:
        """Return the distribution, event shape `(L,)`."""
        parts = dist.Normal(self.loc, positive(self.raw_scale)).to_event(1)
        return NormalMixture(dist.Categorical(logits=self.logits), parts)


class VampPrior(nn.Module):
    r"""A mixture of the guide's posteriors at learned pseudo-inputs.

    $$p(z) = \sum_{k=1}^K \pi_k\, q(z \mid u_k)$$

    In training mode gradients flow to the pseudo-inputs and through the posterior to its
    encoder, which the guide owns and this prior only calls. In eval mode the components are
    constants: computed once, with the encoder in eval mode, and again after a parameter of
    either has changed. Copy model and guide together, `deepcopy((model, guide))`.

    Args:
        posterior: the callable $x \mapsto q(z \mid x)$, such as `guide.posterior`.
        pseudo_inputs: where the `K` pseudo-inputs start, `(K, D)`.
        data_range: the pseudo-inputs stay in between, by a sigmoid, and start within its middle
            90 %; `None` for real data, or for pseudo-inputs that are the data themselves.
        learned_weights: fit $\pi$, instead of $1/K$.

    Warning:
        There is no closed KL to it. Started at the data, with large `K`, it approaches the
        aggregate posterior of the *training* data: compare its KL on held-out data.

    Raises:
        ValueError: a mixture of one, pseudo-inputs of another shape or outside the range.

    References:
        Jakub M. Tomczak, Max Welling. *VAE with a VampPrior*, 2018.

    Example:
        >>> import pyro_vae as pv
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(64, 32, 4))
        >>> prior = VampPrior(guide.posterior, torch.rand(50, 64))
        >>> prior().log_prob(torch.zeros(3, 2)).shape, prior().sample((5,)).shape
        (torch.Size([3]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        posterior: Callable[[Tensor], Any],
        pseudo_inputs: Tensor,
        *,
        data_range: tuple[float, float] | None = (0.0, 1.0),
        learned_weights: bool = False,
    ) -> None:
        super().__init__()
        if pseudo_inputs.dim() != 2:
            refuse(
                "pseudo_inputs are no rows of data",
                expected="shape (K, D)",
                got=tuple(pseudo_inputs.shape),
                advice="VampPrior.from_data(guide.posterior, x, 100)",
            )
        _check_components(len(pseudo_inputs))
        self._posterior = (posterior,)  # in a tuple, so that a module is not registered here
        self.data_range = data_range
        self.raw = nn.Parameter(self._to_raw(pseudo_inputs))
        weights = torch.zeros(len(pseudo_inputs))
        self.logits = nn.Parameter(weights, requires_grad=learned_weights)
        self._cache: tuple[Any, NormalMixture] | None = None

    @classmethod
    def from_data(
        cls, posterior: Callable[[Tensor], Any], x: Tensor, components: int, *, seed: int = 0,
        **options: Any,
    ) -> VampPrior:  # fmt: skip
        """Start from `components` rows of `x`, drawn without replacement.

        Raises:
            ValueError: more components than rows.
        """
        if components > len(x):
            refuse(
                "more pseudo-inputs than data to start them from",
                expected=f"components <= {len(x)}",
                got=components,
                advice="fewer components, or VampPrior.at_random",
            )
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        return cls(posterior, x[index[:components]].clone(), **options)

    @classmethod
    def at_random(
        cls, posterior: Callable[[Tensor], Any], components: int, observed: int, *,
        mean: float = 0.5, sd: float = 0.1, seed: int = 0, **options: Any,
    ) -> VampPrior:  # fmt: skip
        """Start from noise of `observed` numbers around `mean`, for data in [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(components, observed, generator=generator)
        return cls(posterior, (mean + sd * noise).clamp(0, 1), **options)

    @property
    def pseudo_inputs(self) -> Tensor:
        """`u`, of shape `(K, D)`, in the range of the data."""
        if self.data_range is None:
            return self.raw
        low, high = self.data_range
        return low + (high - low) * self.raw.sigmoid()

    def forward(self, *context: Tensor) -> NormalMixture:
        """Return the distribution, event shape `(L,)`."""
        owner = getattr(self._posterior[0], "__self__", self._posterior[0])
        learning = torch.is_grad_enabled() and self.raw.requires_grad
        if self.training or learning or not isinstance(owner, nn.Module):
            return self._mixture()
        tensors = [*self.parameters(), *owner.parameters(), *owner.buffers()]
        with _disable_current_modes():  # constants of a recording, too
            key = [(t.data_ptr(), t.dtype, t._version, t.detach().sum().item()) for t in tensors]
            if self._cache is None or self._cache[0] != key:
                with evaluating(owner), torch.no_grad():
                    self._cache = key, self._mixture()
            return self._cache[1]

    def _mixture(self) -> NormalMixture:
        parts = self._posterior[0](self.pseudo_inputs)
        if parts.event_shape == () or len(parts.batch_shape) != 1:
            refuse(
                "the posterior of a VampPrior returns no row of latents for each pseudo-input",
                expected="batch shape (K,), event shape (L,)",
                got=f"batch shape {tuple(parts.batch_shape)}, event {tuple(parts.event_shape)}",
                advice="guide.posterior of an amortized guide",
            )
        return NormalMixture(dist.Categorical(logits=self.logits), parts)

    def _to_raw(self, pseudo_inputs: Tensor) -> Tensor:
        if self.data_range is None:
            return pseudo_inputs.detach().clone()
        low, high = self.data_range
        unit = (pseudo_inputs - low) / (high - low)
        if not ((unit >= 0) & (unit <= 1)).all():
            refuse(
                "pseudo_inputs are outside the range of the data",
                expected=f"values in {self.data_range}",
                got=f"{pseudo_inputs.min():g} to {pseudo_inputs.max():g}",
                advice="data_range=(low, high) of your data, or None for real data",
            )
        return unit.clamp(0.05, 0.95).logit()  # binary rows at 0 and 1 would have no gradient


class FlowPrior(nn.Module):
    """A prior modelled by a neural network: an autoregressive spline flow on N(0, I).

    Scored in one pass, sampled in `L`: made to be scored often.

    Args:
        latent_dim: `L`.
        transforms: splines stacked.
        hidden: widths of the networks that give their knots.

    Warning:
        Splines act within [-5, 5] and are the identity beyond.

    Raises:
        ValueError: `latent_dim` is no integer of at least 1.

    References:
        Conor Durkan, Artur Bekasov, Iain Murray, George Papamakarios. *Neural Spline
        Flows*, 2019.
        Xi Chen et al. *Variational Lossy Autoencoder*, 2017 (a flow as the prior of a VAE).

    Example:
        >>> FlowPrior(2)().log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(
        self, latent_dim: int, *, transforms: int = 2, hidden: tuple[int, ...] = (64, 64)
    ) -> None:
        super().__init__()
        _check_count("latent_dim", latent_dim)
        self.flow = spline_flow(latent_dim, transforms=transforms, hidden=hidden)

    def forward(self, *context: Tensor) -> FlowDistribution:
        """Return the distribution, event shape `(L,)`."""
        return FlowDistribution(self.flow())


class ConditionalNormal(nn.Module):
    r"""$p(z \mid c) = \mathcal N(\mu(c), \mathrm{diag}\,\sigma(c)^2)$: given labels or latents.

    Args:
        network: maps the context to `(..., 2 L)`: means, then raw scales.

    References:
        Kihyuk Sohn, Honglak Lee, Xinchen Yan. *Learning Structured Output Representation
        using Deep Conditional Generative Models*, 2015.

    Example:
        >>> ConditionalNormal(nn.Linear(3, 4))(torch.zeros(5, 3)).mean.shape
        torch.Size([5, 2])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *context: Tensor) -> dist.TorchDistribution:
        """Return the distribution, batch shape of the context, event shape `(L,)`."""
        features = self.network(*context)
        if features.shape[-1] % 2:
            raise ValueError(f"ConditionalNormal wants 2 L features; got {features.shape[-1]}")
        loc, raw_scale = features.chunk(2, dim=-1)
        return dist.Normal(loc, positive(raw_scale)).to_event(1)


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")


def _check_components(count: int) -> None:
    if not isinstance(count, int) or count < 2:
        refuse(
            "a mixture needs more than one component",
            expected="components >= 2",
            got=count,
            advice="DiagonalNormal for a single Gaussian",
        )
