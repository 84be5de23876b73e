#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in at most ten minutes: tests, figures, sanitizers, and what
# Nsight Compute (ncu) measures of the kernels where it is there.
#
#     bench/gpu_check.sh OUTDIR
#
# All parts run even where one fails; each leaves a log in OUTDIR, and the figures are in
# OUTDIR/bench_<GPU>.json, with pictures where matplotlib is there. The exit status is 0 where all
# parts passed; figures that the time does not do for are no failure. From a plain checkout, PYTHON
# (default python3) needs torch, triton, numpy, pytest and hypothesis, and for the CUDA C++ kernels
# nvcc, pybind11 and ninja. PUBLISHED_CODE may name the GCond authors' grad_conductor.py.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bench/gpu_check.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
# Its full path: the parts do not run in the folder that this was called from.
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# In a copy, in which the extension is compiled too: the checkout stays as it is.
(cd "$root" && cp -R gcond_kernels python triton_kernels csrc bench tests pyproject.toml setup.py "$work")
rm -f "$work"/gcond_kernels/_cuda.*.so
cd "$work"
export PYTHONUNBUFFERED=1 PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:/usr/local/cuda/bin"
export GIT_DIR="$root/.git" GIT_WORK_TREE="$root" # the commit of the figures is that of the checkout

notes=$work/notes # a line for each part: one that runs beside others has no variables to set
began=$SECONDS
allowed=0

# allow SECONDS: for the parts that follow; what they do not need, later ones get.
allow() { allowed=$((allowed + $1)); }

# note NAME RESULT SECONDS: a line of the summary.
note() { printf '%-16s %-34s %5s s\n' "$1" "$2" "$3" >>"$notes"; }

# part NAME COMMAND...: runs it for as long as is allowed at most.
part() {
    local name=$1 start=$SECONDS status=0
    local limit=$((allowed - (SECONDS - began)))
    shift
    if ((limit < 5)); then limit=5; fi # no time is left; to `timeout` 0 would be no limit
    printf '\n== %s (at most %d s): %s\n' "$name" "$limit" "$*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log" || status=$?
    local seconds=$((SECONDS - start))
    case $status in
        0) note "$name" passed "$seconds" ;;
        124 | 137) note "$name" "failed: stopped after $limit s" "$seconds" ;;
        *) note "$name" "failed: exit status $status" "$seconds" ;;
    esac
    return "$status"
}

finish() {
    printf '\n== summary\n'
    cat "$notes"
    if grep -q -E '^[^ ]+ +(failed|not run)' "$notes"; then
        echo "FAILED"
        exit 1
    fi
    echo "all passed"
    exit 0
}

pytest=("$python" -m pytest -q -p no:cacheprovider)

sanitizer() { # TOOL BACKEND
    local name=$1_$2
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer not found on PATH or in /usr/local/cuda/bin" | tee "$out/$name.log"
        note "$name" "failed: compute-sanitizer not found" 0
        return 1
    fi
    local variables=(TMPDIR="$work/$name") # it keeps files there that two must not share
    mkdir "$work/$name"
    # Every tensor has memory of its own: memcheck sees an access beyond it.
    if [ "$1" = memcheck ]; then variables+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1); fi
    # Triton starts compilers, which are no matter for the checker.
    part "$name" env "${variables[@]}" compute-sanitizer --tool "$1" --error-exitcode 1 \
        --target-processes application-only "${pytest[@]}" -m "gpu and sanitize" -k "$2" tests/ops tests/gpu
}

cat >versions.py <<'END'
import platform, subprocess, sys
try:
    subprocess.run(["nvidia-smi"], timeout=20)
except (OSError, subprocess.TimeoutExpired) as error:
    print("nvidia-smi:", error)
