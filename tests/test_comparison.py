"""The comparison, its tables and its findings."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
import xarray as xr

import dsf
from dsf import report, results
from dsf.comparison import compare, own_channels, take_heads
from dsf.errors import DsfTypeError, DsfUnsupportedError, DsfValueError
from dsf.findings import findings
from dsf.transitions import Diagonal, Identity

LENGTH, WIDTH = 9, 8
FLOAT32_ERROR = 1e-5
ROUNDING = 1e-12


def system(heads: int, seed: int = 0, name: str = "example") -> dsf.Recurrence:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, LENGTH, heads, *shape, generator=g, dtype=torch.float64)

    return dsf.Recurrence(Diagonal(-draw(3).abs()), draw(3, 1), draw(1, 3), system=name)


def test_values_are_those_of_the_measures_and_gaps_are_nan() -> None:
    few, many = system(2), system(3, seed=1)
    table = compare({"few": few, "many": many}, measures=["row_sum", "epsilon_rank", "n_state"])
    assert dict(table.sizes) == {"system": 2, "layer": 1, "head": 3}
    expected = dsf.measures.row_sum(many).mean(["batch", "query"])
    assert np.allclose(table["row_sum"].sel(system="many", layer=0), expected, atol=ROUNDING)
    assert np.array_equal(
        table["epsilon_rank"].sel(system="few", layer=0)[:2], dsf.measures.epsilon_rank(few)[0]
    )
    assert table["row_sum"].sel(system="few").isnull().values.tolist() == [[False, False, True]]
    assert table["states"].values.tolist() == [3, 3]
    assert table["row_sum"].attrs["units"] == "1"


def test_injectivity_brings_a_verdict_and_the_colliding_queries() -> None:
    collide = system(1).replace(B=torch.zeros(1, LENGTH, 1, 3, 1, dtype=torch.float64))
    table = compare({"blind": collide, "sees": system(1)}, measures=["injectivity"])
    assert table["injectivity_verdict"].values.ravel().tolist() == [-1.0, 1.0]
    pair = table["injectivity_query_pair"].sel(system="blind").values
    assert np.isfinite(pair).any()
    rows = report.rows_of(table)
    assert [row["injectivity_verdict"] for row in rows] == ["no", "yes"]
    assert rows[0]["injectivity_query_pair"].startswith("(")
    assert rows[1]["injectivity_query_pair"] == ""
    assert report.rows_of(table, by="layer")[0]["injectivity_verdict"] == "1 no"


def test_what_softmax_heads_have_alone_stands_beside_the_others() -> None:
    """degrees_of_freedom, token_leverage, taylor_growth by name; other systems say why not."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, LENGTH, 2, 3, generator=g, dtype=torch.float64) for _ in range(2))
    rows = dsf.SoftmaxRows(q, k)
    softmax = dsf.Recurrence(Identity(LENGTH), dsf.OneHot(LENGTH, LENGTH), rows)
    names = ["degrees_of_freedom", "token_leverage", "taylor_growth", "row_sum"]
    table = compare({"softmax": softmax, "example": system(2)}, measures=names)
    one = table.sel(system="softmax", layer=0)
    freedom = dsf.measures.degrees_of_freedom(softmax)
    scores = dsf.measures.token_leverage(softmax)
    for own in ("by_norm", "by_trace", "absolute", "top_share"):
        assert np.allclose(one[f"degrees_of_freedom_{own}"], freedom[own][0], atol=ROUNDING)
    for own, axis in (("of_query", "query"), ("of_key", "key")):
        expected = scores[own].mean(axis)[0]
        assert np.allclose(one[f"token_leverage_{own}"], expected, atol=ROUNDING)
        assert np.allclose(LENGTH * expected, freedom.by_norm[0], rtol=1e-9)
    growth = dsf.measures.taylor_growth(softmax)
    assert np.allclose(one["taylor_growth_row_error"], growth.row_error[0], atol=ROUNDING)
    other = table.sel(system="example", layer=0)
    assert other["degrees_of_freedom_by_norm"].isnull().all()
    refused = json.loads(table.attrs["not_measured"])
    assert set(refused) == {f"example, layer 0, {name}" for name in names[:3]}
    assert all("expected a softmax system" in text for text in refused.values())


