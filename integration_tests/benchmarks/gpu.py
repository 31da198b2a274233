"""``python -m benchmarks.gpu``: every op on a GPU beside its peers and what the device can; adds to a JSON file, writes a page of it."""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import traceback
from pathlib import Path

import torch

from benchmarks import gpu_page
from benchmarks.gpu_cases import FAMILIES
from benchmarks.gpu_cases.sizes import BITSANDBYTES, full, small
from benchmarks.gpu_clock import DeviceClock, DeviceYardstick
from benchmarks.gpu_page import Run
from benchmarks.record import Record, measure
from q_core import explain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="measure these only")
    parser.add_argument("--match", default="", help="measure what has this in its name or shape only")
    parser.add_argument("--device", type=torch.device, default="cuda", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the cases themselves; such figures mean nothing")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; what earlier runs wrote into it stays")
    parser.add_argument("--page", type=Path, help="a Markdown file to write of all runs in the JSON file")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--check", action="store_true", help="exit code 1 if a gate is missed")
    arguments = parser.parse_args()

    runs = gpu_page.read(arguments.output)
    failed, missed = 0, False
    if not arguments.page_only:
        run, failed = _run(arguments)
        gpu_page.write([*runs, run], arguments.output)
        runs = [*runs, run]
        held = [record.met for record in run.records]
        missed = False in held
        print(f"{len(held)} measurements, {held.count(True)} gates met, {held.count(False)} missed, {failed} cases failed")
    if arguments.page:
        arguments.page.write_text(gpu_page.page(runs))
    return 1 if failed or (arguments.check and missed) else 0


def _run(arguments: argparse.Namespace) -> tuple[Run, int]:
    """Measure; what was measured, and how many cases failed."""
    device: torch.device = arguments.device
    sizes = (small if arguments.small else full)(device)
    records: list[Record] = []
    failed = 0
    torch.set_num_threads(1)
    with torch.inference_mode():
        yardstick = DeviceYardstick(device, small=arguments.small)
        machine = [_device(device), _versions(device), f"measured in this run: {yardstick}"]
        print("\n".join(machine), flush=True)
        for family in arguments.family or FAMILIES:
            torch.manual_seed(0)
            for case in FAMILIES[family](sizes):
                if arguments.match not in f"{case.op} {case.shape}":
                    continue
                try:
                    records.append(measure(case, 1, yardstick, DeviceClock(device, case.launched)))
                except Exception:
                    failed += 1
                    print(f"{case.op}, {case.shape} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                else:
                    print(" | ".join(gpu_page.cells(records[-1])), flush=True)
                del case  # and with it its inputs, which its own functions hold
                gc.collect()
                if device.type != "cpu":
                    torch.accelerator.empty_cache()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Run(today, machine, records), failed


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return "a CPU"
    module = torch.get_device_module(device)
    properties = module.get_device_properties(device)
    return f"{module.get_device_name(device)}, {properties.total_memory / 1e9:.0f} GB"


def _versions(device: torch.device) -> str:
    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": torch.version.xpu}
    built = "".join(f", {name} {version}" for name, version in toolkits.items() if version)
    peer = f"bitsandbytes {BITSANDBYTES.__version__}" if BITSANDBYTES else "no bitsandbytes"
    served = explain("gemm_4bit", device=device.type).served_by
    return f"torch {torch.__version__}{built}, {_triton()}, {peer}; gemm_4bit is served by {served}"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "no Triton"
    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
