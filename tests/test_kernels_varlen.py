"""Sequences of different lengths packed in one row (`cu_seqlens`) against a call for each, and
against the float64 loop. Run as a script it prints the interpreter's errors as JSON."""

import importlib
import itertools
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 16.0  # units
LENGTHS = (0, 1, 63, 64, 65, 509, 0)
SHORTER = (0, 1, 17, 0)  # the same edges of chunks of 16


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def tensors(lengths, head=2, group=1, state=4, channel=4, dtype=torch.float32, decay="token",
            initial=True):  # fmt: skip
    length = sum(lengths)
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    decays = {"token": -draw(1, length, head).abs(), "head": -draw(head).abs(), "none": None}
    return {
        "query": draw(1, length, group, state).to(dtype),
        "key": draw(1, length, group, state).to(dtype),
        "value": draw(1, length, head, channel).to(dtype),
        "log_decay": decays[decay],
        "initial_state": draw(len(lengths), head, state, channel) if initial else None,
    }


def by_sequence(scan, lengths):
    """The scan of a packed row as a call for each sequence."""

    def run(**arguments):
        outputs, states = [], []
        cuts = starts(lengths).tolist()
        for s, (start, stop) in enumerate(itertools.pairwise(cuts)):
            one = {k: v[:, start:stop] if v is not None and v.dim() in (3, 4) else v
                   for k, v in arguments.items()}  # fmt: skip
            if one["initial_state"] is not None:
                one["initial_state"] = arguments["initial_state"][s : s + 1]
            output, state = scan(**one, scale=0.5)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    return run


def judge(device="cpu", lengths=SHORTER, **sizes):
    """Errors from the loop in units, and which results do not equal those of separate calls."""
    from dsf_kernels.reference import error_units, scalar_decay_scan_reference
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    cut = starts(lengths)
    given = kernel_laws.moved(tensors(lengths, **sizes), device)
    unit = UNIT[given["value"].dtype]

    def packed(**arguments):
        cu_seqlens = cut.to(arguments["value"].device)
        return scalar_decay_scan(**arguments, scale=0.5, cu_seqlens=cu_seqlens)

    def loop(**arguments):
        return scalar_decay_scan_reference(**arguments, scale=0.5, cu_seqlens=cut)

    units = error_units(packed, loop, given, {"log_decay"}, unit=unit)
    with pytest.MonkeyPatch.context() as patch:  # separate calls that walk, as packed ones do
        patch.setattr(launch, "SHORT", 0)
        patch.setattr(launch, "FEW", 0)
        shared = ("log_decay",) if sizes.get("decay") == "head" else ()  # summed over the calls
        runs = [kernel_laws.with_gradients(run, shared, torch.square)(**given)
                for run in (packed, by_sequence(scalar_decay_scan, lengths))]  # fmt: skip
    differ = [n for n, pair in enumerate(zip(*runs, strict=True)) if not torch.equal(*pair)]
    return units, differ


CASES = {
    "states and decays": {},
    "wide, one decay a head": {"decay": "head", "state": 17, "channel": 3},
    "neither state nor decay": {"decay": "none", "initial": False},
    "bf16, heads that share keys": {"dtype": torch.bfloat16},
    "nothing": {"lengths": (0, 0)},
}
MALFORMED = {  # on the device: what is left of them is safe and in order
    "gaps": ([3, 8, 22], [3, 8, 22]),
    "falls and goes beyond": ([-5, 20, 8, 99], [0, 20, 20, 24]),
}
ON_GPU = {
    f"{dtype} {name} {state} x {channel}": {"dtype": dtype, "state": state, "channel": channel,
                                            "head": 4, "group": group} | sizes
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for name, sizes in {"token": {}, "head": {"decay": "head"},
                        "none": {"decay": "none", "initial": False},
                        "no state": {"initial": False}}.items()
    for state, channel, group in ((100, 60, 4), (128, 64, 2), (64, 200, 1))
}  # fmt: skip


def outside(cut, kept, device="cpu"):
    """Errors of the outputs and gradients of 24 tokens cut at `cut`, read as `kept`: those of
    no sequence are 0."""
    from dsf_kernels.reference import scalar_decay_scan_reference

    given = tensors([24], head=1, initial=False)
    given["initial_state"] = torch.randn(len(cut) - 1, 1, 4, 4)
    start, stop = kept[0], kept[-1]
    leaves = {k: v.to(device).requires_grad_() for k, v in given.items()}
    cu_seqlens = torch.tensor(cut, device=device)
    found = torch.ops.dsf.scalar_decay_scan(*leaves.values(), 1.0, cu_seqlens)
    grads = torch.autograd.grad([y.square().sum() for y in found], list(leaves.values()))
    exact = {k: v.detach().cpu().requires_grad_() for k, v in given.items()}
    inner = {k: v if k == "initial_state" else v[:, start:stop] for k, v in exact.items()}
    moved = torch.tensor(kept) - start
    output, final = scalar_decay_scan_reference(**inner, cu_seqlens=moved)
    losses = [y.square().sum() for y in (output, final)]
    wanted = torch.autograd.grad(losses, list(exact.values()))
    output = torch.nn.functional.pad(output, (0, 0, 0, 0, start, 24 - stop))
    pairs = zip((*found, *grads), (output, final, *wanted), strict=True)
    return max(float((a.detach().cpu() - b).abs().max() / b.abs().max()) for a, b in pairs)


