"""One epoch of MNIST: ours, a plain loop, Pyro's own example and tutorial, pythae.

    uv pip install --requirements benchmarks/requirements.lock       pythae
    PYRO_VAE_DATA=... python benchmarks/epoch.py                     3 minutes on 2 cores

All fit the 60,000 training rows, binarised at one half, in batches of 256, with Adam at 1e-3
and the nets of Pyro's example (784–400–(50, 50) and 50–400–784, Softplus, Gaussian guide,
Bernoulli pixels):

- `example`: `examples/vae/vae.py` of Pyro 1.9, with `examples/vae/utils/mnist_cached.py`: a
  `DataLoader` over float rows held in memory, gathered row by row; `SVI.step`, Pyro's Adam.
- `tutorial`: the same programs as `tutorial/source/vae.ipynb` feeds them: a PIL image and
  `ToTensor` for each row, in one worker process; distributions are not validated.
- `pythae`: 0.1.2, an epoch of `BaseTrainer` with its `DataLoader`, on the same nets.
- `plain`: what one writes by hand: rows gathered by index, closed KL, logits, fused Adam, eager.
- `ours`, `ours compiled`: the epoch of `pv.fit`, without and with `compile=True`.
- `example's pair, compiled`: Pyro's programs, as they stand, in `pv.fit(..., compile=True)`.
- `products alone`: the matrix products of these nets and nothing else, the floor for all.

Nobody evaluates (ours: one batch). Loading and compiling come before; the latter is printed.
Turns are interleaved; medians over 3. Writes results/epoch.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from PIL import Image
from pyro.infer import SVI, Trace_ELBO
from step import by_hand
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor

import pyro_vae as pv
from pyro_vae.svi.fit import ADAM
from pyro_vae.svi.fitting import Fitting, lean
from pyro_vae.svi.rows import Rows

D, H, L = 784, 400, 50
BATCH, LR = 256, 1e-3
TURNS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PyroExample(nn.Module):
    """The example's programs, but for the names: sites `"z"` and `"x"`, modules as given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.hidden = nn.Sequential(nn.Linear(D, H), nn.Softplus())
        self.loc, self.log_scale = nn.Linear(H, L), nn.Linear(H, L)
        self.decoder = nn.Sequential(nn.Linear(L, H), nn.Softplus(), nn.Linear(H, D), nn.Sigmoid())
        self.encoder = nn.ModuleList([self.hidden, self.loc, self.log_scale])

    def model(self, x: Tensor) -> None:
        pyro.module(f"{self.name} decoder", self.decoder)
        with pyro.plate("data", len(x)):
            loc, scale = x.new_zeros(len(x), L), x.new_ones(len(x), L)
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pixels = dist.Bernoulli(self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("x", pixels, obs=x.reshape(-1, D))

    def guide(self, x: Tensor) -> None:
        pyro.module(f"{self.name} encoder", self.encoder)
        with pyro.plate("data", len(x)):
            hidden = self.hidden(x.reshape(-1, D))
            scale = self.log_scale(hidden).exp()
            pyro.sample("z", dist.Normal(self.loc(hidden), scale).to_event(1))


class CachedRows(Dataset[tuple[Tensor, Tensor]]):
    """Rows and labels, one at a time, as the example's `MNISTCached` hands them out."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.y = x, torch.full((len(x), 1), torch.nan)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Images(Dataset[tuple[Tensor, int]]):
    """Bytes made an image, then a tensor, as `torchvision.datasets.MNIST` and `ToTensor` do."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.y = (255 * x).byte().reshape(-1, 28, 28), torch.zeros(len(x), dtype=int)
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.x[index].numpy(), mode="L")
        return self.transform(image), int(self.y[index])


