#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in at most nine minutes: tests, figures, sanitizers.
#
#     bench/gpu_check.sh OUTDIR
#
# All parts run even where one fails; each leaves a log in OUTDIR, and the figures are in
# OUTDIR/kernels_<GPU>.json. The exit status is 0 where all parts passed. It works from a plain
# checkout: PYTHON (default python3) needs torch, triton, numpy and pytest, not this package.
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
# Not in the checkout, where `import gcond_kernels` would find the package without its backends.
cd "$work"
export PYTHONUNBUFFERED=1

found=$("$python" -c 'import gcond_kernels; print(gcond_kernels.__file__)' 2>/dev/null || true)
if [ "$found" != "$root/gcond_kernels/__init__.py" ]; then
    # As an installation would lay it out.
    mkdir "$work/site"
    cp -R "$root/gcond_kernels" "$work/site/gcond_kernels"
    cp -R "$root/python" "$work/site/gcond_kernels/python"
    cp -R "$root/triton_kernels" "$work/site/gcond_kernels/triton_kernels"
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

summary=""
all_passed=true
allowed=0
began=$SECONDS

# note NAME RESULT SECONDS: a line of the summary.
note() {
    summary+=$(printf '%-16s %-34s %5s s' "$1" "$2" "$3")$'\n'
    if [[ "$2" != passed ]]; then all_passed=false; fi
}

# part NAME SECONDS COMMAND...: runs it for so long at most; what it does not need, later ones get.
part() {
    local name=$1 start=$SECONDS status=0
    allowed=$((allowed + $2))
    local limit=$((allowed - (SECONDS - began)))
    shift 2
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
    printf '\n== summary\n%s' "$summary"
    if $all_passed; then
        echo "all passed"
        exit 0
    fi
    echo "FAILED"
    exit 1
}

pytest() { # NAME SECONDS ARGUMENTS...
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$python" -m pytest -q --rootdir="$root" -c "$root/pyproject.toml" \
        -p no:cacheprovider "$@"
}

sanitizer() { # TOOL SECONDS VARIABLE=VALUE...
    local tool=$1 seconds=$2
    shift 2
    if [ -z "$checker" ]; then
        printf '\n== %s\n' "$tool"
        echo "compute-sanitizer not found on PATH or in /usr/local/cuda/bin" | tee "$out/$tool.log"
        note "$tool" "failed: compute-sanitizer not found" 0
        return 1
    fi
    # Triton starts compilers, which are no matter for the checker.
    part "$tool" "$seconds" env "$@" "$checker" --tool "$tool" --error-exitcode 1 \
        --target-processes application-only "$python" "$root/bench/sanitize.py"
}

# Versions, and whether there is a GPU at all.
cat >"$work/versions.py" <<'END'
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
if ! part versions 30 "$python" "$work/versions.py"; then
    for name in tests_gpu benchmark sanitize memcheck racecheck tests_kernels; do
        note "$name" "not run" 0
    done
    finish
fi

pytest tests_gpu 100 -m gpu "$root/tests/gpu" || true

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' || echo GPU)
part benchmark 110 "$python" "$root/bench/kernels_gpu.py" \
    --output "$out/kernels_${gpu//[^A-Za-z0-9]/-}.json" || true

# Once without a checker: it compiles the kernels, which the checkers then find compiled.
part sanitize 60 "$python" "$root/bench/sanitize.py" || true
checker=$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer || true)
sanitizer memcheck 50 PYTORCH_NO_CUDA_MEMORY_CACHING=1 || true
sanitizer racecheck 50 || true

# Last, because they gain most from the time that is left over.
if "$python" -c 'import hypothesis' 2>/dev/null; then
    processes=()
    # Most of the time goes into compiling, on the CPU.
    if "$python" -c 'import xdist' 2>/dev/null; then processes=(-n 8); fi
    pytest tests_kernels 135 "${processes[@]}" \
        "$root"/tests/test_{accumulate,gramian,arbitrate,combine,traces}.py || true
else
    echo "hypothesis is not installed for $python: of the tests only tests/gpu was run"
    note tests_kernels "failed: no hypothesis" 0
fi
finish
