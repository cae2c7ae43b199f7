"""Every architecture of the installed transformers, made small, run and traced: what is refused.

    python tests/audit_models.py [architecture ...]        prints one row for each

A configuration is the class's own defaults with sizes cut by `SIZES`; weights are random. Where
that gives no model, or the model wants inputs that are not made here, the row says so: those are
limits of this script, not of an adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig

from dsf.adapters import adapter_for
from dsf.adapters._selection import model_call
from dsf.errors import DsfError, DsfValueError
from dsf.tracing import LayerTrace, relative_error, trace

LARGEST = 15_000_000
"""Parameters; what is larger after cutting is not made."""
SECONDS = 30
LENGTH, FURTHER = 13, 7
WIDTH = (
    "hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|embedding_size|word_embed_proj_dim|"
    "encoder_hidden_dim|decoder_hidden_size|projection_dim|d_embed|out_hidden_size|"
    "hidden_channels|encoder_hidden_size|emb_dim|width|output_dim|out_dim|text_hidden_size|"
    "cross_attention_dim|embedding_dim|vision_hidden_size|audio_hidden_size|text_dim|input_dim|"
    "output_proj_dim|fc_hidden_size|subsampling_conv_channels"
)  # fmt: skip
HEADS = (
    "num_attention_heads|num_heads|n_head|n_heads|encoder_attention_heads|"
    "decoder_attention_heads|attention_heads|encoder_num_attention_heads|"
    "decoder_num_attention_heads|heads|num_attn_heads|attn_heads|num_query_heads"
)  # fmt: skip
DEPTH = (
    "num_hidden_layers|num_layers|n_layer|n_layers|encoder_layers|decoder_layers|depth|"
    "num_encoder_layers|num_decoder_layers|encoder_num_hidden_layers|"
    "decoder_num_hidden_layers|num_blocks|layers|num_hidden_blocks"
)  # fmt: skip
SIZES = (
    (HEADS, 4), ("num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num", 2),
    (WIDTH, 32), (DEPTH, 2),
    (".*(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|n_inner)", 48),
    ("head_dim|d_kv|attention_head_dim|kv_channels|global_head_dim|v_head_dim", 8),
    ("q_lora_rank|kv_lora_rank|o_lora_rank|qk_rope_head_dim", 8), ("qk_nope_head_dim", 4),
    ("num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    ("num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    ("n_group|topk_group|n_shared_experts|num_shared_experts", 1), (".*vocab_size", 99),
    ("max_position_embeddings|n_positions|max_seq_len", 64), ("index_topk", 6),
    ("sliding_window|attention_window|window_size|local_attention", 5),
    ("image_size", 16), ("patch_size", 4), ("num_mel_bins|n_mels", 80),
)  # fmt: skip
"""Names of numbers in a configuration, and what they are cut to."""


class Row(NamedTuple):
    """What became of one architecture: the worst error of a layer, and by how much the output of
    the traced pass differs from that of the plain one."""

    name: str
    state: str
    layers: int = 0
    error: float = 0.0
    moved: float = 0.0
    systems: str = ""
    why: str = ""


class _TooSlow(Exception):  # noqa: N818
    pass


def cut(config: Any) -> Any:
    """The configuration with its sizes, and those of its parts, made small."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            cut(value)
        elif name.startswith("_") or isinstance(value, bool):
            continue
        elif isinstance(value, int) and re.search(r"token_id$|_token_index$", name):
            if value >= 60:
                setattr(config, name, 3 + sum(map(ord, name)) % 50)
        elif isinstance(value, int):
            size = next((n for names, n in SIZES if re.fullmatch(names, name)), None)
            if size is not None and value > size:
                setattr(config, name, size)
    _consistent(config)
    return config


def _consistent(config: Any) -> None:
    """Lists with an entry a layer, and what must divide the width of a head."""
    depth = getattr(config, "num_hidden_layers", 2)
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        kinds = list(dict.fromkeys(getattr(config, name, None) or ()))
        if kinds:
            with contextlib.suppress(AttributeError):
                setattr(config, name, (kinds + kinds[-1:] * depth)[:depth])
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "qk_rope_head_dim", None):
        config.head_dim = config.qk_rope_head_dim
        config.qk_head_dim = config.qk_rope_head_dim + config.qk_nope_head_dim
        config.num_key_value_heads = config.num_attention_heads
    if isinstance(rope, dict) and re.search("VL|Glm|PaddleOCR|Omni", type(config).__name__):
        rope["mrope_section"] = [2, 1, 1]