print("python", platform.python_version(), "at", sys.executable)
import torch, triton, gcond_kernels, gcond_kernels.triton_kernels
print("torch", torch.__version__, "with CUDA", torch.version.cuda, "; triton", triton.__version__)
print("gcond_kernels", gcond_kernels.__version__, "at", gcond_kernels.__file__)
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
properties = torch.cuda.get_device_properties(0)
print(properties.name, f"with compute capability {properties.major}.{properties.minor}")
END
allow 20
if ! part versions "$python" versions.py; then
    for name in build tests_gpu benchmark ncu sanitizers tests_kernels; do
        note "$name" "not run" 0
    done
    finish
fi
read -r architecture gpu < <("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}", torch.cuda.get_device_name(0))') || true

# Without pyproject.toml, which asks for a recent setuptools: nothing is fetched.
cat >build.sh <<'END'
set -euo pipefail
mkdir source
cp -R setup.py csrc source
command -v nvcc || echo "nvcc not found on PATH or in /usr/local/cuda/bin"
(cd source && PIP_NO_INDEX=1 GCOND_BUILD_CPU=0 GCOND_BUILD_CUDA=1 GCOND_CUDA_ARCHS=$1 "$2" -W ignore setup.py --quiet \
    build_ext --build-lib ..)
"$2" -c 'import gcond_kernels.cuda; print("built for", gcond_kernels._cuda.ARCHITECTURES)'
END
allow 85
backends=(triton)
if part build bash build.sh "$architecture" "$python"; then
    backends+=(cuda)
else
    rm -f gcond_kernels/_cuda.*.so
fi

# Once without a checker: it compiles Triton's kernels, which the checkers then find compiled.
allow 135
part tests_sanitize "${pytest[@]}" -m "gpu and sanitize" tests/ops tests/gpu || true
part tests_gpu "${pytest[@]}" -m gpu tests/gpu || true

# From small to large: should the time not do, what was measured until then is kept.
figures=$out/bench_${gpu//[^A-Za-z0-9]/-}.json
allow 200
published=()
if [ -n "${PUBLISHED_CODE:-}" ]; then published=(--published-code "$PUBLISHED_CODE"); fi
part benchmark "$python" -m bench --output "$figures" --tasks 2 4 8 --seconds 0.3 \
    --models mobilenetv3_small convnext_base --millions 16 1000 "${published[@]}" || true
# Stopped is not failed.
sed -i -E '/^benchmark /s/failed: (stopped after)/\1/' "$notes"
if "$python" -c 'import matplotlib' 2>/dev/null; then
    "$python" -m bench plot "$figures" || note pictures "failed" 0
fi

# Bytes that really move, and the share of the memory's peak that the GPU itself counts.
allow 25
if command -v ncu >/dev/null; then
    metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
    metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
    for backend in "${backends[@]}"; do
        part "ncu_$backend" ncu --csv --metrics "$metrics" --launch-skip 2 --launch-count 40 \
            --kernel-name 'regex:accumulate|products|gramian|combine|sum_kernel' \
            "$python" -m bench profiled --backend "$backend" || true
    done
else
    note ncu "left out: not on PATH or in /usr/local/cuda/bin" 0
fi

# All at once: most of what they do is on the CPU.
allow 100
checks=()
for backend in "${backends[@]}"; do
    for tool in memcheck racecheck synccheck; do
        sanitizer "$tool" "$backend" >/dev/null &
        checks+=($!)
    done
done
for check in "${checks[@]}"; do
    wait "$check" || true
done
tail -n 20 "$out"/{mem,race,sync}check_*.log || true

# Last, because they gain most from the time that is left over.
allow 20
processes=()
if "$python" -c 'import xdist' 2>/dev/null; then processes=(-n 8); fi
part tests_kernels "${pytest[@]}" "${processes[@]}" -m "slow or not slow" \
    tests/ops/test_{accumulate,gramian,arbitrate,combine}.py tests/test_traces.py \
    tests/precision/test_{nonfinite,amp}.py tests/storage/test_collect.py || true
finish
