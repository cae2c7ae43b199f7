"""What in a comparison is most worth a look, told from its numbers."""

from __future__ import annotations

import xarray as xr

from dsf.report import Row, rows_of


def findings(comparison: xr.Dataset, count: int = 3) -> list[str]:
    """The first `count` of: negative weights, states needed against stored, queries confused,
    attention to the first token, memory. Each is left out where its measure is, or says nothing.
    """
    layers, heads = rows_of(comparison, by="layer"), rows_of(comparison)
    deep = {row["system"] for row in layers if row["layer"] > 0}
    for row in (*layers, *heads):
        row["deep"] = row["system"] in deep
    texts = [_states(heads), _confused(heads), _negative(layers), _first(layers), _memory(layers)]
    return [text for text in texts if text][:count]


def _with(rows: list[Row], name: str) -> list[Row]:
    return [r for r in rows if isinstance(r.get(name), float) and r[name] == r[name]]


def _place(row: Row) -> str:
    layer = f", layer {row['layer']}" if row["deep"] else ""
    return f"{row['system']}{layer}" + (f", head {row['head']}" if "head" in row else "")


def _share(x: float) -> str:
    return f"{100 * x:.3g} %"


def _states(rows: list[Row]) -> str:
    """Fewest and most states needed, relative to the states stored (per value channel)."""
    known = [r for r in _with(rows, "epsilon_rank") if r["states"] > 1]
    if not known:
        return ""
    least = min(known, key=lambda r: r["epsilon_rank"] / r["states"])
    most = max(known, key=lambda r: r["epsilon_rank"] / r["states"])
    parts = [f"{r['epsilon_rank']:.0f} of the {r['states']} stored ({_place(r)})"
             for r in (least, most)]  # fmt: skip
    return f"States needed at 1 %: fewest for its size {parts[0]}, most {parts[1]}."


def _confused(rows: list[Row]) -> str:
    """Heads that give two different queries the same weights."""
    known = [r for r in rows if r.get("injectivity_verdict") in ("yes", "no", "undecided")]
    if not known:
        return ""
    confused = [r for r in known if r["injectivity_verdict"] == "no"]
    sure = [r for r in known if r["injectivity_verdict"] == "yes"]
    text = f"Queries confused: {len(confused)} of {len(known)} heads give two different queries "
    text += "the same weights"
    if confused:
        text += f" ({', '.join(dict.fromkeys(r['system'] for r in confused))})"
    if sure:
        closest = min(sure, key=lambda r: r["injectivity_margin"])
        text += f"; of the others {_place(closest)} comes closest, margin "
        text += f"{closest['injectivity_margin']:.2g}"
    return text + "."


def _negative(rows: list[Row]) -> str:
    known = _with(rows, "negative_mass")
    if not known:
        return ""
    most = max(known, key=lambda r: r["negative_mass"])
    without = dict.fromkeys(r["system"] for r in known if r["negative_mass"] == 0)
    if most["negative_mass"] == 0:
        return "Negative weights: none in any system."
    text = f"Negative weights: {_share(most['negative_mass'])} of the absolute weight in "
    return f"{text}{_place(most)}; none at all in {len(without)} of " + (
        f"{len({r['system'] for r in known})} systems ({', '.join(without)}).")  # fmt: skip


def _first(rows: list[Row]) -> str:
    known = _with(rows, "first_token_share")
    if not known:
        return ""
    most = max(known, key=lambda r: r["first_token_share"])
    return f"First token: {_place(most)} spends {_share(most['first_token_share'])} on it."


def _memory(rows: list[Row]) -> str:
    known = [r for r in _with(rows, "memory_half_life") if r["memory_half_life"] != float("inf")]
    if not known:
        return ""
    least = min(known, key=lambda r: r["memory_half_life"])
    most = max(known, key=lambda r: r["memory_half_life"])
    return (
        f"Memory: half-lives from {least['memory_half_life']:.3g} steps ({_place(least)}) to "
        f"{most['memory_half_life']:.3g} ({_place(most)})."
    )