def inputs_of(model: Any) -> list[dict[str, Any]]:
    """Tokens with padding, an image, a patch grid, a sound: what the forward has names for.

    Several where the names do not tell the axes.
    """
    names, generator = (
        inspect.signature(model.forward).parameters,
        torch.Generator().manual_seed(1),
    )
    config, given = model.config, {}

    def tokens(length: int) -> Tensor:
        return torch.randint(60, 90, (2, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    grid = next((n for n in ("grid_thw", "image_grid_thw", "target_sizes") if n in names), None)
    embed = [p for n, p in model.named_parameters() if "embed" in n and p.ndim > 1]
    if grid is not None and "input_ids" not in names and embed:
        sizes = torch.tensor([[1, 4, 4], [1, 2, 4]])
        main = next(n for n in ("hidden_states", "pixel_values") if n in names)
        shapes = [(24, weight[0].numel()) for weight in embed] + [(24, *w[0].shape) for w in embed]
        return [{main: noise(*shape), grid: sizes[:, 1:] if grid == "target_sizes" else sizes}
                for shape in shapes]  # fmt: skip
    if "input_ids" in names:
        given["input_ids"] = tokens(LENGTH)
        if "attention_mask" in names:
            given["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
            given["attention_mask"][1, :4] = 0
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = tokens(FURTHER)
    image = names.get("pixel_values")
    both = re.search("(?i)clip|siglip|owl|align|aimv2", type(model).__name__)
    main = getattr(model, "main_input_name", "")
    if image is not None and (image.default is image.empty or main == "pixel_values" or both):
        size = getattr(getattr(config, "vision_config", config), "image_size", 16)
        size = size if isinstance(size, int) else size[0]
        channels = getattr(config, "num_channels", 3)
        given["pixel_values"] = noise(2, channels if isinstance(channels, int) else 3, size, size)
    if "input_values" in names and "input_ids" not in names:
        given["input_values"] = noise(2, 2000)
    if "input_features" in names and "input_ids" not in names:
        mel = getattr(config, "num_mel_bins", 80)
        sounds = [noise(2, 60, mel), noise(2, mel, 60), noise(2, mel, 3000), noise(2, 60, 128)]
        return [{**given, "input_features": sound} for sound in sounds]
    return [given]


def through_the_interface(model: nn.Module) -> list[str]:
    """Classes of the model whose forward calls the attention interface and no adapter covers."""
    kinds = {type(m): m for m in model.modules()
             if type(m).__module__.startswith("transformers.models.")}  # fmt: skip
    return sorted(
        kind.__name__ for kind, module in kinds.items()
        if re.search(r"(?m)^[^#]*ALL_ATTENTION_FUNCTIONS", _source(kind))
        and adapter_for(module) is None
    )  # fmt: skip


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError, AttributeError):
        return ""


def model_of(name: str) -> nn.Module:
    """The base model of an architecture with random weights of seed 0."""
    kind = CONFIG_MAPPING[name]
    made = MODEL_MAPPING[kind]
    made = made[0] if isinstance(made, tuple) else made
    config = cut(kind())
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters after cutting")
    torch.manual_seed(0)
    model = made(cut(kind())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.2)
    return model


def row_of(name: str) -> Row:
    """Traced, refused by dsf, outside of what it covers, or not made here."""
    try:
        model = model_of(name)
    except KeyError:
        return Row(name, "no base model")
    except _TooSlow:
        raise
    except Exception as error:
        return Row(name, "not made", why=_short(error))
    unknown = through_the_interface(model)
    if unknown:
        return Row(name, "refused", why=f"not recognised: {', '.join(unknown)}")
    raised: Exception | None = None
    for inputs in inputs_of(model):
        try:
            moved, found = _traced(model, inputs)
            break
        except _TooSlow:
            raise
        except DsfValueError as error:  # covered layers, none of which ran on these inputs
            return Row(name, "not run", why=_short(error))
        except DsfError as error:
            covered = any(adapter_for(m) is not None for m in model.modules())
            return Row(name, "refused" if covered else "outside", why=_short(error))
        except Exception as error:
            raised = error
    else:
        return Row(name, "not run", why=_short(raised))
    return Row(name, "traced", len(found), max(t.error for t in found.values()), moved,
               ", ".join(sorted({t.system for t in found.values()})))  # fmt: skip


def _traced(model: nn.Module, inputs: dict[str, Any]) -> tuple[float, dict[str, LayerTrace]]:
    """The traces, and the relative difference of the model's output from that of a plain run."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(next(x for x in tree_leaves(output) if isinstance(x, Tensor)).clone())

    hook = model.register_forward_hook(keep)
    try:
        torch.manual_seed(0)
        found = trace(model, inputs)
        torch.manual_seed(0)
        with torch.no_grad():
            model_call("audit", model, inputs)()
    finally:
        hook.remove()
    return relative_error(outputs[0], outputs[-1]), found


def _short(error: Exception | None) -> str:
    text = str(error).split("Covered:")[0]
    return f"{type(error).__name__}: {' '.join(text.split())[:150]}"


def rows(names: list[str] | None = None) -> Iterator[Row]:
    """One for each architecture, each given `SECONDS` of a core."""

    def stop(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        for name in names or sorted(CONFIG_MAPPING):
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                yield row_of(name)
            except _TooSlow:
                yield Row(name, "not made", why=f"more than {SECONDS} s")
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)


def main() -> None:
    """Print the rows as they come, and how many there are of each state."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    states: Counter[str] = Counter()
    for row in rows(sys.argv[1:] or None):
        states[row.state] += 1
        numbers = (f"{row.layers} | {row.error:.1e} | {row.moved:.1e}"
                   if row.state == "traced" else " |  | ")  # fmt: skip
        print(f"| {row.name} | {row.state} | {numbers} | {row.systems or row.why} |", flush=True)
    print(dict(states))


if __name__ == "__main__":
    main()