def by_svi(name: str, loader: DataLoader[Any], **settings: bool) -> Callable[[], float]:
    """An epoch of the example or the tutorial, under settings of Pyro."""
    theirs = PyroExample(name).to(DEVICE)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": LR}), loss=Trace_ELBO())

    def epoch() -> float:
        total = 0.0
        with pyro.settings.context(**settings):
            for x, _ in loader:
                total += svi.step(x.to(DEVICE))
        return total / len(loader.dataset)

    return epoch


def example(x: Tensor) -> Callable[[], float]:
    return by_svi("example", DataLoader(CachedRows(x), BATCH, shuffle=True))


def tutorial(x: Tensor) -> Callable[[], float]:
    loader = DataLoader(Images(x), BATCH, shuffle=True, num_workers=1)
    unchecked = {"validate_distributions_pyro": False, "validate_distributions_torch": False}
    return by_svi("tutorial", loader, **unchecked)


def pythae(x: Tensor) -> Callable[[], float]:
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Sequential(nn.Linear(D, H), nn.Softplus())
            self.loc, self.log_variance = nn.Linear(H, L), nn.Linear(H, L)

        def forward(self, x: Tensor) -> ModelOutput:
            hidden = self.hidden(x)
            return ModelOutput(
                embedding=self.loc(hidden), log_covariance=self.log_variance(hidden)
            )

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(L, H), nn.Softplus(), nn.Linear(H, D), nn.Sigmoid())

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z))

    for name in ("pythae.trainers.base_trainer.base_trainer", "pythae.trainers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = VAEConfig(input_dim=(D,), latent_dim=L, reconstruction_loss="bce")
    trainer = BaseTrainer(
        VAE(config, Encoder(), Decoder()),
        train_dataset=BaseDataset(x, torch.ones(len(x))),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            num_epochs=TURNS,
            per_device_train_batch_size=BATCH,
            learning_rate=LR,
        ),
    )
    trainer.prepare_training()
    done = iter(range(1, TURNS + 1))

    def epoch() -> float:
        with contextlib.redirect_stderr(io.StringIO()):
            return trainer.train_step(next(done))

    return epoch


def pair() -> tuple[Any, Any]:
    """The same nets of our parts."""
    guide = pv.guides.NormalGuide(pv.networks.MLP(D, H, 2 * L, activation=nn.Softplus))
    decoder = pv.networks.MLP(L, H, D, activation=nn.Softplus)
    model = pv.models.VAE(
        decoder, prior=pv.priors.StandardNormal(L), likelihood=pv.likelihoods.Bernoulli()
    )
    return model.to(DEVICE), guide.to(DEVICE)


def plain(x: Tensor) -> Callable[[], float]:
    model, guide = pair()
    adam = ADAM([*model.parameters(), *guide.parameters()], lr=LR)
    x = x.to(DEVICE)

    def epoch() -> float:
        total = torch.zeros((), device=DEVICE)
        for index in torch.randperm(len(x), device=DEVICE).split(BATCH):
            loss = by_hand(model, guide, x[index])
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.detach() * len(index)
        return total.item() / len(x)

    return epoch


