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
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', found.html)
    assert [int(index) for index, _ in rows] == [0, 1, 2]
    for (_, cells), (_, row) in zip(rows, table.iterrows(), strict=True):
        values = [float(v) for v in re.findall(r'data-value="([^"]+)"', cells)]
        assert row["kl"] in values and row["log_evidence"] in values


def test_it_is_saved_whole_and_shown_in_a_notebook(found: report.Report, tmp_path: Path) -> None:
    assert found.save(tmp_path / "r.html").read_text() == found.html
    assert "srcdoc" in found._repr_html_() and '"><' not in found._repr_html_()[:-9][40:]
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


def test_what_a_pair_does_not_allow_is_said() -> None:
    data = pv.data.load("digits")
    found = report.page(*quantized_pair(), data, rows=2, **SMALL)
    assert found.verdict is None
    assert "Not to be had for this pair" in found.html and "discrete" in found.html


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
const head = [...document.querySelectorAll("th button")].find(b => b.textContent === "KL");
const kl = () => [...document.querySelectorAll("table.sortable tbody tr")].map(
  row => +row.cells[head.parentElement.cellIndex].dataset.value);
head.focus();
head.click(); const up = kl();
head.click(); const down = kl();
const sorted = up.every((v, i) => i === 0 || up[i - 1] <= v) &&
  down.every((v, i) => i === 0 || down[i - 1] >= v);
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
