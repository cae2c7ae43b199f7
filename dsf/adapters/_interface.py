"""transformers' attention interface: functions of ours in the place of an implementation's."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_counter = itertools.count()
_originals: dict[str, str | None] = {}
"""Our names in the registry, while they are there, and what they stand for: taps may nest."""


class _Name(str):
    """A name of ours that also equals the implementation it stands for.

    Layers with chosen keys ask `config._attn_implementation in ("eager", "sdpa")` before they
    build the mask that says which; under a name of no meaning they would build none.
    """

    stands_for: str

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.stands_for

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def runs_as(original: str | None) -> str:
    """The implementation that a pass really uses."""
    return original if original is not None and original in ("sdpa", *_originals) else "eager"


def base(name: str | None) -> str:
    """sdpa or eager: the implementation behind a name of ours."""
    while name in _originals:
        name = _originals[name]
    return "sdpa" if name == "sdpa" else "eager"


def implementation(module: nn.Module, name: str) -> Callable:
    """The function that the layer's own file would have used under this name."""
    forward = inspect.unwrap(type(module).forward)
    namespace = forward.__globals__
    eager = next(
        (namespace[n] for n in forward.__code__.co_names if n.endswith("eager_attention_forward")),
        namespace.get("eager_attention_forward"),
    )
    return namespace["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)


@contextlib.contextmanager
def registered(
    modules: list[nn.Module], function: Callable[[str | None], Callable]
) -> Iterator[None]:
    """Switch every configuration of these modules to `function(its implementation)`, and back."""
    from transformers import AttentionInterface, AttentionMaskInterface

    configs: dict[int, Any] = {id(m.config): m.config for m in modules}
    # eager GPT-2 with this option computes by itself: there our name means nothing to it
    upcast = {id(m.config) for m in modules if getattr(m, "reorder_and_upcast_attn", False)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    names = []
    try:
        for config, original in before:
            name = _Name(f"dsf_tap_{next(_counter)}")
            name.stands_for = str(name) if id(config) in upcast else base(original)
            names.append(name)
            _originals[name] = original
            AttentionInterface.register(name, function(original))
            masks = sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS
            mask = masks.get(runs_as(original))
            if mask is not None:
                AttentionMaskInterface.register(name, mask)
            config._attn_implementation_internal = name
        yield
    finally:
        for config, original in before:
            config._attn_implementation_internal = original
        for name in names:
            _originals.pop(name, None)
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)
