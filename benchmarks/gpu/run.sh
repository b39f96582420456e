#!/usr/bin/env bash
# All that a machine with a GPU can say about the GPU engine, in one call of under ten minutes:
# its tests, compute-sanitizer over a small search, and timings. Without a GPU, on the emulator.
#
#   benchmarks/gpu/run.sh [--engine gpu|emulated] [--only tests|sanitizers|timings] [--out FOLDER]
#                     [options of `python -m benchmarks.gpu.run race`]
#
# PYTHON names the interpreter (python3). All parts run; the exit status says whether one failed.
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

failed=()
part() { # name, command ...
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@"; then
        echo "== $name: passed, $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: FAILED, $((SECONDS - start)) s"
    fi
}
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }

if wants tests; then
    chosen=() # here a GPU is asked; what the emulator answers is asked on every machine
    [ "$engine" = emulated ] || chosen=(-k "not emulated")
    part tests "$python" -m pytest -q tests/gpu/test_gpu_engine.py tests/gpu/test_kernels.py \
        ${chosen[@]+"${chosen[@]}"}
fi

if wants sanitizers; then
    # first without: what is compiled for the CPU is kept on disk, and need not be watched
    part check "$python" -m benchmarks.gpu.run check --engine "$engine"
    sanitizer=$(command -v compute-sanitizer || true)
    : "${sanitizer:=${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer}"
    if [ "$engine" = emulated ]; then
        echo "== memcheck, racecheck: skipped, the engine is emulated"
    elif [ ! -x "$sanitizer" ]; then
        echo "== memcheck, racecheck: skipped, there is no compute-sanitizer"
    else
        for tool in memcheck racecheck; do
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
echo "all parts passed, ${SECONDS} s"
