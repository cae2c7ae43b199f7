"""low_rank_scan and kda_scan against their float64 loops, in Triton's interpreter and on a GPU."""

import json

import kernel_laws
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
LIMIT = 64.0  # units of round-off, of the size of a row


def tensors(length, state=3, channel=2, group=1, decay=None):
    generator = torch.Generator().manual_seed(length + state)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def unit(*shape):
        return torch.nn.functional.normalize(draw(*shape), dim=-1)

    wide = (1, length, group, state)
    log_decay = -draw(1, length, 2, state).abs()
    if decay is not None:
        log_decay = decay[None, :, None].expand(1, length, 2, state)
    return {"query": draw(*wide), "key": draw(1, length, 2, state),
            "value": kernel_laws.strided_values(length)[..., :channel],
            "left": -unit(*wide), "right": unit(*wide), "log_decay": log_decay,
            "initial_state": draw(1, 2, state, channel)}  # fmt: skip


def measure(arguments, device="cpu"):
    from dsf_kernels.low_rank_scan import low_rank_scan
    from dsf_kernels.reference import row_units
    from dsf_kernels.reference.low_rank import low_rank_scan_reference as loop

    return row_units(low_rank_scan, loop, kernel_laws.moved(arguments, device), scale=0.5)


def measure_kda(device="cpu"):
    from dsf_kernels.kda_scan import kda_scan
    from dsf_kernels.reference import row_units
    from dsf_kernels.reference.low_rank import kda_scan_reference

    arguments = tensors(5, group=2)
    arguments["key"], arguments["write_strength"] = arguments.pop("right"), torch.rand(1, 5, 2)
    arguments.pop("left")
    return row_units(kda_scan, kda_scan_reference, kernel_laws.moved(arguments, device))


INTERPRETED = {f"length {length}": tensors(length) for length in (0, 1, 2, 33)} | {
    f"decay {name}": tensors(4, decay=decay)
    for name, decay in kernel_laws.log_decay_families(4, 3).items()
    if name in ("zero", "-100 a step", "drops")
}
ON_GPU = {f"length {length}": tensors(length) for length in (0, 1, 2, 31, 32, 33, 257)} | {
    "wide": tensors(65, 128, 4)
}


def test_the_interpreted_kernels_follow_the_loop():
    kernel_laws.all_within(kernel_laws.run_interpreted(__file__), LIMIT)


@kernel_laws.on_gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_the_kernels_follow_the_loop(name):
    kernel_laws.all_within({name: measure(ON_GPU[name], "cuda")}, LIMIT)


def test_wrong_arguments_are_refused():
    from dsf_kernels.low_rank_scan import low_rank_scan

    with pytest.raises(NotImplementedError, match="expected CUDA tensors, got cpu"):
        low_rank_scan(**tensors(3))


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({k: measure(v) for k, v in INTERPRETED.items()} | {"kda": measure_kda()}))
