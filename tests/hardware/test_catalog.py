"""The hardware catalog: every number sourced, dense, sensible; user files refused with their path."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware import InputError, catalog_rows, load_catalog
from hardware.catalog import read_file

NAMES = [
    "v100-sxm2-16gb",
    "v100-sxm2-32gb",
    "t4",
    "a10",
    "a30",
    "a100-pcie-40gb",
    "a100-pcie-80gb",
    "a100-sxm-40gb",
    "a100-sxm-80gb",
    "l4",
    "l40s",
    "rtx-4090",
    "rtx-pro-6000-blackwell",
    "h100-pcie-80gb",
    "h100-sxm-80gb",
    "h100-nvl-94gb",
    "h200-sxm-141gb",
    "h200-nvl-141gb",
    "gh200-96gb",
    "b200-sxm-180gb",
    "b300-sxm-288gb",
    "gb200-186gb",
    "gb300-288gb",
    "mi250x-128gb",
    "mi300x-192gb",
    "mi325x-256gb",
    "mi355x-288gb",
    "gaudi3-128gb",
    "tpu-v5e",
    "tpu-v6e",
]


def test_every_published_name_is_there_in_any_case() -> None:
    catalog = load_catalog()
    assert set(NAMES) <= set(catalog.devices)
    assert catalog.device("H100-SXM-80GB").name == "h100-sxm-80gb"


@pytest.mark.parametrize("row", catalog_rows(), ids=lambda row: row["name"])
def test_every_number_is_sourced_and_sensible(row: dict) -> None:
    for field in ("memory_bytes", "memory_bandwidth_bytes_per_s", "peak_flops_per_s", "l2_bytes", "sm_count",
                  "boost_clock_hz", "tdp_w", "idle_w", "usd_per_hour"):  # fmt: skip
        source = row["sources"][field]
        assert source["title"]
        assert source["date"]
        assert source["kind"] in ("datasheet", "measured", "list-price", "derived")
    assert 0.85 * row["memory_nominal_bytes"] < row["memory_bytes"] <= 1.02 * row["memory_nominal_bytes"]
    assert 0 < row["idle_w"] < 0.5 * row["tdp_w"]
    assert row["memory_bandwidth_bytes_per_s"] > 2e11
    peaks = row["peak_flops_per_s"]
    half = peaks.get("bf16", peaks.get("fp16"))
    # Dense figures: fp8 is at most twice, fp4 at most six times the 16-bit rate on any device.
    assert half <= peaks.get("fp8", half) <= 2.05 * half
    assert peaks.get("fp4", half) <= 6.1 * half
    assert peaks.get("fp32", 0) <= half
    # Peak over clock and units is a power of two of operations per cycle only for NVIDIA tensor cores.
    if row["vendor"] == "nvidia":
        per_cycle = half / (row["sm_count"] * row["boost_clock_hz"])
        assert 450 < per_cycle < 9000


def test_known_ratios() -> None:
    device = load_catalog().device
    h100, h200, a100 = device("h100-sxm-80gb"), device("h200-sxm-141gb"), device("a100-sxm-80gb")
    assert h100.peak("fp8") == pytest.approx(2 * h100.peak("bf16"), rel=1e-3)
    assert h200.peak("bf16") == h100.peak("bf16")
    assert h200.memory_bandwidth_bytes_per_s / h100.memory_bandwidth_bytes_per_s == pytest.approx(
        1.43, rel=0.01
    )
    assert h100.peak("bf16") / a100.peak("bf16") == pytest.approx(3.17, rel=0.01)
    # Ridge points, FLOP per byte: 295 on H100 SXM and 153 on A100 SXM 80 GB in 16 bits.
    assert h100.peak("bf16") / h100.memory_bandwidth_bytes_per_s == pytest.approx(295, rel=0.01)
    assert a100.peak("bf16") / a100.memory_bandwidth_bytes_per_s == pytest.approx(153, rel=0.01)
    assert "fp8" not in a100.peak_flops_per_s
    assert "bf16" not in device("v100-sxm2-16gb").peak_flops_per_s
    with pytest.raises(KeyError):
        a100.peak("fp8")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"cluster\.pools\[0\]\.device: unknown device 'h100-sxm'.*h100-sxm-80gb"
    ):
        load_catalog().device("h100-sxm", "cluster.pools[0].device")
    with pytest.raises(InputError, match=r"nearest: h100-pcie-80gb, h100-sxm-80gb, h100-nvl-94gb"):
        load_catalog().device("H100")


def test_user_file_overrides_and_inherits(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[device.h100-sxm-80gb]\nusd_per_hour = 1.5\n"
        '[device.my-h100]\nbase = "h100-sxm-80gb"\ntdp_w = 500\n'
        "[link.lan]\nbandwidth_gb_per_s = 1.25\nlatency_us = 30\n"
    )
    catalog = load_catalog([file])
    assert catalog.device("h100-sxm-80gb").usd_per_hour == 1.5
    assert catalog.device("h100-sxm-80gb").sources["usd_per_hour"].title == "user catalog"
    mine = catalog.device("my-h100")
    assert (mine.tdp_w, mine.memory_bytes) == (500.0, catalog.device("h100-sxm-80gb").memory_bytes)
    assert catalog.link("lan").bandwidth_bytes_per_s == 1.25e9
    assert catalog.version != load_catalog().version
    assert load_catalog().device("h100-sxm-80gb").usd_per_hour != 1.5


def test_environment_names_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("devices:\n  cheap: {base: l4, usd_per_hour: 0.1}\n")
    monkeypatch.setenv("PLANFRONT_CATALOG", str(file))
    assert load_catalog().device("cheap").usd_per_hour == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[device.x]\ntdp_w = 5\n", r"mine.toml: device.x.peak_tflops: must be a table"),
        (
            '[device.x]\nbase = "l4"\nmemory_mib = -4\n',
            r"device.x.memory_mib: must be a finite number above 0",
        ),
        ('[device.x]\nbase = "l4"\nmemory_mib = nan\n', r"device.x.memory_mib: must be a finite number"),
        ('[device.x]\nbase = "l4"\nmemory_mib = true\n', r"device.x.memory_mib: must be a number, not bool"),
        ('[device.x]\nbase = "l4"\nmemory_gb = 4\n', r"device.x.memory_gb: unknown field .*nearest: memory_"),
        ('[device.x]\nbase = "l5"\n', r"device.x.base: unknown base 'l5'"),
        ('[device.x]\nbase = "l4"\nidle_w = 80\n', r"device.x.idle_w: must be below tdp_w"),
        ('[device.x]\nbase = "l4"\nscale_up_link = "nvlink9"\n', r"device.x.scale_up_link: unknown link"),
        (
            '[device.x]\nbase = "l4"\npeak_tflops = { bf17 = 3 }\n',
            r"device.x.peak_tflops.bf17: unknown field",
        ),
        ("[gpu.x]\nname = 3\n", r"mine.toml: gpu: unknown table"),
        ("device = 3\n", r"mine.toml: device: expected a table"),
        ("[device.x\n", r"mine.toml: not a readable toml file"),
        ('[node.n]\nbase = "hgx-h100"\ndevices = ["h101"]\n', r"node.n.devices: unknown device 'h101'"),
        (
            "[link.l]\nbandwidth_gb_per_s = 0\nlatency_us = 1\n",
            r"link.l.bandwidth_gb_per_s: must be .* above 0",
        ),
    ],
)
def test_wrong_entries_are_refused_with_their_path(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_catalog([file])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        read_file(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "none.toml")
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_file(binary)
    large = tmp_path / "l.toml"
    large.write_bytes(b"#" * 4_000_001)
    with pytest.raises(InputError, match="larger than"):
        read_file(large)


_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8)
_tree = st.recursive(
    _leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["base", "memory_mib", "tdp_w", "peak_tflops", "sources", "devices", "l4", "x"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["device", "node", "link", "cluster", "devices", "q"]), _tree))
def test_any_user_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: object) -> None:
    import yaml

    file = tmp_path_factory.mktemp("u") / "u.yaml"
    file.write_text(yaml.safe_dump(data))
    with contextlib.suppress(InputError):
        load_catalog([file])
