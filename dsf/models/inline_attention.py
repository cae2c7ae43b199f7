"""InLine attention: linear attention whose normaliser is subtracted, with a local residual."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dsf.errors import DsfValueError
from dsf.feature_maps import FeatureMap
from dsf.models._heads import (
    check_divides,
    check_query_key,
    merge_heads,
    share_groups,
    split_heads,
)
from dsf.models._inline_core import (
    SYSTEM,
    KeyMeans,
    check_names,
    inline_map,
    key_means,
    one_pass,
)
from dsf.models._local_residual import (
    check_grid,
    convolved,
    grid_convolved,
    grid_taps,
    register_recurrence,
    with_register,
)
from dsf.models._mixer import SequenceMixer
from dsf.recurrence import Recurrence
from dsf.scanning import scan, step
from dsf.shapes import Float
from dsf.wrappers import Anticausal, Bidirectional, System


def inline_attention_recurrence(
    query: Float[Tensor, "batch time head width"],
    key: Float[Tensor, "batch time group width"],
    *,
    causal: bool = True,
    coordinates: str = "sums",
    feature_map: str | FeatureMap = "identity",
    scale: str = "released",
    behind: Float[Tensor, "#batch #time head tap"] | None = None,
    ahead: Float[Tensor, "#batch #time head _ahead"] | None = None,
    past: KeyMeans | None = None,
) -> System:
    """InLine attention over values (batch, time, head, channel): weights that sum to one, signed.

        M_tj = g_t phi(q_t).(phi(k_j) - kbar_t) + 1/t,   kbar_t the mean of phi(k_1..t)

    (t, kbar_t become length and the mean of all if not causal); g = 1 ("published") or
    width^(-1/2)/t ("released"). Two coordinates of one map, feature + 1 states a head:

        sums     A = I, B_t = (phi(k_t), 1), C_t = (g phi(q_t), (1 - g t phi(q_t).kbar_t)/t)
        centred  A_t = [[I, -a_t], [0, (t-1)/t]], B_t = (a_t, 1/t), C_t = (g phi(q_t), 1),
                 a_t = phi(k_t) - kbar_t, the stable one

    behind: taps of a local residual, sum_i behind_t[i] v_(t-i) added to the output (a shift
    register, A dense then); ahead: the same for v_(t+1), v_(t+2), ..., not causal only. Taps per
    channel: give every channel a head. past: `key_means` of earlier tokens, to go on from.
    feature_map: identity, relu, leaky_relu, exp (of 0.2 x), any of `dsf.feature_maps`, a callable.
    Raises DsfValueError, DsfShapeError. Source: Han et al. (2024), eq. 5 and released code; the
    causal forms are derived.
    """
    check_query_key("dsf.inline_attention_recurrence", query, key)
    check_names(coordinates, scale)
    if causal and ahead is not None:
        raise DsfValueError(
            "dsf.inline_attention_recurrence: ahead: expected None for causal=True, got taps."
        )
    phi = inline_map(feature_map)
    g = query.shape[-1] ** -0.5 if scale == "released" else None
    q, k = phi(query), share_groups(phi(key), query.shape[2])
    means = key_means(k, past)
    if causal:
        r = one_pass(q, k, means, means, g, coordinates)
        return r if behind is None else with_register(r, register_recurrence(behind))
    count = max(k.shape[1], 1)  # no token, no mean: nothing is divided
    rows = KeyMeans(count, means.anchor, means.mean[:, -1:])
    r = one_pass(q, k, means, rows, g, coordinates)
    flipped = k.flip(1)
    suffix = key_means(flipped, KeyMeans(0, means.anchor, torch.zeros_like(means.mean[:, :1])))
    rows = KeyMeans(count, means.anchor, suffix.mean[:, -1:])
    back = one_pass(q.flip(1), flipped, suffix, rows, g, coordinates).flip_time()
    if behind is not None:
        r = with_register(r, register_recurrence(behind))
    if ahead is not None:
        back = with_register(back, register_recurrence(ahead, lead=1))
    return Bidirectional(r, Anticausal(back, strict=True))


class InlineState(NamedTuple):
    """What `step` keeps: key means, memory (batch, head, state, channel), tokens' running mean."""

    keys: KeyMeans
    memory: Tensor
    token_mean: Tensor


