"""The encoder of a VQ-VAE: the nearest code, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.pair import PairModule


class QuantizedGuide(PairModule):
    r"""A one-hot posterior: all mass on the nearest code, $k_m(x) = \arg\min_k |e_m(x) - c_k|$.

    The value is $z = e + \mathrm{sg}[c_k - e]$, so that gradients pass to the encoder as if
    nothing had been rounded. While training, $|\mathrm{sg}[e] - c_k|^2 + \beta |e -
    \mathrm{sg}[c_k]|^2$ pulls codes to encodings and encodings to codes.

    Args:
        encoder: maps `x`, `(..., D)`, to `(..., M C)`: `M` encodings of width `C`.
        codebook: quantises them, `models.Codebook`. It is called, not owned.
        commitment: β.

    References:
        Aaron van den Oord, Oriol Vinyals, Koray Kavukcuoglu. *Neural Discrete Representation
        Learning*, 2017.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> codebook = pv.models.Codebook(codes=16, width=4, positions=2)
        >>> QuantizedGuide(pv.networks.MLP(64, 8), codebook)(torch.rand(5, 64)).shape
        torch.Size([5, 8])
    """

    def __init__(self, encoder: nn.Module, codebook: Any, *, commitment: float = 0.25) -> None:
        super().__init__()
        self.encoder = encoder
        self._codebook = (codebook,)  # in a tuple, so that it is not registered here
        self.commitment = commitment

    def forward(self, x: Tensor) -> Tensor:
        """Sample the site `"z"`, the codes of each row side by side."""
        encoded = self.encoder(x)
        quantized, _ = self._codebook[0].quantize(encoded)
        with pyro.plate("data", len(x)):
            if self.training:
                pull = (encoded.detach() - quantized).square().sum(-1)
                commit = (encoded - quantized.detach()).square().sum(-1)
                pyro.factor("commitment", pull + self.commitment * commit, has_rsample=True)
            z = encoded + (quantized - encoded).detach()
            return pyro.sample("z", dist.Delta(z, event_dim=1))

    def codes(self, x: Tensor) -> Tensor:
        """The index of each code, `(B, M)`."""
        codes: Tensor = self._codebook[0].quantize(self.encoder(x))[1]
        return codes
