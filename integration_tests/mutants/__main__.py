"""``python -m mutants``: every fault in turn; exit code 1 if one survives or no longer applies."""

from __future__ import annotations

import argparse
import sys
import time

from mutants.faults import FAULTS
from mutants.run import StaleFaultError, try_fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("--op", help="only the faults of this op")
    chosen = [fault for fault in FAULTS if parser.parse_args().op in (None, fault.op)]
    wrong = 0
    for fault in chosen:
        start = time.perf_counter()
        try:
            caught_by = ", ".join(try_fault(fault).caught_by)
        except StaleFaultError as error:
            caught_by, verdict = "", f"DOES NOT APPLY: {error}"
        else:
            verdict = f"caught by {caught_by}" if caught_by else "SURVIVES"
        wrong += not caught_by
        print(f"{fault.op}: {fault.what}: {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} faults caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
