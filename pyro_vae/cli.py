"""The command line: `pyro-vae demo | fit | evaluate | compare | sample | report`."""

from __future__ import annotations

import difflib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from pyro_vae import __version__

DESCRIPTION = """Deep latent-variable models, held to account: fit a VAE, then ask of its guide, \
datum by datum, how far it is from the posterior."""
COMMANDS = {
    "demo": "fit a VAE on 8×8 digits and compare its guide with exact and MCMC posteriors",
    "fit": "fit a VAE to a published set, a file or a folder of images",
    "evaluate": "log-likelihood of the test rows, with its error",
    "compare": "hold the guide against exact or MCMC posteriors of test rows",
    "sample": "draw new data",
    "report": "write all of it as one page for a browser",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 if done, 1 for bad input, 2 for a bad option, 130 for Ctrl-C."""
    if arguments is None:
        _settle_process()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    folder = None
    try:
        parser = _parser(given)
        options = parser.parse_args(given)
        start = time.perf_counter()
        chosen = options[options.command]
        folder = Path(chosen.get("out") or chosen.run)
        _check_seed(chosen.seed)
        written = globals()[f"_{options.command}"](chosen)
        print(f"{written} ({time.perf_counter() - start:.0f} s)")
    except ArgumentError as error:
        if debug:
            raise
        print(f"pyro-vae: {_with_nearest(str(error), given)}", file=sys.stderr)
        return 2
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"pyro-vae: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"pyro-vae: {told}\n  try:      the same with --debug", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"\npyro-vae: interrupted; {_kept(folder)}", file=sys.stderr)
        return 130
    return 0


def _settle_process() -> None:
    """What holds for a process that is nothing but this command."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no ±


def _parser(given: Sequence[str]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="pyro-vae", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pyro-vae {__version__}")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = ArgumentParser(
            description=summary[0].upper() + summary[1:] + ".",
            exit_on_error=False, allow_abbrev=False,
        )  # fmt: skip
        _add_options(name, command, given)
        command.add_argument("--quiet", action=ActionYesNo, default=False, help="no progress bars")
        commands.add_subcommand(name, command, help=summary)
    parser.epilog = "Any command takes --debug: show the traceback of an error."
    return parser


def _add_options(name: str, command: ArgumentParser, given: Sequence[str]) -> None:
    if name == "demo":
        command.add_argument("--out", default="runs/demo", help="folder for the results")
        command.add_argument("--epochs", type=int, default=150, help="passes over the digits")
        command.add_argument("--digits", type=int, default=16, help="held-out digits to judge")
        command.add_argument("--seed", type=int, default=0, help="of weights, rows and draws")
        return
    if name == "fit":
        command.add_argument("--out", default="runs/fit", help="run folder, made if missing")
        command.add_argument("--config", type=str | None, help="a YAML or TOML file to start from")
        if name in given:
            from pyro_vae import guides, likelihoods, priors
            from pyro_vae.recipe import Recipe, parts_of, read_recipe

            command.add_class_arguments(Recipe, None)
            command.epilog = " ".join(
                f"{home.__name__.rpartition('.')[2]}: {', '.join(sorted(parts_of(home)))}."
                for home in (priors, likelihoods, guides)
            )
            if file := _value_of("--config", given):
                command.set_defaults(_flat(asdict(read_recipe(file))))
    else:
        command.add_argument("run", help="a run folder that `pyro-vae fit` made")
        command.add_argument("--seed", type=int, default=0, help="of the draws")
        command.add_argument(
            "--out", type=str | None, help="folder for the results, the run's own by default"
        )
    if name == "evaluate":
        command.add_argument("--draws", type=int, default=1000, help="of the guide for each row")
    if name in ("evaluate", "compare", "report"):
        rows = 1000 if name == "evaluate" else 16
        command.add_argument("--rows", type=int, default=rows, help="test rows to use, at most")
    if name == "sample":
        command.add_argument("--count", type=int, default=64, help="of new data")
    command.add_argument(
        "--allow", type=list[str], default=[],
        help="modules that a configuration may take classes from, which runs their code",
    )  # fmt: skip


def _kept(folder: Path | None) -> str:
    names = [] if folder is None or not folder.is_dir() else _names(folder)
    return f"kept in {folder}: {names}" if names else "nothing was written"


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir()))


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed is 0 or more, and below 2**32; got {seed}")


def _demo(options: Namespace) -> str:
    from pyro_vae.demo import demo

    run, verdict = demo(
        options.out, epochs=options.epochs, digits=options.digits,
        seed=options.seed, progress=not options.quiet,
    )  # fmt: skip
    print(run, end="\n\n")
    print(verdict, end="\n\n")
    print(f"all of it as a page: pyro-vae report {options.out}")
    return f"{options.out}: {_names(Path(options.out))}"


def _fit(options: Namespace) -> str:
    from pyro_vae.recipe import carry_out, recipe_of

    run = carry_out(
        recipe_of(options), options.out, allow=options.allow, progress=not options.quiet
    )
    print(run.fitted)
    return f"{run.folder}: {_names(run.folder)}"


