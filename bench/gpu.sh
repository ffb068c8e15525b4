#!/bin/sh
# Everything that only a GPU can tell, in one run without a network: builds the native part, runs the tests that a GPU
# changes, then every benchmark. Results: $OUT/<suite>--<gpu>.json and a table on the terminal.
#
#   sh bench/gpu.sh            OUT defaults to bench/results/<version>
#   DRY=1 sh bench/gpu.sh      on the CPU: the same tests, each benchmark once, nothing timed or written
#
# Uses the Python it is given (PYTHON, else python3) with its PyTorch, Triton, NumPy, pybind11 and ninja. pytest and
# pytest-benchmark may come as wheels in ./wheels.
set -eu
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d wheels ]; then
  "$PYTHON" -m pip install -q --no-index --find-links wheels --no-deps --target build/wheels wheels/*.whl
  export PYTHONPATH="$PYTHONPATH:$PWD/build/wheels"
fi
if [ -n "${DRY:-}" ]; then
  export TRITON_INTERPRET=1
else
  unset TRITON_INTERPRET
  export AVFAST_CUDA=1
  "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device: DRY=1 runs on the CPU"'
fi
"$PYTHON" setup.py -q build_ext --inplace
"$PYTHON" -m pytest -q tests/kernels/test_contract.py tests/kernels/test_warp.py tests/kernels/test_convlstm.py \
  tests/kernels/test_attention.py tests/kernels/test_triton_utils.py \
  tests/opticalflow/test_tvl1_cuda.py
if [ -n "${DRY:-}" ]; then
  exec "$PYTHON" -m pytest -q bench --benchmark-disable -k "bench_gates or bench_recall"
fi
GPU=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())')
OUT=${OUT:-bench/results/$("$PYTHON" -c 'import avfast; print(avfast.__version__)')}
suite() {
  name=$1
  shift
  "$PYTHON" -m pytest -q "$@" --benchmark-only --results "$OUT/$name--$GPU.json" || failed="${failed:-} $name"
}
suite ops bench/bench_warp.py bench/bench_convlstm.py bench/bench_modulate.py bench/bench_loss.py
suite flow bench/bench_flow.py -k cuda
suite motion-step bench/bench_mme.py
suite attention bench/bench_attention.py
if [ -n "${failed:-}" ]; then
  echo "these suites failed:$failed" >&2
  exit 1
fi