def interpret():
    launch = importlib.import_module("dsf_kernels.scalar_decay_launch")
    launch.CHUNK, launch.SLAB = 32, 16  # 16 steps a chunk, as products are exact here
    found = {name: judge(**sizes) for name, sizes in CASES.items()}
    found["malformed"] = {name: outside(*cuts) for name, cuts in MALFORMED.items()}
    arguments = (*tensors([3, 0]).values(), 1.0, starts([3, 0]))
    torch.library.opcheck(torch.ops.dsf.scalar_decay_scan, arguments,
                          test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case: near the loop, and the bits of separate calls."""
    found = kernel_laws.run_interpreted(__file__)
    assert max(found.pop("malformed").values()) < 1e-5
    assert set(found) == set(CASES)
    kernel_laws.all_within({name: units for name, (units, _) in found.items()}, LIMIT)
    assert not any(differ for _, differ in found.values()), found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 65])
def test_one_decay_a_head_is_known_at_every_length(batch, length):
    """A sequence of one token alone takes the same form as in a packed row."""
    from dsf_kernels.scalar_decay_launch import Decays, every_token

    decay = torch.arange(3.0)
    spread = every_token(decay, (batch, length, 3, 8))
    assert torch.equal(spread, decay.expand(batch, length, 3))
    assert torch.equal(Decays(spread, 64).fixed, decay)


def naive(lengths, chunk):
    """Owner, first token and tokens of every chunk of sequences."""
    cuts = starts(lengths).tolist()
    return [
        (s, first, min(chunk, cuts[s + 1] - first))
        for s in range(len(lengths))
        for first in range(cuts[s], cuts[s + 1], chunk)
    ]


@pytest.mark.parametrize("lengths", [SHORTER, LENGTHS, (5,), (16,), (0, 0, 1), (1,) * 20])
def test_tables(lengths):
    """Every chunk has its owner and tokens, and what is spread comes back."""
    from dsf_kernels.sequences import Sequences

    found = Sequences(starts(lengths), sum(lengths), 16)
    wanted = naive(lengths, 16)
    known = len(wanted)
    assert known <= found.bound == sum(lengths) // 16 + len(lengths)
    own = found.owner()
    rows = torch.cat([own[:, None], found.chunks()], 1)
    assert list(map(tuple, rows[:known].tolist())) == wanted
    assert (own[known:] == len(lengths)).all()
    assert (found.chunks()[known:, 1] == 0).all()
    tensor = 1 + torch.arange(2.0 * sum(lengths)).view(1, -1, 2)
    spread = found.spread(tensor)
    assert spread.shape == (1, found.bound * 16, 2)
    assert spread.sum() == tensor.sum()
    assert torch.equal(found.gather(spread), tensor)


WRONG = {  # cu_seqlens, sequences of the initial state, batch; kind of error, message
    "rank": (torch.zeros(2, 2), 1, 1, ValueError, r"expected axes \(sequence \+ 1,\).*\(2, 2\)"),
    "no entry": (torch.zeros(0), 1, 1, ValueError, "from 1 entry"),
    "floats": (torch.zeros(2), 1, 1, TypeError, "expected int32 or int64, got torch.float32"),
    "device": (starts([9]).to("meta"), 1, 1, ValueError, "expected cpu, the device of value"),
    "batch": (starts([9]), 1, 2, ValueError, "expected value of batch=1"),
    "states": (starts([9]), 2, 1, ValueError, r"initial_state: expected axes \(sequence=1"),
    "start": (torch.tensor([1, 9]), 1, 1, ValueError, "start at 0 and end at time=9, got 1 and 9"),
    "end": (torch.tensor([0, 8]), 1, 1, ValueError, "start at 0 and end at time=9, got 0 and 8"),
    "falls": (torch.tensor([0, 5, 4, 9]), 3, 1, ValueError, "got 5 and then 4 at entry 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    from dsf_kernels.sequences import check_sequences, placed

    cut, count, batch, error, message = WRONG[name]
    value, state = torch.zeros(batch, 9, 2, 4), torch.zeros(count, 2, 3, 4)

    def check():
        check_sequences("scan", cut, value, state, {"head": 2, "state": 3, "channel": 4})
        placed("scan", cut, value)

    with pytest.raises(error, match=message):
        check()


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_gpu(name):
    """Near the loop; the bits of separate calls where those have edges too (FULL)."""
    sizes = ON_GPU[name]
    units, differ = judge("cuda", lengths=LENGTHS, **sizes)
    assert max(units.values()) <= LIMIT, units
    assert sizes["channel"] != 60 or not differ, differ


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", MALFORMED)
def test_gpu_malformed(name):
    assert outside(*MALFORMED[name], device="cuda") < 1e-5


@kernel_laws.on_gpu
def test_gpu_host_does_not_wait():
    from dsf_kernels.scalar_decay_scan import scalar_decay_scan

    given = kernel_laws.moved(tensors(LENGTHS, dtype=torch.bfloat16), "cuda")
    cu_seqlens = starts(LENGTHS).cuda()
    run = kernel_laws.with_gradients(scalar_decay_scan, cu_seqlens=cu_seqlens)
    run(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    interpret()
