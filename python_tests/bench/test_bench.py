"""The benchmarks' own parts: shapes and costs, timing, results files, reports, and the command for GPUs."""

import json
import os
import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import baselines
import cases
import harness
import machine
import numpy as np
import pytest
import report
import resources
import results
import rows
import sanitize
import torch

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"

# -- shapes and costs ----------------------------------------------------------------------------------------

# Vocabulary, positions, further tensors outside the layers, and all parameters as the models' cards count.
KNOWN = {
    "SmolLM2-135M": (49152, 0, 576, 134_515_008),
    "GPT-2 XL": (50257, 1024, 2 * 1600, 1_557_611_200),
    "GPT-J 6B": (50400, 0, 50400 * 4096 + 50400 + 2 * 4096, 6_050_882_784),
    "Llama-3-8B": (128256, 0, 128256 * 4096 + 4096, 8_030_261_248),
    "Qwen2.5-7B": (152064, 0, 152064 * 3584 + 3584, 7_615_616_512),
}


@pytest.mark.parametrize("model", cases.MODELS, ids=lambda model: model.name)
def test_shapes_add_up_to_the_published_parameters(model):
    vocabulary, positions, others, total = KNOWN[model.name]
    outside = (vocabulary + positions) * model.hidden + others
    assert cases.entries(model.tensors()) + outside == total
    assert model.output_projection in model.layer() or model.output_projection[::-1] in model.layer()
    assert len(model.tensors(2)) == 2 * len(model.layer())


CONFIGS = {
    "SmolLM2-135M": ("LlamaConfig", dict(num_attention_heads=9, num_key_value_heads=3)),
    "GPT-2 XL": ("GPT2Config", dict(num_attention_heads=25)),
    "GPT-J 6B": ("GPTJConfig", dict(num_attention_heads=16)),
    "Llama-3-8B": ("LlamaConfig", dict(num_attention_heads=32, num_key_value_heads=8)),
    "Qwen2.5-7B": ("Qwen2Config", dict(num_attention_heads=28, num_key_value_heads=4)),
}


@pytest.mark.parametrize("model", cases.MODELS, ids=lambda model: model.name)
def test_shapes_are_those_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    from engram_kernels.hf.layers import decoder_layers

    name, heads = CONFIGS[model.name]
    config = getattr(transformers, name)(
        num_hidden_layers=1, hidden_size=model.hidden, vocab_size=8, **heads,
        **({} if model.kind in ("gpt2", "gptj") else {"intermediate_size": model.intermediate}),
    )  # fmt: skip
    with torch.device("meta"):
        (layer,) = decoder_layers(transformers.AutoModelForCausalLM.from_config(config))[1]
    assert sorted(model.layer()) == sorted(tuple(weight.shape) for weight in layer.parameters())


def test_costs_count_every_tensor_once():
    def size(*tensors):
        return sum(tensor.nbytes for tensor in tensors)

    rows, cols, count = 6, 10, 3
    for dtype in (torch.bfloat16, torch.float32):
        weight, pre, logits = (
            torch.zeros(rows, cols, dtype=dtype),
            torch.zeros(80, dtype=dtype),
            torch.zeros(80),
        )
        left, right, bits = (
            torch.zeros(rows, count),
            torch.zeros(count, cols),
            torch.zeros(10, dtype=torch.uint8),
        )
        assert cases.update(rows, cols, count, dtype).traffic == size(weight, weight, left, right)
        keys, values, gram = right, left, torch.zeros(count, count, dtype=torch.float64)
        got = cases.residual(rows, cols, count, dtype)
        assert got.traffic == size(weight, keys, values, values, keys.double(), gram)
        assert cases.blend(80, dtype, base=False).traffic == size(pre, pre, pre, logits)
        assert cases.blend(80, dtype, base=True).traffic == size(pre, pre, pre, logits, bits)
        assert cases.packed_blend(80, dtype).traffic == size(pre, pre, pre, bits)
        assert cases.mask_step(80, dtype, base=True).traffic == size(pre, pre, pre, pre, logits, logits, bits)
        assert cases.top_k(80, dtype).traffic == size(pre, pre, bits)
        assert cases.sparse_apply(80, dtype).traffic == size(logits.int(), pre, pre, pre, pre)
    P, M = torch.zeros(2, 5, 5), torch.zeros(2, 5, 7)
    w, z, leverages = torch.zeros(2, 3, 5), torch.zeros(2, 3, 7), torch.zeros(2, 3)
    assert cases.stream(2, 5, 7, 3, torch.float32).traffic == size(P, P, M, M, w, z, z, leverages)
    assert (
        cases.stream(2, 5, 7, 3, torch.float32).work[torch.float32] == 2 * 3 * (2 * prod((5, 5)) + 2 * 35) * 2
    )


