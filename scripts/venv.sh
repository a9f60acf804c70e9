# Sourced by the scripts beside it: a virtual environment in .venv with this checkout in it.
# PYTHON=/path/to/python chooses the interpreter.

find_python() {
    for name in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.14 python}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "$0: no Python >= 3.11 with venv found (Debian, Ubuntu: apt install python3-venv), or set" \
        "PYTHON=/path/to/python" >&2
    exit 1
}

pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

# What an installation was made from: the project's declarations, the scripts, and what was asked for.
stamp() { cat pyproject.toml scripts/venv.sh "scripts/$1" | cksum; echo "$2"; }

# installed NAME EXTRAS: is what this script installed under the name still what it would install?
installed() { [ "$(cat ".venv/made-from-$1" 2>/dev/null)" = "$(stamp "$1" "$2")" ]; }

# install NAME EXTRAS: make .venv if there is none, and install the checkout into it.
install() {
    python=$(find_python)
    echo "$0: installing into .venv ($("$python" --version))"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    rm -f ".venv/made-from-$1"
    if [ -n "$2" ]; then pip install -e ".[$2]"; else pip install -e .; fi
}

done_installing() { stamp "$1" "$2" >".venv/made-from-$1"; }

# MLX's CPU build and a fast BLAS on Linux without an NVIDIA GPU, its CUDA build with one.
device_extra() {
    [ "$(uname -s)" = Linux ] || return 0
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then echo cuda; else echo cpu; fi
}
