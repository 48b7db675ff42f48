"""The report: everything the library can say of a pair, on one page that needs nothing else."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pyro_vae import __version__
from pyro_vae.atomic import replace_file
from pyro_vae.checks import check_pair
from pyro_vae.data import Dataset
from pyro_vae.pair import Batch, Guide, Model
from pyro_vae.report import figures, findings
from pyro_vae.report.figures import Picture
from pyro_vae.report.findings import Finding
from pyro_vae.svi import Run
from pyro_vae.tables import mean_with_error
from pyro_vae.verdict import Calibration, Diagnosis, Verdict, bounds, calibrate, compare, diagnose
from pyro_vae.verdict.heads import HEADS

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Section(NamedTuple):
    """A part of the page: a title, what stands under it, and why it is missing if it is."""

    anchor: str
    title: str
    lead: str = ""
    pictures: tuple[Picture, ...] = ()
    cards: tuple[Picture, ...] = ()
    tables: tuple[str, ...] = ()
    terms: Mapping[str, str] = MappingProxyType({})
    missing: str = ""


@dataclass(frozen=True, repr=False)
class Report:
    """A page on a pair, and what it was made from.

    Attributes:
        html: the page; it holds its pictures, styles and script, and asks for nothing.
        verdict: the guide against the posterior; `None` where it could not be had.
        calibration: of the guide on simulated data; `None` where it could not be had.
        diagnosis: of the pair as a whole; `None` where it could not be had.
    """

    html: str
    verdict: Verdict | None
    calibration: Calibration | None
    diagnosis: Diagnosis | None

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        replace_file(Path(path), self.html)
        return Path(path)

    def __repr__(self) -> str:
        return f"Report: a page of {len(self.html) / 1e6:.1f} MB; .save('report.html')"

    def _repr_html_(self) -> str:
        page = html.escape(self.html)
        return f'<iframe srcdoc="{page}" width="100%" height="800" title="report"></iframe>'


def page(
    model: Model,
    guide: Guide,
    data: Dataset,
    *,
    run: Run | None = None,
    title: str | None = None,
    settings: Mapping[str, Any] | None = None,
    rows: int = 16,
    pool: int = 2000,
    replicates: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Write one page on a pair: fit, samples, latent space, verdict, calibration, collapse, holes.

    It begins with whether the guide can be trusted and what to change, in plain language; each
    figure below says what it shows. Parts that a pair does not allow, such as the posterior of
    a discrete latent, say why they are missing.

    Args:
        model: p(z) p(x | z).
        guide: q(z | x).
        data: its test rows are judged, its training rows make the aggregate posterior.
        run: what `fit` returned, for the curves.
        title: of the page; the name of the data by default.
        settings: what was fitted, by name, as the page tells it.
        rows: test rows to hold the guide against, at most.
        pool: training rows of the aggregate posterior, at most; the cost grows by its square.
        replicates: simulated data for the calibration.
        seed: of all draws; torch's random state is left as it was.
        progress: show bars.

    Returns:
        `Report`.

    Raises:
        ValueError: a bad pair, or counts below their minimum.

    Example:
        >>> import torch
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> digits = pv.data.load("digits")
        >>> guide = pv.guides.NormalGuide(pv.networks.MLP(64, 4))
        >>> model = pv.models.VAE(
        ...     pv.networks.MLP(2, 64),
        ...     prior=pv.priors.StandardNormal(2),
        ...     likelihood=pv.likelihoods.Bernoulli(),
        ... )
        >>> found = page(model, guide, digits, rows=2, pool=50, replicates=50, progress=False)
        >>> "cannot be trusted" in found.html
        True
    """
    few = tuple(part[:64] for part in data.test)
    check_pair(model, guide, few)
    if rows < 1 or pool < 2 or replicates < 50:
        raise ValueError(
            "a report wants rows >= 1, pool >= 2 and replicates >= 50; "
            f"got {rows}, {pool} and {replicates}"
        )
    judged = tuple(part[:rows] for part in data.test)
    seen, labels = figures.pool(data, pool, seed)
    verdict, no_verdict = _tried(
        lambda: compare(model, guide, judged, seed=seed, progress=progress)
    )
    calibration, no_calibration = _tried(
        lambda: calibrate(model, guide, few, replicates=replicates, seed=seed)
    )
    diagnosis, no_diagnosis = _tried(lambda: diagnose(model, guide, seen, seed=seed + 1))
    codes = figures.codes(model, guide, seen, labels, seed)

    sections = [Section("fit", "The fit", pictures=(figures.curves(run),))] if run else []
    if shape := data.image_shape:
        sections.append(_generates(model, guide, few, shape, codes, diagnosis, seed))
    sections += [
        Section("latent", "Latent space", pictures=(figures.latent_map(codes, diagnosis),)),
        _of_verdict(verdict, no_verdict, data.image_shape),
    ]
    if verdict is not None:
        pictures = (figures.chains(model, judged, verdict.mcmc),)
        sections.append(Section("chains", "Chains", pictures=pictures))
    sections += [
        _of_calibration(calibration, no_calibration),
        _of_diagnosis(diagnosis, no_diagnosis),
    ]
    text = _template().render(
        title=title or f"A VAE of {data.name}",
        headline=findings.headline(verdict) if verdict else Finding("note", "Not judged."),
        findings=list(_findings(verdict, calibration, diagnosis, run)),
        settings=_settings(data, run, settings or {}, seed) | _held_out(model, guide, data, seed),
        sections=sections,
    )
    return Report(text, verdict, calibration, diagnosis)