def test_bytes_a_weight_are_those_of_the_goals():
    assert cases.blend(1, torch.bfloat16, base=True).traffic == 10.125
    assert cases.packed_blend(1, torch.bfloat16).traffic == 6.125
    assert cases.mask_step(1, torch.bfloat16, base=True).traffic == 16.125


def test_a_floor_is_the_longer_of_bytes_and_operations():
    cost = cases.Cost(100.0, {torch.float32: 30.0, torch.float64: 8.0})
    assert cost.floor(50.0, {"float32": 100.0, "float64": 100.0}) == 2.0
    assert cost.floor(1000.0, {"float32": 10.0, "float64": 4.0}) == 5.0
    assert len(cases.plan()) == 2 + len(cases.real_cases())


# -- timing --------------------------------------------------------------------------------------------------


def test_quantiles_are_numpy_s():
    values = [3.0, 1.0, 2.0, 10.0, 7.0, 5.0]
    got = harness.quantiles(values)
    assert got["median"] == np.median(values) and got["all"] == values
    assert [got["p10"], got["p90"]] == pytest.approx(np.quantile(values, [0.1, 0.9]).tolist())
    assert harness.quantiles([4.0]) == {"median": 4.0, "p10": 4.0, "p90": 4.0, "all": [4.0]}


@pytest.fixture
def small_flush(monkeypatch):
    monkeypatch.setattr(harness, "FLUSH_BYTES", 1 << 16)
    harness._flusher.cache_clear()
    yield
    harness._flusher.cache_clear()


def test_variants_take_turns_after_a_warm_up(small_flush):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    outcomes = harness.interleave(calls, "cpu", rounds=3, once=("c",))
    assert order == ["a", "b", "a", "b", "c", "a", "b", "a", "b"]
    assert [len(outcomes[name].seconds) for name in "abc"] == [3, 3, 1]
    assert not outcomes["a"].device_seconds


