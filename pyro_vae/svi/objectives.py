"""What SVI can maximise besides `Trace_ELBO`, each by hand from the densities of the pair.

All are Pyro ELBOs: `objective(model, guide)` is a module with a differentiable loss, and
`SVI(model, guide, optim, objective)` works. Losses are sums over the batch, or over all data
where a plate subsamples; `fit` divides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import detach, scale_and_mask
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.pair import (
    Guide,
    LogDensities,
    Model,
    densities,
    latent_sites,
    log_densities,
    trace_pair,
)


class Objective(Trace_ELBO):
    """A loss of per-datum log densities of `draws` particles; abstract.

    Args:
        draws: `S`, particles for each datum, vectorised.
    """

    def __init__(self, draws: int = 1) -> None:
        if not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws must be an integer >= 1; got {draws!r}")
        super().__init__(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
        self.step = 0

    def per_datum(self, found: LogDensities) -> Tensor:
        """The quantity to maximise, from `(S, B)` densities to `(B,)` nats."""
        raise NotImplementedError

    def at(self, step: int) -> None:
        """Put in place what varies with the step, counted from 0; here nothing does."""

    def tensor_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data, by operations on tensors alone: it can be recorded."""
        found = log_densities(model, guide, batch, self.num_particles)
        return -_common(found, self) * (self.per_datum(found) - found.factors.mean(0)).sum()

    def differentiable_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data; with gradients on, it counts as a step."""
        self.at(self.step)
        self.step += torch.is_grad_enabled()
        return self.tensor_loss(model, guide, *batch)

    def loss(self, model: Model, guide: Guide, *batch: Any) -> float:
        """Minus the sum over data, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Model, guide: Guide, *batch: Any) -> float:
        """Minus the sum over data; its gradient is added to the parameters."""
        loss = self.differentiable_loss(model, guide, *batch)
        loss.backward()
        return loss.item()


