"""Options, devices, and the table that closes a run."""

import platform
import subprocess

import harness
import pytest
import torch

ROWS: list[dict] = []


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: not run on a GPU")
    return request.param


@pytest.fixture
def record(benchmark):
    """Return a function that keeps a case for the table and for pytest-benchmark's own report."""

    def keep(
        case: str, ours: str, outcomes: dict[str, harness.Outcome], traffic: float, floor: float
    ) -> None:
        row = {"case": case, "floor": floor, "seconds": outcomes[ours].median, "error": outcomes[ours].error}
        row["gigabytes_per_second"] = traffic / row["seconds"] / 1e9
        row["share_of_floor"] = floor / row["seconds"]
        row["ratios"] = {name: o.median / row["seconds"] for name, o in outcomes.items() if name != ours}
        ROWS.append(row)
        benchmark.extra_info.update(row)

    return keep


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    write = terminalreporter.write_line
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    write("")
    write(f"commit {_commit()}, torch {torch.__version__}, {where}, {torch.get_num_threads()} threads")
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        write(f"{device}: copy {harness.copy_bandwidth(device) / 1e9:.1f} GB/s read and written")
    baselines = list(dict.fromkeys(name for row in ROWS for name in row["ratios"]))
    header = ["case", "seconds", "GB/s", "of floor", *(f"× {name}" for name in baselines)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for row in ROWS:
        ratios = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in baselines]
        share = f"{row['share_of_floor']:.0%}"
        lines.append(
            [row["case"], f"{row['seconds']:.5f}", f"{row['gigabytes_per_second']:.1f}", share, *ratios]
        )
    for line in lines:
        write("| " + " | ".join(line) + " |")