def _tried(work: Callable[[], T]) -> tuple[T | None, str]:
    """What came of it, or why nothing did, as a sentence."""
    try:
        return work(), ""
    except (ValueError, NotImplementedError) as error:
        return None, str(error)


def _findings(
    verdict: Verdict | None, calibration: Calibration | None, diagnosis: Diagnosis | None,
    run: Run | None,
) -> Iterator[Finding]:  # fmt: skip
    if verdict is not None:
        yield from findings.of_verdict(verdict)
    if calibration is not None:
        yield from findings.of_calibration(calibration)
    if diagnosis is not None:
        yield from findings.of_diagnosis(diagnosis)
    if run is not None:
        yield from findings.of_run(run)


def _generates(
    model: Model, guide: Guide, rows: Batch, shape: tuple[int, int], codes: figures.Codes,
    diagnosis: Diagnosis | None, seed: int,
) -> Section:  # fmt: skip
    pictures = [
        figures.reconstructions(model, guide, rows, shape),
        figures.samples(model, rows, shape, seed),
    ]
    if len(rows[0]) > 1:
        pictures.append(figures.interpolations(model, guide, rows, shape))
    if diagnosis is not None:
        pictures.append(figures.traversals(model, guide, rows, shape, codes, diagnosis))
    return Section("generates", "What it generates", pictures=tuple(pictures))


def _of_verdict(verdict: Verdict | None, missing: str, shape: tuple[int, int] | None) -> Section:
    if verdict is None:
        return Section("verdict", "Verdict", missing=missing)
    columns = ["why", *verdict.table.columns.drop("why")]
    table = verdict.table[columns].rename(columns={n: head for n, (head, _) in HEADS.items()})
    cards = tuple(figures.panel(verdict, datum, shape) for datum in range(min(24, len(table))))
    lead = (
        "A test row a line. Errors of mean and sd are in units of the posterior's, those of MCMC "
        f"stand beside those of the guide. Choose a head to sort. {_legend(verdict)}"
    )
    heads = {h: told for n, (h, told) in HEADS.items() if n in verdict.table and h != told}
    tables = (_html(table, sortable=True),)
    return Section("verdict", "Verdict", lead, cards=cards, tables=tables, terms=heads)