class ELBO(Objective):
    """What `Trace_ELBO` estimates for a reparameterized guide, by operations on tensors alone.

    Args:
        draws: particles for each datum.

    Warning:
        For a guide that is not reparameterized its gradient is wrong: `Trace_ELBO` adds the
        score-function term.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> ELBO()(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def per_datum(self, found: LogDensities) -> Tensor:
        """The mean over draws of log p(x, z) − log q(z | x)."""
        return found.log_weight.mean(0)


class Beta(Objective):
    r"""$\mathbb E_q[\log p(x \mid z)] - \beta\,\mathrm{KL}(q \,\|\, p(z))$: beta-VAE and warm-up.

    Args:
        beta: the weight, at least 0; or a function of the step, counted from 0, such as
            `warm_up(1000)`; `fit` starts the count anew.
        draws: particles for each datum.

    Warning:
        A bound on log p(x) only for β ≥ 1, and not comparable across β: judge a fit by its
        plain ELBO, which `fit` reports whatever the objective.

    References:
        Irina Higgins et al. *beta-VAE: Learning Basic Visual Concepts with a Constrained
        Variational Framework*, 2017.
        Casper Kaae Sønderby et al. *Ladder Variational Autoencoders*, 2016 (warm-up).

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> run = pv.fit(model, guide, (torch.rand(9, 3),), epochs=2, progress=False,
        ...              objective=Beta(warm_up(10)))
    """

    def __init__(self, beta: float | Callable[[int], float], *, draws: int = 1) -> None:
        super().__init__(draws)
        if not callable(beta) and not 0 <= beta < math.inf:
            raise ValueError(f"beta must be >= 0 and finite; got {beta}")
        self.beta = beta
        self.weight = torch.zeros((), dtype=torch.float64)
        self.at(0)

    def at(self, step: int) -> None:
        """Set β."""
        self.weight.fill_(self.beta(step) if callable(self.beta) else self.beta)

    def per_datum(self, found: LogDensities) -> Tensor:
        """Reconstruction minus β KL."""
        return (found.likelihood - self.weight * (found.guide - found.prior)).mean(0)


def warm_up(steps: int, *, start: float = 0.0, end: float = 1.0) -> Callable[[int], float]:
    """A weight that grows linearly from `start` at step 0 to `end` at step `steps`, and stays.

    Example:
        >>> weight = warm_up(4)
        >>> [weight(step) for step in (0, 1, 2, 4, 9)]
        [0.0, 0.25, 0.5, 1.0, 1.0]
    """
    if steps < 1:
        raise ValueError(f"warm_up wants at least one step; got {steps}")
    return lambda step: start + (end - start) * min(step / steps, 1.0)


class AnalyticELBO(Objective):
    """The ELBO with closed KL terms, refused where they are biased or not known.

    Valid for one latent site, and for several if the guide samples them in the model's order:
    then each term is conditioned on what came before in both. Pyro's class only warns about
    the order, and falls back on sampling in silence where no closed form is known.

    Args:
        draws: particles for the reconstruction term.

    Raises:
        ValueError: at the first loss, for another order or an unknown KL.

    References:
        Diederik P. Kingma, Max Welling. *Auto-Encoding Variational Bayes*, 2014, appendix B.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> AnalyticELBO()(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def tensor_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data."""
        shape = (self.num_particles, len(batch[0]))
        model_trace, guide_trace = trace_pair(model, guide, batch, self.num_particles)
        found = densities(model_trace, guide_trace, shape)
        kl = _closed_kl(latent_sites(model_trace), latent_sites(guide_trace)).expand(shape)
        return -_common(found, self) * (found.likelihood - kl - found.factors).mean(0).sum()


class FreeBits(Objective):
    r"""The ELBO in which KL below a floor costs nothing, against posterior collapse.

    $$\mathbb E_q[\log p(x \mid z)] - \sum_j \max(\lambda, \mathrm{KL}_j)$$

    with $\mathrm{KL}_j$ the batch mean for coordinate `j`; for a site whose prior or posterior
    does not factorise, for the site as a whole.

    Args:
        nats: λ, at least 0, of each coordinate.
        draws: particles for each datum.

    References:
        Diederik P. Kingma et al. *Improved Variational Inference with Inverse
        Autoregressive Flow*, 2016, appendix C.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> FreeBits(0.5)(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def __init__(self, nats: float, *, draws: int = 1) -> None:
        super().__init__(draws)
        if not 0 <= nats < math.inf:
            raise ValueError(f"nats must be >= 0 and finite; got {nats}")
        self.nats = nats

    def tensor_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data."""
        rows, draws = len(batch[0]), self.num_particles
        model_trace, guide_trace = trace_pair(model, guide, batch, draws)
        found = densities(model_trace, guide_trace, (draws, rows))
        scale = _common(found, self)
        kl = torch.cat(
            [
                _kl_terms(model_trace.nodes[site["name"]], site).flatten(0, 1).mean(0)
                for site in latent_sites(guide_trace)
            ]
        )
        reconstruction = (found.likelihood - found.factors).mean(0).sum()
        return scale * (rows * kl.clamp_min(self.nats).sum() - reconstruction)


class IWAE(Objective):
    r"""The importance-weighted bound.

    $$\mathbb E \log \frac1S \sum_s \frac{p(x, z_s)}{q(z_s \mid x)} \le \log p(x)$$

    A tighter bound for each datum of its own; the scale of a subsampled plate multiplies the
    bound instead of entering the weights, as in Pyro's `RenyiELBO`.

    Args:
        draws: `S`.

    Warning:
        The gradient of the guide loses its signal as `S` grows; `DReG` keeps it. The guide it
        fits is a proposal, no approximation of the posterior.

    References:
        Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. *Importance Weighted
        Autoencoders*, 2016.
        Tom Rainforth et al. *Tighter Variational Bounds Are Not Necessarily Better*, 2018.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> IWAE(8)(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def per_datum(self, found: LogDensities) -> Tensor:
        """The log of the mean weight."""
        return found.log_weight.logsumexp(0) - math.log(self.num_particles)


class DReG(IWAE):
    r"""`IWAE` with the doubly reparameterized gradient for the guide.

    $$\nabla_\phi = \mathbb E \sum_s \tilde w_s^2\, \frac{\partial \log w_s}{\partial z_s}
      \frac{\partial z_s}{\partial \phi}, \qquad \tilde w_s = w_s / \sum_t w_t$$

    Same value and same expected gradient as `IWAE`, with a variance that does not swamp it as
    `S` grows. Parameters of the model have the ordinary gradient.

    Args:
        draws: `S`.

    Raises:
        ValueError: a guide that is not reparameterized, or has more than one latent site.

    References:
        George Tucker, Dieterich Lawson, Shixiang Gu, Chris J. Maddison. *Doubly
        Reparameterized Gradient Estimators for Monte Carlo Objectives*, 2019.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> DReG(8)(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def tensor_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data; its value is `IWAE`'s, its gradient as above."""
        model_trace, guide_trace = trace_pair(model, guide, batch, self.num_particles)
        sites = latent_sites(guide_trace)
        if len(sites) > 1:
            raise ValueError(
                "DReG is biased for a guide of several latent sites: the lower ones depend on the "
                f"upper\n  expected: one latent site\n  got:      {[s['name'] for s in sites]}"
                "\n  try:      IWAE(draws)"
            )
        for site in sites:
            site["fn"] = detach(site["fn"])
        found = densities(model_trace, guide_trace, (self.num_particles, len(batch[0])))
        normalized = found.log_weight.detach().softmax(0)
        for z in found.latents.values():
            if torch.is_grad_enabled() and not z.requires_grad:
                raise ValueError("DReG wants a reparameterized guide\n  try:      IWAE(draws)")
            if z.requires_grad:
                z.register_hook(lambda gradient: gradient * _broadcast(normalized, gradient))
        surrogate = (normalized * found.log_weight).sum(0)
        value = self.per_datum(found).detach()
        bound = surrogate + (value - surrogate).detach()
        return -_common(found, self) * (bound - found.factors.mean(0)).sum()


class ScoreFunctionELBO(Objective):
    r"""The ELBO with the score-function gradient, for showing why reparameterization matters.

    $$\nabla_\phi = \mathbb E_q[(\log p(x, z) - \log q(z \mid x)) \nabla_\phi \log q(z \mid x)]$$

    Args:
        draws: particles for each datum.

    Warning:
        Without baselines, and so with a variance that only a demonstration can want.

    References:
        Rajesh Ranganath, Sean Gerrish, David M. Blei. *Black Box Variational Inference*, 2014.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> ScoreFunctionELBO()(model, guide)(torch.zeros(5, 3)).shape
        torch.Size([])
    """

    def tensor_loss(self, model: Model, guide: Guide, *batch: Any) -> Tensor:
        """Minus the sum over data; its value is the ELBO's, its gradient as above."""
        with _StoppedSamples():
            return super().tensor_loss(model, guide, *batch)

    def per_datum(self, found: LogDensities) -> Tensor:
        """The ELBO, with the gradient of the surrogate."""
        log_weight = found.log_weight
        surrogate = found.likelihood + found.prior + log_weight.detach() * found.guide
        return (surrogate + (log_weight - surrogate).detach()).mean(0)


def gradients(objective: Any, model: Any, guide: Any, batch: Any, *, repeats: int) -> Tensor:
    """Independent gradients of an objective with respect to the guide's parameters.

    Args:
        objective: a Pyro ELBO with a `differentiable_loss`.
        model: p(z) p(x | z).
        guide: q(z | x), a module.
        batch: tensors of `B` rows.
        repeats: `R`.

    Returns:
        `(R, P)`, of the loss, which is a sum over data. Their variance over `R` is what
        gradient estimators are compared by.

    Example:
        >>> import pyro_vae as pv
        >>> model = pv.models.PPCA(torch.eye(3, 2), torch.zeros(3), noise=1.0)
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(3, 4))
        >>> gradients(Trace_ELBO(), model, guide, (torch.zeros(5, 3),), repeats=7).shape
        torch.Size([7, 16])
    """
    parameters = [p for p in guide.parameters() if p.requires_grad]
    rows = []
    for _ in range(repeats):
        loss = objective.differentiable_loss(model, guide, *batch)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


class _StoppedSamples(poutine.messenger.Messenger):
    """Cut the path of gradients through draws."""

    def _pyro_post_sample(self, message: Any) -> None:
        if not message["is_observed"]:
            message["value"] = message["value"].detach()


def _broadcast(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(*weight.shape, *[1] * (like.dim() - weight.dim()))


def _closed_kl(ours: list[Any], theirs: list[Any]) -> Tensor:
    """KL(q ‖ p) of all sites, each given those before it; broadcasts to `(S, B)`."""
    order, other = ([site["name"] for site in sites] for sites in (ours, theirs))
    if order != other:
        raise ValueError(
            "closed KL terms are biased for this guide: it samples in another order"
            f"\n  expected: {order}, as the model\n  got:      {other}"
            "\n  try:      Trace_ELBO(), or a guide from the top down"
        )
    total: Any = 0.0
    for site, twin in zip(ours, theirs, strict=True):
        try:
            kl = kl_divergence(twin["fn"], site["fn"])
        except NotImplementedError as error:
            kinds = (type(side["fn"]).__name__ for side in (twin, site))
            raise ValueError(
                f"no closed KL is known at site {site['name']!r}"
                "\n  expected: two of one family, as NormalGuide and StandardNormal"
                f"\n  got:      {' against '.join(kinds)}\n  try:      Trace_ELBO()"
            ) from error
        total = total + scale_and_mask(kl, 1.0, twin["mask"])
    return total


def _kl_terms(prior: Any, guide: Any) -> Tensor:
    """Log q − log p of each coordinate if both factorise, else of the site; `(S, B, L or 1)`."""
    if guide["mask"] is not None or prior["mask"] is not None:
        raise ValueError("FreeBits knows no masks\n  try:      Trace_ELBO()")
    value, sides = guide["value"], (guide["fn"], prior["fn"])
    if all(isinstance(side, Independent) for side in sides):
        log_q, log_p = (side.base_dist.log_prob(value) for side in sides)
        return log_q - log_p
    log_q, log_p = (side.log_prob(value) for side in sides)
    return (log_q - log_p).unsqueeze(-1)


def _common(found: LogDensities, objective: Objective) -> float:
    if found.scale is None:
        raise ValueError(
            f"sites are scaled unequally, for which {type(objective).__name__} has no meaning"
            "\n  expected: one scale for all sites, as a subsampled plate gives"
            "\n  try:      svi.objectives.Beta for a weight on the KL"
        )
    return found.scale
