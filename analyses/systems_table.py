"""Write the table of systems into the README, from the equations that the models state.

    python analyses/systems_table.py [--check]

With --check nothing is written, and the exit status is 1 where the table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from dsf.models import registered
from dsf.report import systems_markdown, systems_rows, write_text

README = Path(__file__).resolve().parent.parent / "README.md"
TABLE = re.compile(r"(<!-- systems -->\n).*?(\n<!-- end of systems -->)", re.DOTALL)


def main() -> int:
    """0 where the table is, or was made, current."""
    parser = argparse.ArgumentParser(description="The table of systems in the README.")
    parser.add_argument("--check", action="store_true", help="only tell whether it is current")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    table = systems_markdown(systems_rows(registered()))
    new = TABLE.sub(lambda found: found[1] + table + found[2], old)
    if new != old and not check:
        write_text(README, new)
    return int(check and new != old)


if __name__ == "__main__":
    sys.exit(main())