def test_models_report_how_far_their_recurrence_is_from_their_output() -> None:
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    model = dsf.models.build("linear_attention", WIDTH)
    table = compare({"right": model}, x, measures=["row_sum"])
    assert 0 <= float(table["error"].item()) < FLOAT32_ERROR

    class Wrong(type(model)):
        def forward(self, x):
            return 1.5 * super().forward(x)

    model.__class__ = Wrong
    assert float(compare({"w": model}, x, measures=["row_sum"])["error"].item()) == pytest.approx(
        1 / 3, rel=1e-4
    )


def test_every_registered_system_can_be_compared_with_every_default_measure() -> None:
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    models = {name: dsf.models.build(name, WIDTH).eval() for name in dsf.models.registered()}
    table = compare(models, x, heads=2)
    assert json.loads(table.attrs["not_measured"]) == {}
    assert table.sizes["head"] == 2
    assert float(table["error"].max()) < FLOAT32_ERROR
    assert not table["row_sum"].isel(head=0).isnull().any()


def test_traces_of_a_model_give_the_layer_axis() -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(4, 3, num_layers=2, batch_first=True)
    traces = dsf.trace(lstm, (torch.randn(1, LENGTH, 4),))
    table = compare({"lstm": traces}, measures=["entropy"])
    assert table["layer"].values.tolist() == [0, 1]
    assert table.sizes["head"] == 3
    assert float(table["error"].max()) < FLOAT32_ERROR


@pytest.mark.parametrize("kind", ["plain", "gated", "anticausal", "bidirectional", "shared"])
def test_the_first_heads_have_the_map_they_had(kind: str) -> None:
    r = system(3)
    if kind == "gated":
        gate = torch.rand(1, LENGTH, 3, 2, dtype=torch.float64)
        whole = dsf.Gated(r, gate)
    elif kind == "anticausal":
        whole = dsf.anticausal(r)
    elif kind == "bidirectional":
        whole = dsf.Bidirectional(r, dsf.anticausal(system(3, seed=1), strict=True))
    elif kind == "shared":
        whole = r.replace(B=r.B[:, :, :1])
    else:
        whole = r
    found = dsf.materialise(take_heads(whole, 2))
    assert torch.equal(found, dsf.materialise(whole)[:, :2])


def test_many_channels_become_heads_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    many = dsf.Recurrence(
        Diagonal(-torch.rand(1, 1, 1, 3, generator=g, dtype=torch.float64)),
        torch.randn(1, 1, 1, 3, 5, generator=g, dtype=torch.float64),
        torch.randn(1, LENGTH, 1, 5, 3, generator=g, dtype=torch.float64),
        torch.randn(1, 1, 1, 5, 5, generator=g, dtype=torch.float64),
    )
    whole = dsf.materialise(many)[:, 0]
    own = dsf.materialise(own_channels(many))
    expected = torch.stack([whole[..., i, i] for i in range(5)], 1)
    assert torch.allclose(own, expected, atol=ROUNDING)
    assert own_channels(system(2)).n_head == 2


def test_progress_is_told_and_refusals_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(system):
        raise DsfUnsupportedError("dsf.never: not for this system.")

    known = dsf.measures.registered()
    monkeypatch.setattr("dsf.measures.registered", lambda: {**known, "never": never})
    calls: list[tuple[int, int, str]] = []
    table = compare({"a": system(1)}, measures=["never", "row_sum"],
                    progress=lambda *told: calls.append(told))  # fmt: skip
    assert calls == [(0, 1, "a, layer 0"), (1, 1, "done")]
    assert "never" not in table
    assert json.loads(table.attrs["not_measured"]) == {
        "a, layer 0, never": "dsf.never: not for this system."
    }


def test_a_fault_of_a_measure_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(system):
        raise ZeroDivisionError

    monkeypatch.setattr("dsf.measures.registered", lambda: {"broken": broken})
    with pytest.raises(ZeroDivisionError):
        compare({"a": system(1)}, measures=["broken"])


def test_wrong_arguments_are_refused_by_name() -> None:
    with pytest.raises(DsfValueError, match="nothing_such"):
        compare({"a": system(1)}, measures=["nothing_such"])
    with pytest.raises(DsfTypeError, match="inputs"):
        compare({"a": dsf.models.build("lstm", WIDTH)})
    with pytest.raises(DsfTypeError, match="'a'"):
        compare({"a": 3})  # type: ignore[dict-item]
    with pytest.raises(DsfValueError, match="at least one"):
        compare({})