def test_a_slow_case_has_fewer_rounds_and_no_fewer_than_one(small_flush, monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 0.0)
    outcomes = harness.interleave({"a": lambda: None, "b": lambda: None}, "cpu", rounds=9)
    assert [len(outcome.seconds) for outcome in outcomes.values()] == [1, 1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_what_a_call_takes_beyond_what_was_there(small_flush):
    kept = torch.ones(10 << 18)  # 10 MiB, there before
    calls = {"much": lambda: torch.ones(64 << 18).sum(), "none": lambda: kept.sum()}
    outcomes = harness.interleave(calls, "cpu", rounds=2)
    if outcomes["none"].peak_bytes is None:
        pytest.skip("this system does not let a process begin a new high-water mark")
    assert 60 << 20 < outcomes["much"].peak_bytes < 80 << 20
    assert outcomes["none"].peak_bytes < 8 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator's setting is glibc's")
def test_memory_that_the_allocator_kept_counts_as_taken(small_flush):
    code = """
import harness, torch
harness.FLUSH_BYTES = 1 << 16
held = torch.ones(25 << 18)
del held
print(harness.peak_bytes(lambda: torch.ones(16 << 18), "cpu"))
"""
    # All memory comes from the heap, and what is freed stays there.
    kept = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 30))
    environment = {**os.environ, **kept, "PYTHONPATH": str(BENCH)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "None":
        pytest.skip("this system does not let a process begin a new high-water mark")
    assert 15 << 20 < int(done.stdout) < 24 << 20


def test_a_wrong_variant_or_an_unmeasured_one_ends_the_benchmark():
    harness.check({"a": 0.1}, slack=0.2)
    for error in (0.3, float("nan")):
        with pytest.raises(AssertionError, match="a"):
            harness.check({"a": error, "b": 0.0}, slack=0.2)


def test_baselines_compute_what_the_function_does():
    x = torch.randn(5)
    calls = baselines.calls(torch.sin, (x,), "cpu", names=("eager", "CUDA graph"))
    assert list(calls) == ["eager"]  # there is no graph of a CPU
    assert torch.equal(calls["eager"](), x.sin())
    assert list(baselines.BASELINES) == ["eager", "torch.compile", "CUDA graph"]


# -- results and reports -------------------------------------------------------------------------------------


def outcome(*seconds: float, device: tuple[float, ...] = (), error: float = 1e-7) -> dict:
    return harness.Outcome(list(seconds), list(device), 3 << 20, error).summary()


def case(name: str, gpu: bool) -> dict:
    clock = (0.0004, 0.0005) if gpu else ()
    variants = {
        "engram": outcome(0.001, 0.003, device=clock),
        "eager": outcome(0.004, device=clock[:1]),
        "upstream": outcome(0.2, device=clock[:1], error=float("nan")),
    }
    row = rows.row(name, "engram", variants, 9e5, 0.00045, {"float32": 8e8})
    return row | {"benchmark": f"bench/bench_{'low_rank' if 'update' in name else 'graft'}.py::test_it"}


@pytest.fixture
def run() -> dict:
    found = results.empty("bench/gpu.sh")
    found["machine"] = {"gpu": "NVIDIA H200", "processor": "Chip", "commit": "1a2b3c4", "torch": "2.11.0"}
    found["rates"] = {device: {"copy": 4e12, "gemm": {"float32": 5e13}} for device in ("cpu", "cuda")}
    found["cases"] = [case("update cuda bfloat16 4×5 n=1", True), case("blend cpu float32 4×5", False)]
    return found


def test_a_row_goes_by_the_gpu_s_clock_where_there_is_one(run):
    on_gpu, on_cpu = run["cases"]
    assert (on_gpu["device"], on_cpu["device"]) == ("cuda", "cpu")
    assert on_gpu["seconds"] == on_cpu["seconds"] == 0.002
    assert on_gpu["share_of_floor"] == pytest.approx(1.0) and on_cpu["share_of_floor"] == pytest.approx(0.225)
    assert on_gpu["gigabytes_per_second"] == pytest.approx(2.0)
    assert on_gpu["ratios"] == {"eager": 2.0, "upstream": 100.0}
    assert on_gpu["device_ratios"] == pytest.approx({"eager": 0.4 / 0.45, "upstream": 0.4 / 0.45})
    assert on_cpu["device_ratios"] == {} and on_cpu["variants"]["upstream"]["error"] is None


def test_tables(run):
    header, _, first, second = report.table(run["cases"])
    assert header == "| case | seconds | GPU seconds | MB | GB/s | of floor | × eager | × upstream |"
    assert first.startswith(
        "| update cuda bfloat16 4×5 n=1 | 0.00200 | 0.000450 | 3 | 2.0 | 100% | 2.00 | 100.00 "
    )
    assert "| 0.00200 |  | 3 | 0.5 | 22% |" in second
    assert report.table(run["cases"][1:])[0].count("GPU seconds") == 0
    assert report.summary(run["cases"])[2] == "| update | 1 | 100 | eager 2, upstream 100 |"
    slower = {**run["cases"][0], "share_of_floor": 0.5, "ratios": {"eager": 1.0}}
    both = report.summary([run["cases"][0], slower])
    assert both[2] == "| update | 2 | 75 (50–100) | eager 1.5 (1–2), upstream 100 |"


def test_runs_are_compared_with_what_became_slower_first(run):
    update, blend = run["cases"]
    later = run | {
        "cases": [blend | {"seconds": 0.001}, update | {"seconds": 0.008}, update | {"case": "new"}]
    }
    lines = report.compare(run, later)
    assert lines[2:4] == [
        "| update cuda bfloat16 4×5 n=1 | 0.00200 | 0.00800 | 0.25 |",
        "| blend cpu float32 4×5 | 0.00200 | 0.00100 | 2.00 |",
    ]
    assert lines[7:9] == ["| blend | 1 | 2 |", "| update | 1 | 0.25 |"]
    assert report.compare(run, run | {"cases": []}) == ["The runs have no case in common."]


def test_results_are_kept_whole(tmp_path, run):
    path = tmp_path / "run.json"
    with results.changed(path) as found:
        found |= run
    assert results.load(path) == run and [p.name for p in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(KeyboardInterrupt), results.changed(path) as found:
        found["cases"] = []
        raise KeyboardInterrupt
    assert results.load(path) == run
    for name, status in (("tests", "cut"), ("rates", "passed"), ("tests", "passed")):
        results.stage(path, name, status, "1.5", "a detail")
    assert [(s["name"], s["status"]) for s in results.load(path)["stages"]] == [
        ("rates", "passed"),
        ("tests", "passed"),
    ]
    with pytest.raises(ValueError, match="status: expected one of passed, failed, cut, skipped, got 'red'"):
        results.stage(path, "tests", "red", "1")


def test_files_that_are_no_results_are_refused(tmp_path):
    path = tmp_path / "run.json"
    for text, message in (("[]", "results of format 1"), ('{"format": 1}', "results with begun, command")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"path: expected {message}"):
            results.load(path)


def test_names_of_files():
    assert results.name_of("NVIDIA H100 80GB HBM3", "1a2b3c4") == "h100-80gb-hbm3-1a2b3c4.json"
    assert results.name_of("NVIDIA H200", "1a2b3c4-modified") == "h200-1a2b3c4-modified.json"


def document(folder: Path, *words: str) -> Path:
    """A document with a section for each of the words, and text around them."""
    path = folder / "page.md"
    sections = [f"<!-- results: {asked} -->\nold\n<!-- end of results -->\nbetween\n" for asked in words]
    path.write_text("before\n" + "".join(sections))
    return path


def test_documentation_says_no_run_until_a_file_has_one(tmp_path, run):
    folder = tmp_path / "results"
    folder.mkdir()
    page = document(tmp_path, "gpu conditions speedups summary", "cpu table of graft")
    empty = report.written(page, folder)
    assert "**No GPU run.**" in empty and "**No CPU run.**" in empty and "old" not in empty
    (folder / "a.json").write_text(json.dumps({**run, "cases": run["cases"][1:]}))
    assert "**No GPU run.**" in report.written(page, folder)
    assert "| blend cpu float32 4×5 |" in report.written(page, folder)
    for name, begun in (("b", "2026-01-02"), ("c", "2026-01-03"), ("d", "2026-01-01")):
        (folder / f"{name}.json").write_text(json.dumps({**run, "begun": begun}))
    assert report.newest(folder, "gpu")["h200"][0] == "c.json"
    full = report.written(page, folder)
    assert "No GPU run" not in full and "2026-01-03: NVIDIA H200" in full
    assert "h200-speedups.svg)" in full and "| update | 1 | 100 |" in full
    page.write_text(full)
    assert report.written(page, folder) == full and full.count("between") == 2


def test_a_section_that_cannot_be_made_is_refused(tmp_path, run):
    (tmp_path / "a.json").write_text(json.dumps(run))
    for asked, message in (
        ("tpu table", "one of cpu, gpu, got 'tpu'"),
        ("cpu tabel", "one of conditions, table, summary, roofline, speedups, got 'tabel'"),
        ("cpu table of trace", "a family that was measured, got 'trace'"),
    ):
        with pytest.raises(ValueError, match=rf"page\.md: expected {message}"):
            report.written(document(tmp_path, asked), tmp_path)
    page = document(tmp_path, "cpu table")
    page.write_text(page.read_text().replace("<!-- end of results -->", ""))
    with pytest.raises(ValueError, match=r"page\.md: expected every section to begin and end with its mark"):
        report.written(page, tmp_path)


def test_the_documentation_is_what_the_results_make_of_it():
    assert report.stale() == []


def test_charts_name_their_results_and_are_the_same_for_the_same_figures(tmp_path, run):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "h200-1a2b3c4.json").write_text(json.dumps(run))
    drawn = []
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        drawn.append([path.read_text() for path in report.draw(folder, tmp_path / target)])
    assert len(drawn[0]) == 4 and drawn[0] == drawn[1]
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {f"{name}-{chart}.svg" for name in ("chip", "h200") for chart in report.CHARTS}
    assert all("h200-1a2b3c4.json" in text for text in drawn[0])
    for name, operation in (("chip", "blend"), ("h200", "update")):
        for chart in report.CHARTS:
            assert operation in (tmp_path / "one" / f"{name}-{chart}.svg").read_text()


def test_what_kernels_use_is_read_from_the_tests_output():
    log = """
update, odd, bf16, sm_90: {'REG': 64, 'STACK': 8, 'SHARED': 1024, 'LOCAL': 0, 'SPILLS': 0}
graft.cu, sm_90: registers, bytes of shared memory, of stack, of spills
  40   2048    0    8  program_kernel<PackMask>
2 passed
"""
    triton, cuda = resources.read(log)
    assert triton == {
        "kernel": "update, odd, bf16", "architecture": 90, "registers": 64, "shared": 1024, "spilled": 0
    }  # fmt: skip
    assert (cuda["kernel"], cuda["registers"]) == ("graft.cu: program_kernel<PackMask>", 40)
    assert cuda["spilled"] == 8
    assert resources.table([triton, cuda])[2] == "| update, odd, bf16 | 64 / 1024 / 0 |"


def test_the_machine_is_described_without_a_gpu():
    found = machine.describe()
    assert found["torch"] == torch.__version__ and found["commit"]
    assert json.loads(json.dumps(found)) == found
    if not torch.cuda.is_available():
        assert "gpu" not in found and machine.clocks() == {}


# -- the command ---------------------------------------------------------------------------------------------

SCRIPT = BENCH / "gpu.sh"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def gpu_sh(
    tmp_path, *arguments: str, python=sys.executable
) -> tuple[subprocess.CompletedProcess, dict | None]:
    """Run the command; return what it said and the results that it left in $OUT."""
    out = tmp_path / "out"
    out.mkdir()
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out), "ENGRAM_COMMIT": "1a2b3c4"}
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(
        ["bash", SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    found = [results.load(path) for path in out.glob("*.json")]
    return done, found[0] if found else None


@needs_bash
def test_a_dry_run_keeps_what_it_did(tmp_path):
    done, run = gpu_sh(tmp_path, "--dry-run", "--stages", "plan documents")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(s["name"], s["status"]) for s in run["stages"]] == [("plan", "passed"), ("documents", "passed")]
    assert "Llama-3-8B: update, n = 16" in done.stdout and "| plan | passed |" in done.stdout


@needs_bash
def test_a_stage_without_time_is_reported_and_the_file_still_written(tmp_path):
    done, run = gpu_sh(tmp_path, "--dry-run", "--stages", "plan", "--budget", "0")
    assert done.returncode == 1
    assert [(s["name"], s["status"], s["detail"]) for s in run["stages"]] == [
        ("plan", "skipped", "no time left")
    ]
    assert "| plan | skipped |" in done.stdout and "Nothing was measured." in done.stdout


@needs_bash
@pytest.mark.parametrize(("instead", "status"), [("exec sleep 60", "cut"), ("echo broken; exit 3", "failed")])
def test_a_stage_that_hangs_or_fails_is_reported_and_the_file_still_written(tmp_path, instead, status):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *cases.py*) {instead} ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done, run = gpu_sh(tmp_path, "--dry-run", "--stages", "plan", "--budget", "5", python=python)
    assert done.returncode == 1
    assert (run["stages"][0]["name"], run["stages"][0]["status"]) == ("plan", status)
    assert ("broken" in run["stages"][0]["detail"]) == (status == "failed")
    assert f"| plan | {status} |" in done.stdout


