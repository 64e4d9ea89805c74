"""Options, devices, the clock, and the table that closes a run."""

import gc

import harness
import machine
import pytest
import report
import results
import rows
import torch

ROWS: list[dict] = []


def pytest_addoption(parser):
    group = parser.getgroup("engram_kernels")
    group.addoption(
        "--results", metavar="FILE", help="keep every case in this file as soon as it is measured"
    )
    group.addoption(
        "--smallest", action="store_true", help="of each benchmark and device only the first case"
    )
    group.addoption("--warm", action="store_true", help="leave the caches as the call before left them")


def pytest_configure(config):
    harness.cold = not config.getoption("--warm")


def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=harness.timer))
    if config.getoption("--smallest"):
        first = {}
        for item in items:
            first.setdefault((item.path, item.originalname, item.callspec.params.get("device")), item)
        config.hook.pytest_deselected(items=[item for item in items if item not in first.values()])
        items[:] = first.values()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device: not run on a GPU")
    yield request.param
    if request.param == "cuda":
        # What one case held is not there for the next one's peak.
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def record(benchmark, request):
    """Return a function that keeps a case for the table, the results file and pytest-benchmark's report."""

    def keep(
        case: str,
        ours: str,
        outcomes: dict[str, harness.Outcome],
        traffic: float,
        floor: float,
        work: dict[torch.dtype, float] | None = None,
    ) -> None:
        variants = {name: outcome.summary() for name, outcome in outcomes.items()}
        by_name = {str(dtype)[6:]: count for dtype, count in (work or {}).items()}
        row = rows.row(case, ours, variants, traffic, floor, by_name)
        row["benchmark"] = request.node.nodeid
        ROWS.append(row)
        benchmark.extra_info.update(row)
        if path := request.config.getoption("--results"):
            with results.changed(path) as run:
                run["cases"] = [old for old in run["cases"] if old["case"] != case] + [row]

    return keep


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    write = terminalreporter.write_line
    here = machine.describe()
    where = here.get("gpu", here["processor"])
    write("")
    write(f"commit {here['commit']}, torch {here['torch']}, {where}, {here['threads']} threads")
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        if any(row["device"] == device for row in ROWS):
            write(f"{device}: copy {harness.copy_bandwidth(device) / 1e9:.1f} GB/s read and written")
    for line in report.table(ROWS):
        write(line)
