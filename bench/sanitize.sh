#!/bin/bash
# Builds the extension with the address and undefined-behaviour sanitizers, and with the emulated AVX-512 kernels, in a
# temporary directory, and runs the kernel tests under it. Exit status 0: nothing was found and every test passed.
#
#   bench/sanitize.sh [ISA ...]      default: what this machine would choose, emulated AVX-512 where that is not
#                                    AVX-512 itself, and emulated AVX512-BF16
#
# PYTHON names the interpreter (default: python); JOBS the compile jobs (default: 2). The sets are tested at the same time,
# for a test keeps one core busy at most times; each is reported when all have ended. The installed package is left as it
# is: a sitecustomize module puts the sanitized extension in its place for these processes and their children.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf "$work"' EXIT

own=$("$python" -c 'from fivedp.kernels.gemm import isa; print(isa())')
if [ $# -eq 0 ]; then
    set -- "" avx512_emulated avx512_bf16_emulated
    # A machine that has AVX-512 has run its sources in the first run.
    if [[ $own == avx512* ]]; then set -- "" avx512_bf16_emulated; fi
fi
sets=$(for isa in "$@"; do printf '%s;' "${isa:-$own}"; done)

cmake=cmake
"$python" -c "import cmake" 2>/dev/null && cmake="$python -m cmake"
$cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFIVEDP_SANITIZE=ON -DFIVEDP_CUDA=OFF -DFIVEDP_TEST_ISAS=ON \
    -DFIVEDP_SANITIZE_ISAS="$sets" \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
$cmake --build "$work/build" --parallel "${JOBS:-2}" >"$work/build.log" || { tail -40 "$work/build.log"; exit 1; }

mkdir "$work/path"
cat >"$work/path/sitecustomize.py" <<EOF
import glob
import importlib.util
import sys

(file,) = glob.glob("$work/build/_cpu.*so")
spec = importlib.util.spec_from_file_location("fivedp._cpu", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fivedp._cpu"] = module
EOF

export PYTHONPATH="$work/path${PYTHONPATH:+:$PYTHONPATH}"
# libstdc++ as well: the sanitizer looks for its exceptions before the first extension has loaded it.
runtime="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so.6)"
test_set() { # ISA, or nothing for what this machine would choose
    local isa=$1 options=halt_on_error=1:log_path=$work/${1:-own}.found
    local chosen="not other_sets" # each set is run here, by itself
    # Attention in other types than bfloat16 is that of AVX-512 once more.
    if [ "$isa" = avx512_bf16_emulated ]; then chosen+=" and (not attention or bfloat16 or test_any)"; fi
    FIVEDP_ISA=$isa LD_PRELOAD=$runtime UBSAN_OPTIONS=print_stacktrace=1:$options \
        ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99:$options \
        "$python" -m pytest "$root/tests/kernels" -k "$chosen" -q -p no:cacheprovider -x >"$work/${isa:-own}.log" 2>&1
}
running=() failed=0
for isa in "$@"; do
    test_set "$isa" &
    running+=($!)
done
for isa in "$@"; do
    wait "${running[0]}" && status=0 || status=$?
    running=("${running[@]:1}")
    echo "== ${isa:-this machine}"
    cat "$work/${isa:-own}.log"
    if [ $status -ne 0 ]; then
        failed=$status
        cat "$work/${isa:-own}".found* 2>/dev/null || true
    fi
done
[ $failed = 0 ] && echo "sanitizers: clean"
exit $failed
