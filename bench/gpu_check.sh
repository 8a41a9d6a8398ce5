#!/bin/bash
# Builds the CUDA extension on a machine with a GPU, runs every test that needs one, and measures everything; under 8
# minutes. Ends with a table; $OUT (default: ./gpu-check) gets results.json, table.txt and the logs.
#
#   bench/gpu_check.sh            all
#   bench/gpu_check.sh test       build and test; `measure`: build and measure; `sanitize`: compute-sanitizer as well
#
# It needs CUDA 13 (nvcc), CMake, ninja, a C++ compiler, Python 3.11 or later with CuPy (cupy-cuda13x) and NumPy, and these
# packages, which are taken from $WHEELS (default: ./.whl) where they are not installed; nothing is fetched:
#     mpi4py  mpich  pybind11  ml_dtypes  threadpoolctl  pytest  hypothesis  pytest-mpi  (and what these need: iniconfig,
#     pluggy, packaging, pygments, sortedcontainers)
# torch, where it is installed, is measured beside.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/gpu-check}
wheels=${WHEELS:-$root/.whl}
python=${PYTHON:-python3}
what=${1:-all}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
begin=$SECONDS
failed=0
say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - begin)); }

say "environment"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU"; exit 1; }
nvcc --version | tail -2
missing=()
for module in mpi4py pybind11 ml_dtypes threadpoolctl pytest hypothesis cupy numpy; do
    "$python" -c "import $module" 2>/dev/null || missing+=("$module")
done
if [ ${#missing[@]} -gt 0 ] || ! command -v mpirun >/dev/null; then
    echo "from $wheels: ${missing[*]-} and an MPI"
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
    # A wheel that is unpacked beside others has its programs in bin/ and its libraries in lib/ of that folder.
    export PATH="$work/site/bin:$PATH" LD_LIBRARY_PATH="$work/site/lib:${LD_LIBRARY_PATH:-}"
fi

say "build"
cmake -S "$root" -B "$work/build" -G Ninja -DFIVEDP_CUDA=ON \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$out/build.log" 2>&1 &&
    ninja -C "$work/build" >>"$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }
"$python" "$root/bench/check_spills.py" "$out/build.log" || failed=1
mkdir "$work/package"
cp -r "$root/python/fivedp" "$work/package/"
cp "$work"/build/_cpu*.so "$work"/build/_cuda*.so "$work/package/fivedp/"
export PYTHONPATH="$work/package${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "$what" != measure ]; then
    # The kernels for 9.x have a process of their own: what they break, if anything, does not end the other tests.
    for only in "not sm90" "sm90"; do
        say "tests of kernels: $only"
        timeout 150 "$python" -m pytest "$root/tests/gpu" -q -p no:cacheprovider -k "$only" 2>&1 |
            tee "$out/tests-${only// /-}.log" | tail -25
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    done
    for n in 1 2 4; do
        say "distributed calls, $n ranks on one GPU"
        timeout 120 mpirun -np "$n" "$python" "$root/bench/gpu_ranks.py" 2>&1 | tee "$out/ranks-$n.log" | tail -15
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    done
fi
if [ "$what" != measure ]; then
    say "distributed calls, 2 ranks, FIVEDP_ATTENTION_KERNEL=sm90, FIVEDP_PRODUCT_KERNEL=sm90"
    FIVEDP_ATTENTION_KERNEL=sm90 FIVEDP_PRODUCT_KERNEL=sm90 timeout 120 mpirun -np 2 "$python" "$root/bench/gpu_ranks.py" 2>&1 |
        tee "$out/ranks-sm90.log" | tail -3
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    say "staged transport, 2 ranks"
    FIVEDP_TRANSPORT=staged timeout 120 mpirun -np 2 "$python" "$root/bench/gpu_ranks.py" 2>&1 | tee "$out/staged.log" | tail -3
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
fi
if [ "$what" = sanitize ]; then
    for tool in memcheck racecheck; do
        say "compute-sanitizer $tool"
        timeout 280 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest "$root/tests/gpu" -q -x \
            -p no:cacheprovider -k "not large" >"$out/$tool.log" 2>&1 || failed=1
        tail -5 "$out/$tool.log"
    done
fi
if [ "$what" != test ]; then
    say "measure"
    timeout 200 "$python" "$root/bench/gpu_measure.py" --json "$out/results.json" | tee "$out/table.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    for what_for in attention product; do
        setting=FIVEDP_${what_for^^}_KERNEL=sm90
        say "measure, $setting"
        env "$setting" timeout 100 "$python" "$root/bench/gpu_measure.py" --only "$what_for" \
            --json "$out/results-$what_for-sm90.json" | tee -a "$out/table.txt"
        [ "${PIPESTATUS[0]}" = 0 ] || failed=1
    done
fi
say "$([ $failed = 0 ] && echo ok || echo FAILED)"
exit $failed
