#!/usr/bin/env bash
# All that a machine with a GPU can say about the GPU engine: its tests, compute-sanitizer over a
# small search, and timings; each part ends within ten minutes. Without a GPU, on the emulator.
#
# It needs Linux, NVIDIA's driver, and Python 3.11 or later with pip; no compiler and no CUDA:
#
#   python3 -m pip install -e ".[bench,test,cuda12]"
#
# With a driver of CUDA 13: ".[bench,test,cuda13]" nvidia-cuda-sanitizer-api. With CUDA 12,
# compute-sanitizer is the toolkit's (its wheel does not work), or is not run. Where Python is older,
# pip alone brings a newer one, for which the line above is said again:
#
#   pip install uv && uv venv --python 3.12 --seed .venv-gpu && export PYTHON=.venv-gpu/bin/python
#   "$PYTHON" -m pip install -e ".[bench,test,cuda12]"
#
#   benchmarks/gpu/run.sh [--engine gpu|emulated] [--only tests|sanitizers|timings] [--out FOLDER]
#                     [options of `python -m benchmarks.gpu.run race`]
#
# PYTHON names the interpreter (python3), SECONDS_A_PART another limit than 600. All parts run; the
# exit status says whether one failed. Tests that find no GPU fail.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

python=${PYTHON:-python3}
engine=gpu only= out= rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exec "$python" -m benchmarks.gpu.run race --help ;;
        --engine | --only | --out)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift 2
            ;;
        *) rest+=("$1"); shift ;;
    esac
done
case $engine in gpu | emulated) ;; *) echo "--engine $engine: gpu or emulated" >&2; exit 2 ;; esac
case $only in "" | tests | sanitizers | timings) ;; *)
    echo "--only $only: tests, sanitizers or timings" >&2; exit 2 ;;
esac
if [ "$engine" = emulated ] && [ -z "$out" ]; then
    echo "the emulated engine's times mean nothing: say --out FOLDER" >&2
    exit 2
fi

failed=() not_run=
limit=()
if command -v timeout > /dev/null; then
    limit=(timeout --kill-after=20 "${SECONDS_A_PART:-600}")
fi
part() { # name, command ...
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if ${limit[@]+"${limit[@]}"} "$@"; then
        echo "== $name: passed, $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: FAILED, $((SECONDS - start)) s"
    fi
}
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is no Python 3.11 or later; what to do says $0 --help" >&2
    exit 2
}
part doctor "$python" -m hnsw_gpu doctor

if wants tests; then
    tests=(tests/gpu/test_{gpu_engine,index_on_gpu,dedup_on_gpu,kernels}.py)
    if [ "$engine" = emulated ]; then
        part tests "$python" -m pytest -q -n auto "${tests[@]}" -m "not gpu"
    else # what the emulator answers is asked on every machine
        HNSW_GPU_REQUIRE_GPU=1 part tests "$python" -m pytest -q "${tests[@]}" -m gpu
    fi
fi

tools=(memcheck racecheck synccheck initcheck)
if wants sanitizers; then
    # first without: what is compiled for the CPU is kept on disk, and need not be watched
    part check "$python" -m benchmarks.gpu.run check --engine "$engine"
    sanitizer=$(command -v compute-sanitizer || true)
    : "${sanitizer:=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer}"
    [ -x "$sanitizer" ] || sanitizer=$("$python" -m benchmarks.gpu.sanitizer)
    if [ "$engine" = emulated ]; then
        echo "== ${tools[*]}: skipped, the engine is emulated"
    elif [ ! -x "$sanitizer" ]; then
        echo "== ${tools[*]}: skipped, there is no compute-sanitizer: see $0 --help"
        not_run="; NOT RUN, without compute-sanitizer: ${tools[*]}"
    else
        for tool in "${tools[@]}"; do
            part "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 \
                "$python" -m benchmarks.gpu.run check
        done
    fi
fi

if wants timings; then
    part timings "$python" -m benchmarks.gpu.run race --engine "$engine" \
        ${out:+--out "$out"} ${rest[@]+"${rest[@]}"}
fi

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "all parts passed, ${SECONDS} s$not_run"