def _evaluate(options: Namespace) -> str:
    from pyro_vae.recipe import open_run
    from pyro_vae.tables import mean_with_error
    from pyro_vae.verdict import bounds

    run = open_run(options.run, allow=options.allow)
    batch, folder = _test_rows(run, options.rows), _results(options)
    found = bounds(run.model, run.guide, batch, draws=options.draws, seed=options.seed)
    table = found.table
    table.to_csv(folder / "evaluation.csv", index_label="row", float_format="%.6g")
    count = len(table)
    summary = {
        "rows": count,
        "draws": options.draws,
        "seed": options.seed,
        "elbo": table.elbo.mean(),
        "elbo_se": table.elbo.sem() if count > 1 else None,
        "log_likelihood": table.iwae.mean(),
        "log_likelihood_se": table.iwae.sem() if count > 1 else None,
        "khat_above_0.7": float((table.khat > 0.7).mean()),
        "median_ess": table.ess.median(),
    }
    (folder / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{count} test row{'s' * (count > 1)}, {options.draws} draws each, nats a row "
        "(standard error over rows)\n"
        f"  ELBO              {mean_with_error(found.elbo):>16}\n"
        f"  log p(x), IWAE    {mean_with_error(found.iwae):>16}\n"
        f"  k-hat above 0.7   {summary['khat_above_0.7']:16.1%}   there the estimate is too low\n"
        f"  ESS, median       {summary['median_ess']:16.0f}"
    )
    return f"{folder}: evaluation.csv, evaluation.json"


def _compare(options: Namespace) -> str:
    from matplotlib.figure import Figure

    from pyro_vae.recipe import open_run
    from pyro_vae.verdict import compare

    run = open_run(options.run, allow=options.allow)
    batch, folder = _test_rows(run, options.rows), _results(options) / "verdict"
    verdict = compare(run.model, run.guide, batch, seed=options.seed, progress=not options.quiet)
    verdict.save(folder)
    if run.recipe.latent == 2:
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        verdict.plot(run.data.image_shape, figure=figure)
        figure.savefig(folder / "posteriors.png", dpi=150)
    print(verdict, end="\n\n")
    return f"{folder}: {_names(folder)}"


def _sample(options: Namespace) -> str:
    import numpy as np
    import torch
    from matplotlib.figure import Figure

    from pyro_vae import plots
    from pyro_vae.pair import evaluating, preserved_rng
    from pyro_vae.recipe import open_run

    run = open_run(options.run, allow=options.allow)
    if options.count < 1:
        raise ValueError(f"count must be 1 or more; got {options.count}")
    folder = _results(options)
    with preserved_rng(options.seed), evaluating(run.model), torch.no_grad():
        x = run.model(None, size=options.count)
    np.save(folder / "samples.npy", x.numpy())
    written = "samples.npy"
    if run.data.image_shape is not None:
        figure = Figure(figsize=(8, 8), layout="constrained")
        plots.images(figure.subplots(), x, run.data.image_shape)
        figure.savefig(folder / "samples.png", dpi=150)
        written += ", samples.png"
    return f"{folder}: {written}"


def _report(options: Namespace) -> str:
    from pyro_vae.recipe import open_run
    from pyro_vae.report import headline, page

    run, folder = open_run(options.run, allow=options.allow), _results(options)
    found = page(
        run.model, run.guide, run.data, run=run.fitted, settings=run.recipe.told(),
        rows=options.rows, seed=options.seed, progress=not options.quiet,
    )  # fmt: skip
    path = found.save(folder / "report.html")
    if found.verdict is not None:
        found.verdict.save(folder / "verdict")
        print(headline(found.verdict).text)
    return f"{path}"


def _results(options: Namespace) -> Path:
    """Where results go, once it is known that they can."""
    from pyro_vae.recipe import writable_folder

    return writable_folder(options.out or options.run)


def _test_rows(run: Any, rows: int) -> tuple[Any, ...]:
    if rows < 1:
        raise ValueError(f"rows must be 1 or more; got {rows}")
    return tuple(part[:rows] for part in run.data.test)


def _value_of(option: str, given: Sequence[str]) -> str | None:
    for word, following in zip(given, [*given[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        deeper = isinstance(value, dict) and key != "options"
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _with_nearest(message: str, given: Sequence[str]) -> str:
    """An error of the parser in one sentence, with the option that may have been meant."""
    message = " ".join(message.split())
    subcommands: Any = _parser(given)._subcommands_action
    known = set(COMMANDS)
    for command in subcommands._name_parser_map.values():
        known |= set(command._option_string_actions)
    for word in given:
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        if near and word.partition("=")[0] not in known and word in message:
            return f"{message}\n  try:      {near[0]}"
    return f"{message}\n  try:      pyro-vae --help"


if __name__ == "__main__":
    sys.exit(main())
