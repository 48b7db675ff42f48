"""Where posteriors lie among draws of the prior, which data under one decoder share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.log_joint import LogJoint
from pyro_vae.posterior.crossed import crossed, shares_latents
from pyro_vae.posterior.mixture import Mixture, fit_mixture
from pyro_vae.posterior.tempering import tempered

SCOUTS, EACH = 2**16, 2**10
"""Draws of the prior: so many at most, and for each datum; as many each would have alone."""
LATENTS = 3
"""Dimensions, at most: in more, no draw of the prior comes near. Of the likelihood of MNIST digits
the power that leaves 32 of 65,536 effective is 1 in two, 0.4 in four, 0.1 in eight."""
ASKED = 2**10
"""Of these, where it is asked whether one decoder serves all. A wrong answer costs no truth."""
DECODED = 2**12
"""Latents decoded at once."""
ROWS = 2**7
"""Data whose weights are held at once."""
CHOSEN, COMPONENTS = 2**8, 6
"""Draws by weight to which a mixture is fitted."""
EFFECTIVE = 2**5


class Scouts(NamedTuple):
    """What draws of the prior tell of each posterior."""

    mixture: Mixture
    power: Tensor
    """of the likelihood that leaves enough of them effective, `(B,)`; at 1 they know all"""


@torch.no_grad()
def scouted(target: LogJoint) -> Scouts | None:
    r"""Fit a mixture to draws of the prior with weights $p(x \mid z)^\beta$, for each datum.

    A latent is decoded once for a hundred data: thousands of draws cost no more than those few
    that each datum can afford alone, and see modes that these miss. $\beta$ is the largest power
    up to 1 that leaves 32 of them effective: they say the more, the nearer it is to 1.

    Returns:
        `None` in many dimensions, or where the target is not one that `shares_latents`.
    """
    if target.size > LATENTS:
        return None
    count = len(target.batch[0])
    first = target.rows(slice(0, 1))
    u = first.prior_draws(min(SCOUTS, EACH * count)).squeeze(1)
    u = u[torch.isfinite(u).all(-1)]  # others lie on the border of their support
    if not len(u) or not shares_latents(target, u[:ASKED], chunk=DECODED):
        return None
    mixtures, powers = [], []
    for rows in torch.arange(count).split(ROWS):
        log_likelihood = crossed(target.rows(rows), u, chunk=DECODED)[1].to(u)
        power = tempered(log_likelihood.T, torch.ones_like(log_likelihood[:, 0]), 1.0, EFFECTIVE)
        share = (power.unsqueeze(-1) * log_likelihood).softmax(-1).nan_to_num(1.0)
        chosen = u[torch.multinomial(share, CHOSEN, replacement=True)].movedim(0, 1)
        mixtures.append(fit_mixture(chosen, torch.ones_like(chosen[..., 0]), COMPONENTS))
        powers.append(power.to(u.dtype))
    return Scouts(Mixture(*map(torch.cat, zip(*mixtures, strict=True))), torch.cat(powers))


@torch.no_grad()
def heaviest(target: LogJoint, draws: int) -> Tensor | None:
    """The middle of the component of scouts' mixtures that has the highest ELBO, `(B, L)`.

    Where several modes lie apart, that is a place in the one of most mass.
    """
    if (found := scouted(target)) is None:
        return None
    elbos = []
    for k in range(COMPONENTS):
        share, *shape = (part[:, k : k + 1] for part in found.mixture)
        own = Mixture(torch.zeros_like(share), *shape)
        u = own.sample(draws)
        elbos.append((target(u) - own.log_prob(u)).mean(0))
    best = torch.stack(elbos).nan_to_num(-torch.inf, posinf=-torch.inf).argmax(0)
    return found.mixture.mean[torch.arange(len(best)), best]
