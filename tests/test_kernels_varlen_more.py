"""Sequences packed in one row (`cu_seqlens`) through every family but that of
test_kernels_varlen: against a call for each sequence and against the float64 loop. Run as a script
it prints the interpreter's errors as JSON."""

import contextlib
import itertools
import json

import kernel_laws
import pytest
import torch
from kernel_laws import UNIT
from packed_families import CASES, FAMILIES, ON_GPU, gradients_of, relative

pytest.importorskip("triton", reason="triton is not installed")
LENGTHS = (0, 1, 9, 0)  # edges of tiles of 8
RELATIVE = 1e-5  # of float32 results, tokens of no sequence among them
MALFORMED = [2, 12, 5, 99], [2, 12, 12, 14]  # on the device: what is left is safe and in order
ALL = [(name, case) for name, found in ON_GPU.items() for case in found]


def starts(lengths, dtype=torch.int32):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def by_sequence(family, scan, lengths):
    """`scan` of a packed row as a call for each sequence."""

    def run(**arguments):
        results = []
        for s, (start, stop) in enumerate(itertools.pairwise(starts(lengths).tolist())):
            one = {k: v[:, start:stop].clone() if k in family.timed and v is not None else v
                   for k, v in arguments.items()}  # fmt: skip
            if one["initial_state"] is not None:
                one["initial_state"] = arguments["initial_state"][s : s + 1]
            results.append(scan(**one, **family.options))
        outputs, states = zip(*results, strict=True)
        return torch.cat(outputs, 1), torch.cat(states)

    return run


def packed_scan(family, cut):
    """The scan of a packed row."""

    def run(**arguments):
        return family.scan(**arguments, **family.options, cu_seqlens=cut)

    return run


def alone(family):
    """The scan of a packed row of one sequence."""

    def run(**arguments):
        first = arguments[family.timed[0]]
        return family.scan(**arguments, cu_seqlens=starts(first.shape[1:2]).to(first.device))

    return run


def differing(name, device="cpu", lengths=LENGTHS, **sizes):
    """Which results, gradients too, do not equal those of separate calls: on a GPU, of packed
    rows of one, as the kernels that know of sequences are compiled apart from the others."""
    family, cut = FAMILIES[name], starts(lengths).to(device)
    given = kernel_laws.moved(family.tensors(sum(lengths), len(lengths), **sizes), device)
    packed = packed_scan(family, cut)
    if not lengths:
        return [n for n, result in enumerate(packed(**given)) if result.numel()]
    separate = by_sequence(family, family.scan if device == "cpu" else alone(family), lengths)
    runs = [kernel_laws.with_gradients(run, family.shared, family.term)(**given)
            for run in (packed, separate)]  # fmt: skip
    return [n for n, pair in enumerate(zip(*runs, strict=True)) if not torch.equal(*pair)]


def errors(name, device="cpu", lengths=LENGTHS, **sizes):
    """Errors from the loop, in units."""
    family, cut = FAMILIES[name], starts(lengths).to(device)
    given = family.tensors(sum(lengths), len(lengths), **sizes)
    loop, unit = by_sequence(family, family.loop, lengths), UNIT[given[family.timed[0]].dtype]
    given = kernel_laws.moved(given, device)
    return family.units(packed_scan(family, cut), loop, given, lengths, unit)


def outside(name, device="cpu"):
    """Errors of the outputs and gradients of 14 tokens cut wrongly: those of no sequence are 0."""
    family, (cut, kept) = FAMILIES[name], MALFORMED
    given = family.tensors(14, len(cut) - 1)
    cu_seqlens = torch.tensor(cut, device=device)
    start, stop = kept[0], kept[-1]

    def loop(**arguments):
        inner = {k: v[:, start:stop] if k in family.timed else v for k, v in arguments.items()}
        run = by_sequence(family, family.loop, torch.tensor(kept).diff().tolist())
        output, final = run(**inner)
        pad = (*[0, 0] * (output.dim() - 2), start, 14 - stop)
        return torch.nn.functional.pad(output, pad), final

    found = gradients_of(packed_scan(family, cu_seqlens), kernel_laws.moved(given, device))
    pairs = zip(found, gradients_of(loop, given), strict=True)
    return max(relative(a.cpu(), b) for a, b in pairs)