def test_tables_survive_a_file(tmp_path) -> None:
    pytest.importorskip("h5netcdf", reason="h5netcdf is not installed")
    table = compare({"a": system(2), "b": system(1)})
    results.save(table, tmp_path / "table.nc")
    xr.testing.assert_identical(results.load(tmp_path / "table.nc"), table)


def test_padding_takes_no_room_in_a_file(tmp_path) -> None:
    pytest.importorskip("h5netcdf", reason="h5netcdf is not installed")
    many = {f"system {i}": system(1, seed=i) for i in range(30)}
    blind = system(50).replace(B=torch.zeros(1, LENGTH, 50, 3, 1, dtype=torch.float64))
    table = compare({**many, "blind": blind}, measures=["injectivity"])
    pairs = table["injectivity_query_pair"]
    results.save(table, tmp_path / "table.nc")
    assert results.load(tmp_path / "table.nc").identical(table)
    results.save(table.drop_vars("injectivity_query_pair"), tmp_path / "without.nc")
    sizes = [(tmp_path / f"{n}.nc").stat().st_size for n in ("table", "without")]
    assert sizes[0] - sizes[1] < pairs.nbytes / 2


# -- tables ------------------------------------------------------------------------------------


def test_csv_has_full_precision() -> None:
    table = compare({"a": system(2)}, measures=["row_sum"])
    rows = list(csv.DictReader(io.StringIO(report.csv_text(report.rows_of(table)))))
    assert [float(row["row_sum"]) for row in rows] == table["row_sum"].values.ravel().tolist()
    assert [row["head"] for row in rows] == ["0", "1"]


def test_html_is_self_contained_and_escaped() -> None:
    hostile = "<script>alert(1)</script>"
    table = compare({hostile: system(1)}, measures=["row_sum"])
    page = report.html_text(hostile, [hostile], report.rows_of(table), b"\x89PNG")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "http" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [(float("nan"), "–"), (float("inf"), "∞"), (3.0, "3"), (0.123456, "0.123"), (5, "5"),
     (-1e-9, "-1e-09"), ("text", "text")],
)  # fmt: skip
def test_numbers_are_shown_short(value: object, shown: str) -> None:
    assert report.show(value) == shown


def test_a_table_of_no_rows_is_written() -> None:
    assert report.csv_text([]) == "\n"
    assert "<table>" in report.html_text("none", [], [])


# -- findings ----------------------------------------------------------------------------------


def invented(**columns: list[float]) -> xr.Dataset:
    """A table of two systems with one layer and two heads."""
    data = {k: (("system", "layer", "head"), np.reshape(v, (2, 1, 2))) for k, v in columns.items()}
    return xr.Dataset(
        {"error": (("system", "layer"), np.zeros((2, 1))), **data},
        {"system": ["plain", "signed"], "layer": [0], "head": [0, 1],
         "states": ("system", [10, 4])},
    )  # fmt: skip


def test_findings_follow_the_numbers() -> None:
    table = invented(
        epsilon_rank=[1.0, 9.0, 4.0, 2.0], negative_mass=[0, 0, 0.3, 0.5],
        injectivity_verdict=[1, 1, -1, 1], injectivity_margin=[0.5, 0.2, 0.0, 0.3],
    )  # fmt: skip
    states, confused, negative = findings(table)
    assert "1 of the 10 stored (plain, head 0)" in states
    assert "4 of the 4 stored (signed, head 0)" in states
    assert "1 of 4 heads" in confused
    assert "(signed)" in confused
    assert "plain, head 1 comes closest, margin 0.2" in confused
    assert "40 % of the absolute weight in signed" in negative
    assert "none at all in 1 of 2 systems (plain)" in negative


def test_findings_leave_out_what_was_not_measured() -> None:
    table = invented(first_token_share=[0.1, 0.1, 0.6, 0.2], memory_half_life=[np.inf, 3, 8, 2])
    first, memory = findings(table)
    assert "signed spends 40 %" in first
    assert "5" in memory
    assert findings(invented(spread=[0.0] * 4)) == []
