"""`python -m tests.bench [--quick] [--only NAME]`: prints a Markdown table and where it was measured."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator

from tests.bench import large, quiet
from tests.bench.measure import Row, machine, table

CASES: dict[str, Callable[[bool], Iterator[Row]]] = {
    "one": quiet.one,
    "hundred": quiet.hundred,
    "far": quiet.far,
    "big": quiet.big,
    "thousand": quiet.thousand,
    "update": large.update,
    "several": large.several,
}
_NEEDED = ("nginx", "curl", "jq", "md5sum", "strace", "bash")


def main() -> None:
    """Measure and print; exit 1 where a limit is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and a smaller release")
    parser.add_argument("--only", action="append", choices=CASES, help="only this case; may be repeated")
    chosen = parser.parse_args()
    if missing := [name for name in _NEEDED if not shutil.which(name)]:
        raise SystemExit(f"needs {', '.join(missing)}")
    where = machine()
    rows: list[Row] = []
    for name in chosen.only or CASES:
        rows += CASES[name](chosen.quick)
    print(table(rows))
    rounds = "few rounds (--quick)" if chosen.quick else "medians of interleaved rounds"
    print(f"\nMeasured on {where}; {rounds}.")
    raise SystemExit(1 if any(row.met is False for row in rows) else 0)


if __name__ == "__main__":
    main()
