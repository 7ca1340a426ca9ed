"""Fit the three terms of `costmodels/collectives.py` on measured collectives.

python benchmarks/collectives_fit.py [SYSTEMS_DIR]    (default: the installed aiconfigurator-core)

Prints alpha (us), efficiency, mid (us / sqrt(s)) and the error of the fit per system, collective and size.
Half precision; `message_size` counts elements; custom all-reduce rows of CUDA graphs only.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from costmodels.collectives import wire_share

#: System -> bytes/s of the link per device and direction.
LINKS = {
    "h100_sxm": 450e9,
    "h200_sxm": 450e9,
    "a100_sxm": 300e9,
    "b200_sxm": 900e9,
    "gb200": 900e9,
    "l40s": 32e9,
    "rtx_pro_6000_server": 64e9,
}
KINDS = {"alltoall": "all_to_all"}


def fit(seconds_on_wire: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, efficiency, mid) and the relative errors."""

    def model(x: np.ndarray) -> np.ndarray:
        alpha, efficiency, mid = np.exp(x)
        return np.asarray(alpha + seconds_on_wire / efficiency + mid * np.sqrt(seconds_on_wire))

    found = least_squares(
        lambda x: np.log(model(x)) - np.log(seconds),
        np.log([1e-5, 0.7, 1e-3]),
        loss="soft_l1",
        f_scale=0.1,
        bounds=([-16, -6, -20], [-6, 0.3, 0]),
    )
    return np.exp(found.x), np.abs(model(found.x) / seconds - 1)


def newest(root: Path, name: str) -> Path | None:
    found = list(root.glob(f"*/{name}"))
    return max(found, key=lambda p: [int(x) for x in re.findall(r"\d+", p.parent.name)]) if found else None


def report(label: str, size: int, values: np.ndarray, errors: np.ndarray) -> None:
    alpha, efficiency, mid = values
    print(
        f"{label:45s} {size}  alpha {alpha * 1e6:6.2f} us  efficiency {efficiency:.3f}  mid {mid * 1e6:6.0f}"
        f"  MAPE {100 * errors.mean():4.1f} %  P90 {100 * np.quantile(errors, 0.9):4.1f} %"
    )


def main() -> int:
    if len(sys.argv) > 1:
        base = Path(sys.argv[1])
    else:
        spec = importlib.util.find_spec("aiconfigurator_core")
        if spec is None or not spec.submodule_search_locations:
            print("aiconfigurator-core is not installed; name its systems folder", file=sys.stderr)
            return 2
        base = Path(next(iter(spec.submodule_search_locations))) / "systems"
    for system, bandwidth in LINKS.items():
        comm = base / "data" / system / "comm"
        path = newest(comm / "nccl", "nccl_perf.parquet")
        if path:
            frame = pd.read_parquet(path)
            frame = frame[(frame["nccl_dtype"] == "half") & (frame["latency"] > 0)]
            for (name, size), part in frame.groupby(["op_name", "num_gpus"]):
                share = wire_share(KINDS.get(str(name), str(name)), int(size))
                wire = share * part["message_size"].to_numpy() * 2.0 / bandwidth
                report(f"{system} nccl {name}", int(size), *fit(wire, part["latency"].to_numpy() * 1e-3))
        for engine in ("vllm", "sglang", "trtllm"):
            path = newest(comm / engine, "custom_allreduce_perf.parquet")
            if not path:
                continue
            frame = pd.read_parquet(path)
            graph = frame[~frame["kernel_source"].astype(str).str.contains("eager")]
            frame = graph[graph["latency"] > 0]
            frame = frame.groupby(["num_gpus", "message_size"], as_index=False)["latency"].median()
            for size, part in frame.groupby("num_gpus"):
                wire = wire_share("all_reduce", int(size)) * part["message_size"].to_numpy() * 2.0 / bandwidth
                label = f"{system} {engine} {path.parent.name} all_reduce"
                report(label, int(size), *fit(wire, part["latency"].to_numpy() * 1e-3))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
