"""transformers: Mamba (S6) and Mamba-2 (SSD) mixers, tapped at their scan function."""

from __future__ import annotations

from dsf.adapters._state_space_scans import ChunkScan, SelectiveScan
from dsf.adapters._tapped import transformers_classes


class Mamba(SelectiveScan):
    """S6 layers; Zamba's call the function once for each of its heads."""

    name = "transformers_mamba"
    functions = ("mamba_selective_scan",)
    covers = ("transformers: Mamba, FalconMamba, Jamba and Zamba mixers",)
    classes = transformers_classes({
        "mamba": "MambaMixer", "falcon_mamba": "FalconMambaMixer", "jamba": "JambaMambaMixer",
        "zamba": "ZambaMambaMixer",
    })  # fmt: skip


class Mamba2(ChunkScan):
    """SSD layers."""

    name = "transformers_mamba2"
    functions = ("mamba2_chunk_scan",)
    covers = (
        "transformers: Mamba2, Bamba, FalconH1, GraniteMoeHybrid, Zamba2 and NemotronH mixers",
    )
    classes = transformers_classes({
        "mamba2": "Mamba2Mixer", "bamba": "BambaMixer", "falcon_h1": "FalconH1Mixer",
        "granitemoehybrid": "GraniteMoeHybridMambaLayer", "zamba2": "Zamba2MambaMixer",
        "nemotron_h": "NemotronHMamba2Mixer",
    })  # fmt: skip


ADAPTERS = [Mamba, Mamba2]
