#!/usr/bin/env bash
# Runs the tests of the CPU backend twice, with its module compiled to find wrong addresses and
# undefined behaviour, and to find races between threads.
#
#     tests/sanitize.sh [OPTIONS OF PYTEST]
#
# PYTHON (default python3) needs what the tests need, setuptools and pybind11; the compiler is g++,
# or the one that CXX names.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)')
export CXX=${CXX:-g++}
export GCOND_BUILD_CPU=1 GCOND_BUILD_CUDA=0 GCOND_BACKEND=cpu
export PYTHONMALLOC=malloc    # every object has memory of its own, whose end is guarded
export OMP_NUM_THREADS=4      # what torch reports as its number of threads
export ASAN_OPTIONS=detect_leaks=0
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1

# check NAME FLAGS LIBRARY: in a copy, so that the checkout's own module stays.
check() {
    local name=$1 flags=$2 library=$3 folder=$root/build/sanitize/$1
    shift 3
    printf '\n== %s\n' "$name"
    mkdir -p "$folder"
    (cd "$root" && cp -Rp gcond_kernels python triton_kernels csrc bench tests examples \
        pyproject.toml setup.py "$folder")
    cd "$folder"
    rm -f gcond_kernels/_c*.so
    CXXFLAGS="$flags -fno-omit-frame-pointer" LDFLAGS="$flags" "$python" -W ignore setup.py --quiet \
        build_ext --debug --inplace
    # libstdc++ before torch loads it: the sanitizers look for its exceptions as they start. Without
    # random addresses, among which older sanitizers find no place for their own memory.
    local preload
    preload=$("$CXX" -print-file-name="$library"):$("$CXX" -print-file-name=libstdc++.so.6)
    LD_PRELOAD=$preload PYTHONPATH=$folder setarch -R \
        "$python" -m pytest -q -n 0 -p no:cacheprovider --capture=sys tests/ops \
        -k 'cpu and not compiled and not contexts' "$@"
}

check address "-fsanitize=address,undefined -fno-sanitize-recover=undefined" libasan.so "$@"
# OpenMP's own threads synchronize unseen: the module starts others.
check thread "-fsanitize=thread -DGCOND_OWN_THREADS" libtsan.so "$@"