class InlineAttention(SequenceMixer):
    """The InLine layer: q, k, v in one map, InLine attention, local residual, output map.

    local: None; "causal", `taps` lags 0..taps-1 per channel; "grid", the released 3 x 3 residual
    on a square image (not causal; class_token first). The taps are MLP(z) with grouped 1 x 1
    convolutions; z is the mean token ("grid"), the token itself or the running mean
    ("causal", `taps_from`). With taps every channel is a head of its own. Parameter names are
    those of the release. Cost O(length x width^2 / n_head), state as much without length.
    """

    system: ClassVar[str] = SYSTEM
    equations: ClassVar[dict[str, str]] = {
        "A": "I   (or [[I, −aₜ], [0, (t−1)/t]]; ⊕ shift)", "B": "(φ(kₜ), 1)   (or (aₜ, 1/t))",
        "C": "(gφ(qₜ)ᵀ, (1 − gφ(qₜ)ᵀΣφ(k))/t)   (or (gφ(qₜ)ᵀ, 1)), taps", "D": "0",
    }  # fmt: skip
    normalised_by: ClassVar[str] = "rows sum to 1 (mean taken off)"
    source: ClassVar[str] = "Han et al. (2024), arXiv 2412.06590, eq. 5; causal form derived"

    def __init__(
        self,
        width: int,
        n_head: int = 4,
        *,
        causal: bool = True,
        coordinates: str = "sums",
        feature_map: str | FeatureMap = "identity",
        scale: str = "released",
        local: str | None = None,
        taps: int = 3,
        taps_from: str = "token",
        class_token: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_divides("InlineAttention", "n_head", n_head, "width", width)
        check_names(coordinates, scale)
        wanted = (None, "causal") if causal else (None, "grid")
        if local not in wanted or taps_from not in ("token", "running_mean"):
            raise DsfValueError(
                f"dsf.InlineAttention: local, taps_from: expected one of {wanted} for causal="
                f"{causal} and token or running_mean, got {local!r} and {taps_from!r}."
            )
        self.n_head, self.is_causal, self.local = n_head, causal, local
        self.coordinates, self.scale = coordinates, scale
        self.feature_map = inline_map(feature_map)
        self.taps_from, self.class_token = taps_from, class_token
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        n_tap = 9 if local == "grid" else taps
        self.residual = None if local is None else nn.Sequential(
            nn.Conv1d(width, width, 1, groups=n_head), nn.GELU(),
            nn.Conv1d(width, n_tap * width, 1, groups=n_head),
        )  # fmt: skip

    @classmethod
    def small(cls, width: int) -> InlineAttention:
        """Four heads, three causal taps."""
        return cls(width, 4, local="causal")

    def recurrence(self, x: Tensor) -> tuple[System, Tensor]:
        """The system with its register, and the values; per channel where there are taps."""
        if self.local != "grid":
            return self._system(x, self._taps(x) if self.local else None)
        side = self._side(x)
        behind, ahead = grid_taps(self._kernel(x), side, self.class_token)
        return self._system(x, behind, ahead)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """Heads (or channels) merged, output map."""
        return self.proj(merge_heads(y))

    def forward(self, x: Tensor) -> Tensor:
        """Attention by scan and the residual by convolution: (batch, time, width)."""
        q, k, v = self._project(x)
        system = inline_attention_recurrence(q, k, causal=self.is_causal, **self._options())
        y = merge_heads(scan(system, v))
        if self.local == "causal":
            y = y + convolved(merge_heads(v), self._taps(x))
        elif self.local == "grid":
            y = y + grid_convolved(
                merge_heads(v), self._kernel(x), self._side(x), self.class_token
            )
        return self.proj(y)

    def step(self, x_t: Tensor, state: Any = None) -> tuple[Tensor, InlineState]:
        """One token; memory holds the attention's state and the register."""
        x = x_t[:, None]
        before = None if state is None else state.keys
        seen = 0 if before is None else before.count
        mean = x if state is None else state.token_mean + (x - state.token_mean) / (seen + 1)
        taps = None if self.local is None else self._taps(x, mean)
        system, u = self._system(x, taps, past=before)
        assert isinstance(system, Recurrence)
        y, memory = step(system, u[:, 0], None if state is None else state.memory)
        _, k, _ = self._project(x)
        k = self._spread(self.feature_map(k)) if self.local else self.feature_map(k)
        means = key_means(k, before)
        keys = KeyMeans(seen + 1, means.anchor, means.mean)
        return self.readout(y[:, None], x)[:, 0], InlineState(keys, memory, mean)

    def _options(self) -> dict[str, Any]:
        return {"coordinates": self.coordinates, "feature_map": self.feature_map,
                "scale": self.scale}  # fmt: skip

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(part, self.n_head) for part in self.qkv(x).chunk(3, -1))

    def _spread(self, x: Tensor) -> Tensor:
        """Every channel a head: a head's query and key are shared by its channels."""
        return x.repeat_interleave(self.proj.in_features // self.n_head, dim=2)

    def _system(
        self, x: Tensor, behind: Tensor | None = None, ahead: Tensor | None = None,
        past: KeyMeans | None = None,
    ) -> tuple[System, Tensor]:  # fmt: skip
        q, k, v = self._project(x)
        if behind is not None:
            q, k, v = self._spread(q), self._spread(k), merge_heads(v)[..., None]
        system = inline_attention_recurrence(
            q, k, causal=self.is_causal, behind=behind, ahead=ahead, past=past, **self._options()
        )
        return system, v

    def _taps(self, x: Tensor, mean: Tensor | None = None) -> Tensor:
        """(batch, time, channel, tap) from each token or the mean of the tokens so far."""
        assert self.residual is not None
        z = x
        if self.taps_from == "running_mean":
            count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)
            z = x.cumsum(1) / count[:, None] if mean is None else mean
        if z.shape[1] == 0:  # which torch's convolution refuses
            last = self.residual[2]
            return z[..., None].expand(-1, -1, -1, last.out_channels // z.shape[-1])  # type: ignore[operator]
        return self.residual(z.mT).mT.unflatten(-1, (x.shape[-1], -1))

    def _kernel(self, x: Tensor) -> Tensor:
        assert self.residual is not None
        return self.residual(x.mean(1)[..., None])[..., 0].unflatten(-1, (x.shape[-1], 3, 3))

    def _side(self, x: Tensor) -> int:
        side = round((x.shape[1] - int(self.class_token)) ** 0.5)
        check_grid(x.shape[1], side, self.class_token)
        return side


LAYER = InlineAttention
