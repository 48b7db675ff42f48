"""One page on a pair: what was fitted, what it generates, and whether its guide can be trusted."""

from pyro_vae.report.findings import Finding as Finding
from pyro_vae.report.findings import headline as headline
from pyro_vae.report.report import Report as Report
from pyro_vae.report.report import page as page
