"""Results tell themselves by tables, in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

ROWS = 24
"""That are shown of a long table, from both ends; `table` holds all."""


class Tabular:
    """A result with a `table`; subclasses may tell more in `_told`.

    Example:
        >>> import torch
        >>> class Result(Tabular):
        ...     @property
        ...     def table(self):
        ...         return by_datum({"elbo": torch.tensor([-1.5, -2.0])})
        >>> print(str(Result()).splitlines()[-1])
        1     -2.000
    """

    table: Any

    def _told(self) -> Sequence[str | pd.DataFrame]:
        """Sentences and tables, in order."""
        return [self.table]

    def __repr__(self) -> str:
        return "\n\n".join(
            part if isinstance(part, str) else _as_text(part) for part in self._told()
        )

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{html.escape(part)}</p>" if isinstance(part, str) else _as_html(part)
            for part in self._told()
        )


def by_datum(columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row a datum, of figures `(B,)`."""
    import pandas as pd

    table = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
    table.index.name = "datum"
    return table


def mean_with_error(values: Tensor) -> str:
    """The mean of figures, with its standard error if there are two or more.

    Example:
        >>> import torch
        >>> mean_with_error(torch.tensor([1.0, 3.0])), mean_with_error(torch.tensor([1.0]))
        ('2.00 ± 1.00', '1.00')
    """
    error = f" ± {values.std() / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"


def _as_text(table: pd.DataFrame) -> str:
    return table.to_string(float_format="{:.3f}".format, na_rep="–", max_rows=ROWS, line_width=120)


def _as_html(table: pd.DataFrame) -> str:
    return table.to_html(float_format="{:.3f}".format, na_rep="–", max_rows=ROWS, border=0)
