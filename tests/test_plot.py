"""Figures: the data handed to the artists, and that nothing of the caller's is disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

mpl = pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from dsf import plot  # noqa: E402
from dsf.errors import DsfShapeError, DsfTypeError, DsfValueError  # noqa: E402

LENGTH = 12
SPECIAL_TOKENS = ["\n", "\t", "\x00", "\ud800", "$x$", "<script>", "a" * 40, "the"]


def example(length: int = LENGTH, *, signed: bool = True, heads: int | None = None, **attrs):
    generator = np.random.default_rng(0)
    shape = (length, length) if heads is None else (heads, length, length)
    values = generator.normal(size=shape)
    values = np.tril(values if signed else np.abs(values))
    tokens = [SPECIAL_TOKENS[i % len(SPECIAL_TOKENS)] for i in range(length)]
    dims = ("query", "key") if heads is None else ("head", "query", "key")
    coords = {d: np.arange(size) for d, size in zip(dims, shape, strict=True)}
    return xr.DataArray(
        values, dims=dims, name="attention_map", attrs={"direction": "causal", **attrs},
        coords={**coords, "query_token": ("query", tokens), "key_token": ("key", tokens)},
    )  # fmt: skip


def drawn(ax) -> np.ma.MaskedArray:
    return ax.images[0].get_array()


def test_values_reach_the_image_and_the_future_is_absent_not_zero() -> None:
    data = example()
    data[5, 2] = 0.0
    array = drawn(plot.plot_map(data))
    upper = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert np.array_equal(np.ma.getmaskarray(array), upper)
    assert array[5, 2] == 0.0
    assert np.array_equal(array.data[~upper], data.values[~upper])


def test_bidirectional_maps_and_padding() -> None:
    data = example(direction="bidirectional")
    assert not np.ma.getmaskarray(drawn(plot.plot_map(data))).any()
    padded = data.assign_coords(key_padded=("key", [0] * (LENGTH - 1) + [1]))
    mask = np.ma.getmaskarray(drawn(plot.plot_map(padded)))
    assert mask[:, -1].all()
    assert not mask[:, :-1].any()


def test_signed_maps_are_centred_at_zero_and_others_start_there() -> None:
    signed = plot.plot_map(example()).images[0]
    assert signed.norm.vmin == -signed.norm.vmax
    assert signed.get_cmap().name == plot.plot_map(example()).images[0].get_cmap().name == "RdBu_r"
    positive = plot.plot_map(example(signed=False)).images[0]
    assert positive.norm.vmin == 0.0
    assert positive.get_cmap().name == "Reds"


def test_wide_ranges_are_drawn_on_a_log_scale_that_says_so() -> None:
    data = xr.DataArray(np.eye(20) + 1e-4, dims=("query", "key"), name="weight")
    data[0, 1] = -1e-4
    ax = plot.plot_map(data)
    norm = ax.images[0].norm
    assert isinstance(norm, mpl.colors.SymLogNorm)
    assert (norm.vmin, norm.linthresh) == (-norm.vmax, 1e-4)
    assert "log scale beyond 0.0001" in ax.figure.axes[1].get_ylabel()


def test_nan_is_shown_and_counted() -> None:
    data = example()
    data[6, 1], data[7, 0], data[0, 9] = np.nan, np.inf, np.nan  # the last lies in the future
    ax = plot.plot_map(data)
    assert "2 not finite" in ax.get_title()
    overlay = ax.images[1].get_array()
    assert np.argwhere(overlay[..., 3] > 0).tolist() == [[6, 1], [7, 0]]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_degenerate_maps_are_drawn(length: int, fill: float) -> None:
    data = example(length)
    data[:] = fill
    ax = plot.plot_map(data)
    ax.figure.canvas.draw()


def test_all_masked_map_is_drawn() -> None:
    data = example().assign_coords(key_padded=("key", [1] * LENGTH))
    ax = plot.plot_map(data)
    ax.figure.canvas.draw()
    assert np.ma.getmaskarray(drawn(ax)).all()


def test_large_maps_keep_single_strong_weights_with_their_sign() -> None:
    length = 4099
    values = np.zeros((length, length), dtype=np.float32)
    values[4000, 17], values[4098, 4098], values[1000, 3] = -5.0, 2.0, np.nan
    place = np.arange(length)
    data = xr.DataArray(
        values, {"query": place, "key": place}, ("query", "key"), attrs={"direction": "causal"}
    )
    ax = plot.plot_map(data)
    array, factor = drawn(ax), 3
    assert max(array.shape) <= 2048
    assert array[4000 // factor, 17 // factor] == -5.0
    assert array[4098 // factor, 4098 // factor] == 2.0
    assert "blocks of 3" in ax.get_title()
    assert "1 not finite" in ax.get_title()


def test_ten_thousand_tokens_get_few_labels() -> None:
    length = 10_000
    data = xr.DataArray(
        np.zeros((3, length), dtype=np.float32), dims=("query", "key"),
        coords={"query": np.arange(3), "key": np.arange(length)},
    )  # fmt: skip
    ax = plot.plot_map(data)
    assert len(ax.get_xticklabels()) <= 60


def test_special_tokens_are_escaped() -> None:
    assert [plot.display_token(t) for t in SPECIAL_TOKENS] == [
        "\\n", "\\t", "\\x00", "\\ud800", r"\$x\$", "<script>", "a" * 11 + "…", "the",
    ]  # fmt: skip
    ax = plot.plot_map(example())
    ax.figure.canvas.draw()
    assert ax.get_yticklabels()[0].get_text() == "\\n"


def test_grid_shares_a_scale_within_a_row_and_hides_missing_heads() -> None:
    figure, axes = plot.plot_maps({"a": example(heads=3), "b": 10 * example(heads=2)}, heads=3)
    assert axes.shape == (2, 3)
    limits = [[ax.images[0].norm.vmax for ax in line if ax.images] for line in axes]
    assert len(set(limits[0])) == len(set(limits[1])) == 1
    assert limits[1][0] > limits[0][0]
    assert not axes[1, 2].axison
    bars = [ax for ax in figure.axes if ax not in axes.ravel()]
    assert [bar.get_ylabel() for bar in bars] == ["attention map"] * 2


def test_long_lists_are_set_side_by_side() -> None:
    maps = {name: example(heads=2) for name in "abcde"}
    figure, axes = plot.plot_maps(maps, heads=2, blocks=2)
    assert axes.shape == (5, 2)
    figure.canvas.draw()
    assert [ax.get_ylabel() for ax in axes[:, 0]] == [f"{name}\nquery" for name in "abcde"]
    assert [bool(ax.get_xlabel()) for ax in axes[:, 0]] == [False, False, True, False, True]
    left, right = (ax.get_window_extent().x0 for ax in (axes[0, 0], axes[3, 0]))
    assert right > left


def test_ax_is_used() -> None:
    figure = mpl.figure.Figure()
    ax = figure.subplots()
    assert plot.plot_map(example(), ax=ax) is ax


def test_maps_are_images_in_vector_files(tmp_path: Path) -> None:
    """Not one path for each cell: 400 x 400 cells would take megabytes."""
    data = example(400)
    path = plot.save_figure(plot.plot_map(data).figure, tmp_path / "map.svg")
    text = path.read_text(encoding="utf-8")
    assert "<image" in text
    assert text.count("<path") < 500


def test_caller_state_is_left_alone() -> None:
    before = dict(mpl.rcParams)
    plot.plot_map(example())
    plot.plot_maps({"a": example(heads=2)})
    plot.plot_spectrum(xr.DataArray([1.0, 0.1, 0.0], dims="order", name="s"))
    plot.plot_lines(xr.DataArray(np.ones((2, 3)), dims=("head", "query"), name="row_sum"))
    assert dict(mpl.rcParams) == before


def test_pyplot_and_backend_are_not_touched() -> None:
    code = (
        "import sys, numpy as np, xarray as xr; from dsf import plot; "
        "plot.plot_map(xr.DataArray(np.eye(3), dims=('query', 'key'))); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_spectrum_says_what_lies_on_the_floor() -> None:
    data = xr.DataArray([[1.0, 0.1, 0.0]], dims=("head", "order"), name="singular_value",
                        attrs={"units": "1"})  # fmt: skip
    ax = plot.plot_spectrum(data)
    assert ax.get_yscale() == "log"
    assert ax.lines[0].get_ydata().tolist() == [1.0, 0.1, 1e-16]
    assert ax.get_title().startswith("1 below")


def test_lines_are_labelled() -> None:
    data = xr.DataArray(np.ones((2, 3)), dims=("head", "query"), name="row_sum",
                        attrs={"units": "bit"})  # fmt: skip
    ax = plot.plot_lines(data)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("query", "row sum (bit)")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["head 0", "head 1"]


def test_figures_are_written_whole(tmp_path: Path) -> None:
    ax = plot.plot_map(example())
    for ending in ("png", "pdf", "svg"):
        path = plot.save_figure(ax.figure, tmp_path / "deep" / f"map.{ending}")
        assert path.stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [
        "map.pdf", "map.png", "map.svg",
    ]  # fmt: skip
    for name in ("map.nothing", "map"):
        with pytest.raises(DsfValueError, match=f"expected an ending out of .*svg.*got '{name}'"):
            plot.save_figure(ax.figure, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_wrong_data_is_refused_by_name() -> None:
    with pytest.raises(DsfShapeError, match="head"):
        plot.plot_map(example(heads=2))
    with pytest.raises(DsfTypeError, match="complex"):
        plot.plot_map(example() + 1j)
    with pytest.raises(DsfValueError, match="at least one system"):
        plot.plot_maps({})
