"""The report: what it says is what was found, and the page needs nothing but a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pairs import digits_pair, guide_of, quantized_pair, tilted
from pyro_vae import report
from pyro_vae.report import findings

SMALL: dict[str, Any] = {"pool": 60, "replicates": 60, "progress": False}


@pytest.fixture(scope="module")
def found() -> report.Report:
    torch.manual_seed(0)
    pair, data = digits_pair(), pv.data.load("digits")
    run = pv.fit(*pair, data, epochs=2, progress=False)
    title = "<script>alert(1)</script>"
    return report.page(*pair, data, run=run, title=title, rows=3, settings={"a": "<b>"}, **SMALL)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_holds_all_it_needs(found: report.Report) -> None:
    page = _Page(found.html)
    sources = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    assert all(v is not None and v.startswith(("data:", "#")) for v in sources)
    assert "http:" not in found.html and "https:" not in found.html and "@import" not in found.html
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 12 and all(len(attrs["alt"] or "") > 10 for attrs in pictures)
    anchors = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {str(v)[1:] for v in sources if str(v).startswith("#")} <= anchors
    assert anchors >= {
        "fit",
        "generates",
        "latent",
        "verdict",
        "chains",
        "calibration",
        "collapse",
    }


def test_names_are_text_and_never_markup(found: report.Report) -> None:
    assert "<script>alert(1)" not in found.html and "&lt;script&gt;alert(1)" in found.html
    assert "<b>" not in found.html and "&lt;b&gt;" in found.html


def test_the_table_is_the_verdicts(found: report.Report) -> None:
    assert found.verdict is not None
    table = found.verdict.table
    columns = [name for name in table.columns if name not in ("why", "mcmc_trouble")]
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', found.html)
    assert [int(index) for index, _ in rows] == [0, 1, 2]
    for (_, cells), (_, row) in zip(rows, table.iterrows(), strict=True):
        values = [float(v) for v in re.findall(r'data-value="([^"]+)"', cells)]
        assert values == pytest.approx([row[name] for name in columns], rel=1e-12, nan_ok=True)


def test_it_is_saved_whole_and_shown_in_a_notebook(found: report.Report, tmp_path: Path) -> None:
    assert found.save(tmp_path / "r.html").read_text() == found.html
    ((tag, attrs),) = _Page(found._repr_html_()).tags
    assert tag == "iframe" and attrs["srcdoc"] == found.html
    with pytest.raises(OSError, match="nowhere"):
        found.save(tmp_path / "nowhere" / "r.html")


def test_a_pair_in_plain_pyro_with_two_sites_and_no_images() -> None:
    def model(x: Any, size: int | None = None) -> Any:
        with pyro.plate("data", len(x) if x is not None else size):
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, scale[..., None]).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scale", dist.Gamma(torch.tensor(3.0), 3.0))
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    data = pv.data.from_array(model(None, size=200).detach())
    found = report.page(model, guide, data, rows=2, **SMALL)
    assert "Latent space" in found.html and "What it generates" not in found.html
    assert found.verdict is not None and "scale" in found.html


def _images(values: torch.Tensor, labels: torch.Tensor | None = None) -> pv.data.Dataset:
    return pv.data.from_array(values.reshape(-1, 3, 4), labels, held_out=10)


GREY = torch.rand(120, 12, generator=torch.Generator().manual_seed(0))
ODD: dict[str, tuple[Any, pv.data.Dataset, int, str]] = {
    "categories": (pv.likelihoods.Categorical(5), _images((4 * GREY).round()), 2, "1 and 2 stand"),
    "counts": (pv.likelihoods.Poisson(), _images((9 * GREY).round()), 1, "grey is the exact"),
    "grey": (pv.likelihoods.ContinuousBernoulli(), _images(GREY), 4, "of the first two latents"),
    "real": (pv.likelihoods.Normal(1.0), _images(3 * GREY - 1, GREY[:, 0].gt(0.5).long()), 2, ""),
    "one row": (
        pv.likelihoods.Normal(1.0), pv.data.from_array(GREY[:20], held_out=1), 2, "(1 test row)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_pairs_and_data_of_every_kind(name: str) -> None:
    likelihood, data, size, says = ODD[name]
    kind = pv.guides.NormalGuide
    guide = kind(pv.networks.MLP(12, kind.features(size)))
    decoder = pv.networks.MLP(size, 8, likelihood.features(12))
    model = pv.models.VAE(decoder, prior=pv.priors.StandardNormal(size), likelihood=likelihood)
    found = report.page(model, guide, data, rows=2, **SMALL)
    assert "± nan" not in found.html and ">nan<" not in found.html
    assert says.replace("1 and 2 stand", "1 and 2 standard deviations") in found.html
    assert ("coloured by class" in found.html) == (bool(data.labels) and size > 1)


def test_a_reference_in_doubt_judges_nothing() -> None:
    model = pv.models.PPCA(torch.randn(8, 5), torch.zeros(8), 1.0)
    x = model(None, size=3).detach()
    exact = guide_of(lambda x: model.posterior(x))
    verdict = pv.compare(model, exact, (x,), mcmc_draws=20, chains=2, search=0, progress=False)
    headline = findings.headline(verdict)
    assert headline.kind == "note" and "3 rows cannot be judged" in headline.text
    assert not [f for f in findings.of_verdict(verdict) if f.kind == "bad"]


def test_a_chain_that_never_moved_has_no_r_hat() -> None:
    model = tilted()
    x = model(None, size=2).detach()
    z = torch.randn(2, 50, 2, 2)
    z[:, :, 1] = 0.5
    shown = report.figures.chains(model, (x,), pv.posterior.Draws({"z": z}))
    assert "row 1, z[0], R-hat undefined, they never moved" in shown.caption


def test_what_a_pair_does_not_allow_is_said() -> None:
    data = pv.data.load("digits")
    found = report.page(*quantized_pair(), data, rows=2, **SMALL)
    assert found.verdict is None
    assert "Not to be had: " in found.html and "discrete" in found.html
    assert "Not judged." in found.html
    with pytest.raises(ValueError, match="replicates >= 50; got 2, 60 and 3"):
        report.page(*quantized_pair(), data, rows=2, pool=60, replicates=3, progress=False)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [(0.0, "good", "can be trusted"), (3.0, "bad", "cannot be trusted")],
)
def test_the_headline_says_yes_and_no(change: float, kind: str, says: str) -> None:
    model = tilted()

    def posterior(x: torch.Tensor) -> Any:
        right: Any = model.posterior(x)
        return dist.MultivariateNormal(right.mean + change, scale_tril=right.scale_tril)

    x = model(None, size=4).detach()
    verdict = pv.compare(model, guide_of(posterior), (x,), progress=False)
    headline = findings.headline(verdict)
    assert headline.kind == kind and says in headline.text
    told = " ".join(finding.text for finding in findings.of_verdict(verdict))
    assert ("mean off on 4" in told) == (change > 0)
    ranks = pv.calibrate(model, guide_of(posterior), (x,))
    assert findings.of_calibration(ranks)[0].kind == kind


def test_collapse_and_an_unfinished_fit_are_told() -> None:
    torch.manual_seed(1)
    pair, data = digits_pair(latent_dim=3), pv.data.load("digits")
    strong = pv.svi.objectives.Beta(50.0)
    run = pv.fit(*pair, data, epochs=10, lr=3e-3, objective=strong, progress=False)
    diagnosis = pv.diagnose(*pair, (data.train[0][:200],))
    told = findings.of_diagnosis(diagnosis)
    assert "0 of 3 latent units are active; z[0], z[1], z[2] say nothing" in told[0].text
    assert "FreeBits" in told[0].advice
    run = pv.fit(*digits_pair(), data, epochs=3, progress=False)
    assert "the fit had not ended" in findings.of_run(run)[0].text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

PROBE = """<script>
const cells = document.querySelectorAll("table.sortable tbody tr td:nth-child(6)");
cells[0].dataset.value = "Infinity"; cells[1].dataset.value = "nan";
const head = [...document.querySelectorAll("th button")].find(b => b.textContent === "KL");
const kl = () => [...document.querySelectorAll("table.sortable tbody tr")].map(
  row => +row.cells[head.parentElement.cellIndex].dataset.value);
head.focus();
head.click(); const up = kl();
head.click(); const down = kl();
const sorted = Number.isNaN(up[2]) && Number.isNaN(down[2]) &&
  up[1] === Infinity && down[0] === Infinity && up[0] === down[1];
const report = {
  sorted, focused: document.activeElement === head,
  aria: head.parentElement.getAttribute("aria-sort"),
  wide: document.documentElement.scrollWidth <= innerWidth,
  shown: [...document.images].every(image => image.complete && image.naturalWidth > 0),
  asked: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
};
document.body.dataset.probe = JSON.stringify(report);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(found: report.Report, tmp_path: Path, width: int) -> None:
    """Pictures show, nothing is asked for, no error is logged, the table sorts by the keyboard."""
    path = tmp_path / "report.html"
    path.write_text(found.html.replace("</body>", PROBE + "</body>"))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = next(attrs for tag, attrs in _Page(done.stdout).tags if tag == "body")
    assert body["data-probe"] == (
        '{"sorted":true,"focused":true,"aria":"descending","wide":true,"shown":true,"asked":0}'
    )
    assert "CONSOLE" not in done.stderr, done.stderr