@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done, run = gpu_sh(tmp_path)
    assert done.returncode == 1 and run is None
    assert "names no GPU; --dry-run shows what can be shown without one" in done.stderr


@needs_bash
@pytest.mark.parametrize(
    ("answer", "measured"),
    [("Error: Device not supported", True), ("Invalid __global__ write of size 4 bytes", False)],
)
def test_on_a_gpu_only_what_is_wrong_with_the_kernels_stops_the_benchmarks(tmp_path, answer, measured):
    """Neither the plugins of pytest that may be missing, nor a sanitizer that the machine refuses the GPU."""
    tree, programs = tmp_path / "tree", tmp_path / "bin"
    shutil.copytree(BENCH, tree / "bench")
    programs.mkdir()
    scripts = {
        "nvidia-smi": f'echo "$*" >>{tmp_path}/asked; echo NVIDIA H200',
        "compute-sanitizer": f"echo '{answer}'; exit 9",
        "python": 'case "$*" in\n'
        "*find_spec*) exit 1 ;;\n"
        '*"-m pytest"*" -n "* | *"-m pytest"*--timeout*) echo unrecognized arguments; exit 4 ;;\n'
        '*"-m pytest"* | *machine.py*) echo 3 passed; exit 0 ;;\n'
        f'esac\nexec {sys.executable} "$@"',
    }
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(programs / "python")}
    done = subprocess.run(
        ["bash", tree / "bench" / "gpu.sh", "--stages", "tests memcheck rates low_rank"],
        env={**os.environ, **environment, "ENGRAM_COMMIT": "1a2b3c4", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    run = results.load(tree / "bench" / "results" / "h200-1a2b3c4.json")
    stages = {stage["name"]: stage["status"] for stage in run["stages"]}
    expected = {"tests": "passed", "memcheck": "failed"}
    expected |= dict.fromkeys(("rates", "low_rank"), "passed") if measured else {"benchmarks": "skipped"}
    assert stages == expected, done.stdout + done.stderr
    assert done.returncode == 1  # a sanitizer that saw nothing is no success
    # No setting of the GPU is changed.
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked and all(line.startswith("--query-gpu=") for line in asked)


@needs_bash
def test_an_unknown_option_prints_the_usage(tmp_path):
    done, run = gpu_sh(tmp_path, "--help")
    assert done.returncode == 2 and run is None and "--dry-run" in done.stdout


def test_the_sanitizers_see_every_operator():
    from engram_kernels.ops.define import OPERATORS

    assert set(sanitize.run("torch", "cpu")) == set(OPERATORS)


def test_gpu_tests_can_be_listed_without_a_gpu():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "as_if_gpu", "-p", "no:cacheprovider", "-m", "gpu"]
    command.append(str(ROOT / "python_tests" / "ops" / "test_graft.py"))
    listed = subprocess.run([*command, "--collect-only"], env=environment, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stdout[-3000:] + listed.stderr[-3000:]
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    for backend in ("torch-cuda", "triton-cuda", "cuda-cuda"):
        assert any(backend in name for name in names)
    assert all("-cuda" in name for name in names)
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "as_if_gpu: expected --collect-only" in run.stdout + run.stderr


def stages(*arguments: str) -> dict[str, str]:
    """The stages that the command would run, and their commands."""
    done = subprocess.run(["bash", SCRIPT, "--list", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@needs_bash
def test_every_benchmark_is_a_stage():
    commands = stages().values()
    # Compared on CPUs, as it needs a checkout of another library.
    for path in set(BENCH.glob("bench_*.py")) - {BENCH / "bench_integrations.py"}:
        assert sum(f"bench/{path.name}" in command.split() for command in commands) == 1, path.name


@needs_bash
def test_the_documentation_names_the_stages():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    table = text.partition("| stage |")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert named == list(stages())


@needs_bash
def test_a_list_can_be_of_some_stages_and_of_the_dry_run():
    assert list(stages("--stages", "rates graft")) == ["rates", "graft"]
    assert {"gpu-tests", "plan", "documents", "aot"} <= stages("--dry-run").keys()