def _of_calibration(found: Calibration | None, missing: str) -> Section:
    if found is None:
        return Section("calibration", "Calibration", missing=missing)
    picture, table = figures.calibration(found), _html(found.summary())
    return Section("calibration", "Calibration", pictures=(picture,), tables=(table,))


def _of_diagnosis(found: Diagnosis | None, missing: str) -> Section:
    if found is None:
        return Section("collapse", "Collapse and holes", missing=missing)
    lead = (
        "Nats per row over the training rows of the aggregate posterior; rate = mutual "
        "information + KL of the aggregate posterior from the prior."
    )
    picture, table = figures.units(found), _html(found.summary())
    return Section("collapse", "Collapse and holes", lead, pictures=(picture,), tables=(table,))


def _legend(verdict: Verdict) -> str:
    size = verdict.bounds.draws.flat.shape[-1]
    if size == 1:
        return "In the panels, grey is the exact density, dark draws of MCMC, red the guide."
    which = "" if size == 2 else " of the first two latents"
    exact = "blue is the exact density, " if verdict.exact is not None and size == 2 else ""
    return (
        f"In the panels{which}, {exact}dots are draws of MCMC, and the red ellipses are the "
        "guide's 1 and 2 standard deviations."
    )


def _settings(
    data: Dataset, run: Run | None, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    told = {
        "data": f"{data.name}: {len(data.train[0]):,} training, {len(data.validation[0]):,} "
        f"validation and {len(data.test[0]):,} test rows of {data.observed} numbers",
        **settings,
    }
    if run is not None:
        told["run"] = str(run).removeprefix("Run: ")
    told["seed of the report"] = seed
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pyro-ppl", "arviz"))
    told["versions"] = f"pyro_vae {__version__}, {versions}, Python {platform.python_version()}"
    told["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    return told


def _held_out(model: Model, guide: Guide, data: Dataset, seed: int) -> dict[str, str]:
    """ELBO and log-likelihood of up to 500 test rows."""
    found = bounds(model, guide, tuple(p[:500] for p in data.test), draws=1000, keep=0, seed=seed)
    count = len(found.elbo)
    return {
        "held out": f"ELBO {mean_with_error(found.elbo)}, log p(x) by IWAE of 1,000 draws "
        f"{mean_with_error(found.iwae)} nats a row "
        f"({count} test row{'s, standard error over rows' if count > 1 else ''})"
    }


def _html(table: pd.DataFrame, *, sortable: bool = False) -> str:
    """A table with its names escaped, numbers to two or three digits, nothing for a NaN."""
    numeric = set(table.select_dtypes("number").columns)
    heads = rows = ""
    for name in (table.index.name or "figure", *table.columns):
        kind = ' class="number"' if name in numeric else ""
        told = f'<button type="button">{_words(name)}</button>' if sortable else _words(name)
        heads += f'<th scope="col"{kind}>{told}</th>'
    for index, row in zip(table.index, table.to_dict("records"), strict=True):
        cells = "".join(
            f'<td class="number" data-value="{_script(value)}">{_number(value)}</td>'
            if name in numeric
            else f"<td>{html.escape(str(value))}</td>"
            for name, value in row.items()
        )
        rows += f'<tr><th scope="row">{_words(index)}</th>{cells}</tr>'
    kind = ' class="sortable"' if sortable else ""
    return f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _script(value: float) -> str:
    """A number as a script reads it."""
    return str(value).replace("inf", "Infinity")


def _words(name: object) -> str:
    plain = str(name)
    return html.escape(plain.replace("_", " ") if plain.isidentifier() else plain)


def _number(value: float) -> str:
    if value != value:
        return ""
    if isinstance(value, int) or abs(value) >= 999.995:
        return f"{value:,.0f}"
    if 0 < abs(value) < 5e-4:
        return "<0.001" if value > 0 else ">−0.001"
    return f"{value + 0.0:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"


def _template() -> Any:
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("pyro_vae.report", ".")
    return Environment(loader=loader, autoescape=True).get_template("page.html")
