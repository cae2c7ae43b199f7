"""The table of layers says of each what its adapter declares, or what can be told from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from dsf.adapters import Adapter, Built, Visit, adapters
from dsf.adapters._table import layer_rows, registry_folders, systems_of
from dsf.models import registered
from dsf.report import systems_markdown

RELEASES = {"torch": "2.13.0", "transformers": "5.23.0"}
COLUMNS = ["layer", "systems", "A", "read at", "scope", "with a cache", "tried with"]
MODELS = Path(transformers.__file__).parent / "models"


def _row(layer: str) -> dict[str, str]:
    (row,) = [row for row in layer_rows(RELEASES) if row["layer"] == layer]
    return row


def test_every_class_of_every_adapter_has_a_row():
    rows = layer_rows(RELEASES)
    assert all(list(row) == COLUMNS for row in rows)
    assert len(rows) == sum(len(a.classes) or len(a.covers) for a in adapters())
    text = " ".join(row["layer"] for row in rows)
    for adapter in adapters():
        assert all(name.partition(":")[2] in text for name in adapter.classes)


@pytest.mark.parametrize("adapter", adapters(), ids=lambda a: a.name)
def test_declared_systems_are_registered_and_scopes_are_one_of_two(adapter: Adapter):
    assert set(systems_of(adapter)) <= set(registered())
    assert adapter.scope in ("exact", "along trajectory")


def test_what_is_declared_and_what_is_told_from_the_code():
    gru = _row("`torch.nn.GRUCell`")
    assert (gru["systems"], gru["scope"], gru["read at"]) == (
        "gru", "along trajectory", "weights and input")  # fmt: skip
    assert gru["tried with"] == "torch 2.13.0"
    mamba = _row("`MambaMixer` (mamba)")
    assert (mamba["systems"], mamba["read at"]) == ("mamba", "`mamba_selective_scan`")
    assert mamba["A"] == registered()["mamba"].equations["A"]
    assert (mamba["with a cache"], mamba["tried with"]) == ("yes", "transformers 5.23.0")


def test_an_adapter_of_another_package_needs_to_declare_nothing():
    class Bare(Adapter):
        name = "bare"
        classes = frozenset({"somewhere:Layer"})

        def build(self, visit: Visit) -> list[Built]:
            return []

    assert systems_of(Bare()) == ()


def test_the_table_is_one_line_a_row():
    rows = layer_rows(RELEASES)
    assert len(systems_markdown(rows).splitlines()) == 2 + len(rows)


def test_folders_with_the_interface_are_found_and_those_without_are_not():
    folders = registry_folders(MODELS)
    assert {"llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox", "bert", "roberta", "vit",
            "t5", "bart", "gpt_oss"} <= set(folders)  # fmt: skip
    assert not {"deberta", "gptj", "big_bird", "mamba"} & set(folders)
