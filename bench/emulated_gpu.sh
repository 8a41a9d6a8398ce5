#!/bin/bash
# Builds the CUDA kernels for the emulated GPU (csrc/cuda/emulation) in a temporary directory and runs tests/gpu on it.
# What passes here is right in its arithmetic, its indices and its barriers as far as fibers on a CPU can show; it says
# nothing of a real GPU's time. Hopper's own instructions (wgmma, TMA, barriers in shared memory) are emulated too.
#
#   bench/emulated_gpu.sh [options of pytest]
#
# PYTHON names the interpreter (default: python); JOBS the compile jobs (default: 2); BUILD keeps the build in a folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build=${BUILD:-$work/build}

cmake=cmake
"$python" -c "import cmake" 2>/dev/null && cmake="$python -m cmake"
$cmake -S "$root" -B "$build" -DFIVEDP_CUDA=OFF -DFIVEDP_TEST_CUDA=ON \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
$cmake --build "$build" --target _cuda_emulated --parallel "${JOBS:-2}" >"$work/build.log" ||
    { tail -60 "$work/build.log"; exit 1; }

mkdir "$work/path"
cat >"$work/path/sitecustomize.py" <<EOF
import glob
import importlib.util
import sys

(file,) = glob.glob("$build/_cuda_emulated.*so")
spec = importlib.util.spec_from_file_location("_cuda_emulated", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fivedp._cuda"] = module
EOF
export PYTHONPATH="$work/path${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m pytest "$root/tests/gpu" -q -p no:cacheprovider "$@"