@contextlib.contextmanager
def unseen(family):
    """Wrong values on the CPU pass, as those on a GPU do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.module, "placed", lambda _, cut, __: cut)
        yield


def interpret():
    found = {}
    for name, cases in CASES.items():
        family = FAMILIES[name]
        family.shrink()
        differ = {case: differing(name, **sizes) for case, sizes in cases.items()}
        with unseen(family):
            found[name] = {"differ": differ, "malformed": outside(name)}
        given = family.tensors(3, 2)
        operands = tuple(given[k] for k in family.operands), family.rest, (starts((3, 0)),)
        torch.library.opcheck(getattr(torch.ops.dsf, name), sum(operands, ()),
                              test_utils=kernel_laws.OPCHECKS)  # fmt: skip
    print(json.dumps(found))


def test_interpreted():
    """One child runs every case: the bits of separate calls, and near the loop."""
    found = kernel_laws.run_interpreted(__file__)
    assert found.keys() == CASES.keys()
    for name, results in found.items():
        assert results["differ"] == {case: [] for case in CASES[name]}, name
        assert results["malformed"] < RELATIVE, name


@pytest.mark.parametrize("lengths", [(0, 1, 17, 0, 16), (8,), (0, 0, 3)])
def test_tables(lengths):
    """Sequence, begin, end, place and number of every tile of 8; edges of the sequences."""
    from dsf_kernels.sequences import Sequences, edges

    cuts, length = starts(lengths).tolist(), sum(lengths)
    wanted = [[s, cuts[s], cuts[s + 1], place, -(-count // 8)]
              for s, count in enumerate(lengths) for place in range(-(-count // 8))]  # fmt: skip
    found = Sequences(starts(lengths), length, 8).tiles()
    assert found[: len(wanted)].tolist() == wanted
    assert (found[len(wanted) :, 1] == found[len(wanted) :, 2]).all()
    owned, begins, last, filled = edges(starts(lengths), length)
    assert owned.all()
    assert begins.nonzero().flatten().tolist() == sorted({c for c in cuts if c < length})
    assert filled.tolist() == [count > 0 for count in lengths]
    assert (last + 1)[filled].tolist() == starts(lengths)[1:][filled].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_messages(name, monkeypatch):
    """Each family asks for what sequences.py checks (test_kernels_varlen)."""
    family = FAMILIES[name]
    monkeypatch.setattr(family.module, "check_kind", lambda *_: None)  # as if on a GPU
    arguments = family.tensors(9, 1)
    wrong = {
        "initial_state: expected axes .sequence=2": torch.tensor([0, 4, 9]),
        "cu_seqlens: expected to start at 0 and end at time=9, got 0 and 8": torch.tensor([0, 8]),
        "cu_seqlens: expected int32 or int64": torch.tensor([0.0, 9.0]),
    }
    for message, cut in wrong.items():
        with pytest.raises((ValueError, TypeError), match=f"dsf_kernels.{name}: {message}"):
            family.scan(**arguments, cu_seqlens=cut)


# -- on the GPU --------------------------------------------------------------------------------


@kernel_laws.on_gpu
@pytest.mark.parametrize(("name", "case"), ALL)
def test_gpu(name, case):
    """Near the loop; the bits of each sequence alone, but for sums by torch (bonus)."""
    family, sizes = FAMILIES[name], ON_GPU[name][case]
    units = errors(name, "cuda", family.lengths, **sizes)
    assert max(units.values()) <= family.limit, units
    assert sizes.get("bonus") or not differing(name, "cuda", family.lengths, **sizes)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_malformed(name):
    assert outside(name, "cuda") < RELATIVE


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_many_sequences_repeat(name):
    """Thousands of short sequences, some empty: the same bits every time, finite."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 9, (3001,), generator=generator).tolist()
    given = family.tensors(sum(lengths), len(lengths), dtype=torch.bfloat16)
    state, cut = given["initial_state"], starts(lengths).cuda()
    given = kernel_laws.moved(given, "cuda")
    run = kernel_laws.with_gradients(family.scan, (), family.term, cu_seqlens=cut)
    first = run(**given)
    assert all(torch.isfinite(found.abs()).all() for found in first)
    empty = torch.tensor(lengths) == 0
    assert torch.equal(first[1].cpu()[empty], state[empty])
    for _ in range(5):
        assert all(map(torch.equal, run(**given), first))


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_gpu_host_does_not_wait(name):
    family = FAMILIES[name]
    lengths = family.lengths
    given = family.tensors(sum(lengths), len(lengths), dtype=torch.bfloat16)
    given, cut = kernel_laws.moved(given, "cuda"), starts(lengths).cuda()
    run = kernel_laws.with_gradients(family.scan, (), family.term, cu_seqlens=cut)
    run(**given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    interpret()
