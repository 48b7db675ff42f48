"""The command line: `pyro-vae demo`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pyro_vae import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when done, 1 for an error of the user's, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except (ValueError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npyro-vae: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-vae", description="Deep latent-variable models, held to account."
    )
    parser.add_argument("--version", action="version", version=f"pyro-vae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="fit a VAE on 8×8 digits and compare its guide with exact and MCMC posteriors",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where results go")
    demo.add_argument("--epochs", type=int, default=150, help="passes over the digits")
    demo.add_argument("--digits", type=int, default=16, help="held-out digits to judge")
    demo.add_argument("--seed", type=_seed, default=0, help="of weights, rows and draws")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"a seed is 0 or more, and below 2**63; got {text}")
    return value


def _demo(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    from pyro_vae.demo import demo

    run, verdict = demo(
        options.out, epochs=options.epochs, digits=options.digits,
        seed=options.seed, progress=not options.quiet,
    )  # fmt: skip
    print(run, end="\n\n")
    print(verdict, end="\n\n")
    seconds = time.perf_counter() - start
    written = ", ".join(sorted(path.name for path in Path(options.out).iterdir()))
    print(f"{options.out}: {written} ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