def products(x: Tensor) -> Callable[[], None]:
    """The matrix products of a step alone: forward, to the weights, and back to the inputs."""
    shapes = [(D, H), (H, 2 * L), (L, H), (H, D)]
    weights = [torch.randn(shape, device=DEVICE) for shape in shapes]
    inputs = [torch.randn(BATCH, rows, device=DEVICE) for rows, _ in shapes]
    outputs = [torch.randn(BATCH, columns, device=DEVICE) for _, columns in shapes]

    def epoch() -> None:
        for _ in range(-(-len(x) // BATCH)):
            for number, (weight, h, g) in enumerate(zip(weights, inputs, outputs, strict=True)):
                torch.mm(h, weight)
                torch.mm(h.T, g)
                if number:
                    torch.mm(g, weight.T)

    return epoch


def ours(x: Tensor, model: Any, guide: Any, *, compiled: bool) -> Callable[[], float]:
    """What `pv.fit` does in an epoch, with so few rows to measure on that it costs nothing."""
    data = pv.data.Dataset("MNIST", (x,), (x[:BATCH],), (x[:BATCH],))
    fitting = Fitting(
        model, guide, Rows(data, 0, (0, 1)), Trace_ELBO(), batch_size=BATCH, lr=LR,
        optimizer=ADAM, schedule=None, clip=None, average=None, draws=1, precision="float32",
        fabric=None,
    )  # fmt: skip
    if compiled:
        with lean("float32"):
            fitting.record()

    def epoch() -> float:
        with lean("float32"):
            return fitting.advance(measured=True).loss

    return epoch


def contestants(x: Tensor) -> tuple[dict[str, Callable[[], float | None]], dict[str, float]]:
    """An epoch of each, from one seed, and the seconds that came before it."""
    theirs = PyroExample("ours").to(DEVICE)
    makers: dict[str, Callable[[], Callable[[], float | None]]] = {
        "example": lambda: example(x),
        "tutorial": lambda: tutorial(x),
        "pythae": lambda: pythae(x),
        "plain": lambda: plain(x),
        "products alone": lambda: products(x),
        "ours": lambda: ours(x, *pair(), compiled=False),
        "ours compiled": lambda: ours(x, *pair(), compiled=True),
        "example's pair, compiled": lambda: ours(x, theirs.model, theirs.guide, compiled=True),
    }
    made, seconds = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        made[name] = make()
        seconds[name] = time.perf_counter() - start
    return made, seconds


def measure(x: Tensor) -> dict[str, Any]:
    """Seconds of each turn, and what came of it."""
    epochs, before = contestants(x)
    turns: dict[str, list[float]] = {name: [] for name in epochs}
    losses: dict[str, list[float | None]] = {name: [] for name in epochs}
    for _ in range(TURNS):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            losses[name].append(epoch())
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            turns[name].append(time.perf_counter() - start)
            print(f"  {name}: {turns[name][-1]:.2f} s", flush=True)
    compiled = turns["ours compiled"]
    return {
        "rows": len(x),
        "seconds": {name: statistics.median(found) for name, found in turns.items()},
        "ratio_to_ours_compiled": {
            name: statistics.median(a / b for a, b in zip(found, compiled, strict=True))
            for name, found in turns.items()
        },
        "turns": turns,
        "loss": losses,
        "seconds_before": before,
    }


def main() -> None:
    """Run all, print a table, write the JSON."""
    start = time.perf_counter()
    data = pv.data.load("mnist")
    x = torch.cat([data.train[0], data.validation[0]])
    loading = time.perf_counter() - start
    result = measure(x)
    print(f"{'':26}  seconds  to ours  loss of turn {TURNS}  before it")
    for name, seconds in result["seconds"].items():
        loss = result["loss"][name][-1]
        print(
            f"{name:26} {seconds:8.2f} {result['ratio_to_ours_compiled'][name]:8.2f}"
            f" {'' if loss is None else f'{loss:.1f}':>15} {result['seconds_before'][name]:9.1f} s"
        )
    ratio = result["ratio_to_ours_compiled"]
    last = {
        "ratio_example": ratio["example"],
        "ratio_pythae": ratio["pythae"],
        "vs_plain": 1 / ratio["plain"],
        "ratio_tutorial": ratio["tutorial"],
        "same_pair": ratio["example"] / ratio["example's pair, compiled"],
        "vs_products": 1 / ratio["products alone"],
    }
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    about = {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "loading_seconds": loading,
    }  # fmt: skip
    name = "epoch.json" if DEVICE.type == "cpu" else f"epoch_{device.replace(' ', '_')}.json"
    result = {"about": about, **result, "last": last}
    (Path(__file__).parent / "results" / name).write_text(json.dumps(result, indent=1))
    print(" ".join(f"{name}={value:.2f}" for name, value in last.items()))


if __name__ == "__main__":
    main()
