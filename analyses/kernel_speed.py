"""How fast are the scan kernels, beside the least time the memory and the matrix units allow?

Times each kernel forward and forward + backward, eager and replayed from a CUDA graph (medians of
`triton.testing.do_bench`), next to its floor, its error in units against the float64 loop, and
every peer that can be imported (fla-core, accelerated-scan; none is needed). The cases are in
`dsf_kernels/bench/`. Run on a machine with a CUDA device:

    PYTHONPATH=kernels python analyses/kernel_speed.py --out kernel_speed

writes kernel_speed.json and the table kernel_speed.md, and prints the table.
"""

import argparse
import json
from datetime import date
from pathlib import Path

from dsf_kernels.bench.timing import cases, measure, measured_copy_rate, table, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="kernel_speed", help="path of the results, no suffix")
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--no-peers", action="store_true", help="time our kernels alone")
    flags = parser.parse_args()
    start, rows = measured_copy_rate(), []
    for name, make in cases(flags.only).items():
        for row in measure(name, make, peers=not flags.no_peers):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    rates = [start / 1e12, measured_copy_rate() / 1e12]
    about = versions() | {"date": str(date.today()), "copy TB/s at start, end": rates}
    Path(flags.out + ".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    Path(flags.out + ".md").write_text(json.dumps(about) + "\n\n" + table(rows))
    print(json.dumps(about), "\n", table(rows))


if __name__ == "__main__":
    main()
