"""Recurrent layers with a cache: the function that runs one token, told as the one that runs many.

A layer's own adapter reads the full-sequence function. With a cache and one token the layer calls
another, by another name and with other shapes; here its arguments are put as a sequence of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsf.adapters._contract import Adapter, Built, TappedCall, Visit, first_tensor
from dsf.adapters._session import replaced
from dsf.adapters._tapped import ScanFunction, implementation_of
from dsf.recurrence import Recurrence

Given = dict[str, Any]


class OneToken(NamedTuple):
    """A one-token function: its parameters in order, and how to say a call to it as a sequence.

    `arguments` gives those of the full-sequence function, `result` its result, `state` the state
    (batch, head, state, channel) before the token where the full-sequence function takes none.
    """

    name: str
    parameters: tuple[str, ...]
    arguments: Callable[[Given], Given]
    result: Callable[[Any], Any]
    state: Callable[[Given], Tensor | None]


_SELECTIVE = ("state", "hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "z")


def _s6(given: Given) -> Given:
    late = {n: given[n][..., None] for n in ("hidden_states", "dt", "B", "C")}
    z = given.get("z")
    return {
        **late, "A": given["A"], "D": given.get("D"), "z": None if z is None else z[..., None],
        "delta_bias": given.get("dt_bias"), "delta_softplus": given.get("dt_softplus", False),
    }  # fmt: skip


def _ssd(given: Given) -> Given:
    """One number per head: the function takes dt, A, D and the bias repeated by channel.

    Falcon-H1's gate z is inside this function, and behind the one for sequences.
    """
    early = {n: given[n][:, None] for n in ("hidden_states", "B", "C")}
    bias, skip = given.get("dt_bias"), given.get("D")
    return {
        **early, "dt": given["dt"][:, None, :, 0], "A": given["A"][:, 0, 0], "z": None,
        "D": None if skip is None else skip[:, 0], "initial_states": given["state"],
        "dt_bias": None if bias is None else bias[:, 0],
        "dt_softplus": given.get("dt_softplus", False),
    }  # fmt: skip


def _none(given: Given) -> None:
    return None


ONE_TOKEN = {
    "transformers_mamba": OneToken(
        "mamba_selective_state_update", _SELECTIVE, _s6, lambda y: y[..., None],
        lambda given: given["state"][..., None],
    ),
    "transformers_mamba2": OneToken(
        "mamba2_selective_state_update", _SELECTIVE, _ssd, lambda y: y[:, None], _none),
}  # fmt: skip
"""By the name of the adapter of the full-sequence function."""

_OWN_FUNCTION = {
    "transformers_recurrent_gemma", "transformers_gated_delta", "transformers_kimi_delta",
}  # fmt: skip
"""Adapters that tap what runs one token as well."""


class Decoding(Adapter):
    """An adapter for the calls of a model with a cache, around the layer's own adapter."""

    def __init__(self, inner: Adapter) -> None:
        self.inner = inner

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether the layer's calls with a cache are known."""
        inner = self.inner
        return inner.decodes or inner.name in ONE_TOKEN or inner.name in _OWN_FUNCTION

    @property
    def needs_tap(self) -> bool:  # type: ignore[override]
        """As the layer's own adapter."""
        return self.inner.needs_tap

    @property
    def name(self) -> str:  # type: ignore[override]
        """As the layer's own adapter."""
        return self.inner.name

    @contextlib.contextmanager
    def tap(self, modules: list[nn.Module], record: Callable) -> Iterator[None]:
        """The taps of the layer's own adapter, and that of its one-token function."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.inner.tap(modules, record))
            one = ONE_TOKEN.get(self.inner.name)
            if one is not None and isinstance(self.inner, ScanFunction):
                spaces = {id(s): s for s in map(self.inner.namespace, modules)}
                for space in spaces.values():
                    if space.get(one.name) is not None:
                        tapped = _recording(one, self.inner, space[one.name], modules, record)
                        stack.enter_context(replaced(space, one.name, tapped))
            yield

    def build(self, visit: Visit) -> list[Built]:
        """What the layer's own adapter builds, with the state before the token."""
        built = self.inner.build(visit)
        states = [call.kwargs.get("state_before") for call in visit.taps]
        if not states or not all(isinstance(s, Tensor) for s in states):
            return built
        (part,) = built
        assert isinstance(part.recurrence, Recurrence)
        state = torch.cat([s for s in states if s is not None], 1).to(part.values.dtype)
        return [dataclasses.replace(part, recurrence=part.recurrence.replace(initial_state=state))]


def _recording(
    one: OneToken, inner: ScanFunction, original: Callable, layers: list[nn.Module],
    record: Callable,
) -> Callable:  # fmt: skip
    def tapped(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(one.parameters, args, strict=False)), **kwargs}
        given = pytree.tree_map(_copied, given)  # the function changes its state in place
        result = original(*args, **kwargs)
        said = {**inner.named((), one.arguments(given)), "state_before": one.state(given)}
        alike = result
        if given.get("z") is not None and said["z"] is None:
            alike = original(**{**pytree.tree_map(_copied, given), "z": None})
        record(layers, TappedCall(
            inner.functions[0], (), said, one.result(first_tensor(alike)),
            implementation_of(original),
        ))  # fmt: skip
        return result

    tapped.inner = original  # type: ignore[attr-defined]
    return tapped


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
