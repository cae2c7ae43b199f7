"""What is the mean of a row measure over its rows, and how sure is it?"""

from __future__ import annotations

import numpy as np
import xarray as xr

from dsf.axes import clean_attrs
from dsf.errors import DsfShapeError, DsfValueError

__all__ = ["query_mean"]


def query_mean(values: xr.DataArray, *, start: int = 0) -> xr.Dataset:
    """The mean over the rows from position `start` on, and its standard error.

        standard_error = sqrt( (1 - n/N) s^2 / n )

    n rows with a value out of N that there are, s^2 their variance. It is 0 where every row was
    measured, and on the safe side for the stratified samples of `queries=`. NaN rows are left
    out. `values` is what a row measure returned (dim query, attrs n_query). Returns a Dataset of
    `mean`, `standard_error`, `n` over the other dims. Raises DsfShapeError without a query dim,
    DsfValueError where no row is left.
    Source: Cochran (1977), equation 2.20.
    """
    if "query" not in values.dims:
        raise DsfShapeError(f"dsf.query_mean: values: expected a dim query, got {values.dims}.")
    rows = values.sel(query=values["query"] >= start)
    total = int(values.attrs.get("n_query", values.sizes["query"])) - start
    if not rows.sizes["query"]:
        raise DsfValueError(f"dsf.query_mean: start: expected rows from {start} on, got none.")
    n = rows.notnull().sum("query")
    left = (1 - rows.sizes["query"] / total) if total else 0.0
    variance = rows.var("query", ddof=1).fillna(0.0).where(n > 1, np.nan if left > 0 else 0.0)
    error = np.sqrt(left * variance / n)
    label = str(values.attrs.get("long_name", values.name))
    attrs = {k: v for k, v in values.attrs.items() if k not in ("long_name", "units")}
    units = values.attrs.get("units", "1")
    found = xr.Dataset({"mean": rows.mean("query"), "standard_error": error, "n": n})
    found["mean"].attrs = {"long_name": f"mean over rows of {label}", "units": units}
    found["standard_error"].attrs = {"long_name": f"standard error of {label}", "units": units}
    found["n"].attrs = {"long_name": "rows with a value", "units": "1"}
    return found.assign_attrs(clean_attrs({**attrs, "start": start, "n_query": total}))


MEASURES = ()
