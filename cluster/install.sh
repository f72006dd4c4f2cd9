#!/bin/sh
# Gives this checkout an environment:  sh cluster/install.sh EXTRA [PYTHON]
#
#   EXTRA   base for the package alone, or an extra of pyproject.toml: test, dev, s3, delta, …
#   PYTHON  an interpreter whose environment gets what it lacks and keeps what it has;
#           without it .venv beside pyproject.toml, made if need be
#   TORCH   environment variable, cpu or cuda: the build to install where torch is missing;
#           empty: cuda where an NVIDIA driver is loaded, else cpu
#
# Killed at any moment, it leaves nothing that the next run takes for complete: pip writes a
# package's metadata after its files, and the stamp .venv/.ready-EXTRA is written last.
set -eu
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

oldest=3.11
torch_index=https://download.pytorch.org/whl/cpu

say() { printf 'install: %s\n' "$*"; }

die() {
    printf 'install: %s\n' "$@" >&2
    exit 1
}

is_new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, ${oldest#3.}))" >/dev/null 2>&1; }

makes_environments() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Ray starts workers through a shell and does not quote the interpreter.
check_path() {
    case $1 in
    *[[:space:]]*)
        die "$1: Ray cannot start workers from an environment whose path contains a space." \
            "Move the checkout, or give an environment elsewhere: PYTHON=/path/to/python"
        ;;
    esac
}

# The interpreter that .venv is made of.
find_python() {
    without_venv=
    for candidate in python3 python3.13 python3.12 python3.11; do
        is_new_enough "$candidate" || continue
        if makes_environments "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [ -n "$without_venv" ]; then
        version=$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        die "$without_venv lacks the modules venv and ensurepip, so it cannot make an environment." \
            "Debian and Ubuntu: apt install python$version-venv. Or give an environment of your own: PYTHON=/path/to/python"
    fi
    die "no Python $oldest or newer found as python3, python3.13, python3.12 or python3.11." \
        "Install one (python.org, your package manager, pyenv, uv), or name it: PYTHON=/path/to/python"
}

# One installation at a time in .venv: a second one waits, and takes over from one that was killed.
lock_environment() {
    mkdir -p .venv
    waiting=
    until mkdir .venv/.installing 2>/dev/null; do
        owner=$(cat .venv/.installing/pid 2>/dev/null || echo none)
        if [ "$owner" != none ] && ! kill -0 "$owner" 2>/dev/null; then
            rm -rf .venv/.installing
            continue
        fi
        [ -n "$waiting" ] || say "waiting for another installation in .venv (process $owner); if there is none, remove .venv/.installing"
        waiting=yes
        sleep 1
    done
    trap 'rm -rf .venv/.installing' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    echo $$ >.venv/.installing/pid
}

remove_environment() { rm -rf .venv/bin .venv/lib .venv/lib64 .venv/include .venv/pyvenv.cfg .venv/.place .venv/.ready-*; }

make_environment() {
    made_at=$(cat .venv/.place 2>/dev/null || pwd -P)
    if [ "$made_at" != "$(pwd -P)" ]; then
        say ".venv was made in $made_at, and its scripts point there"
        remove_environment
    fi
    if "$python" -c 'import encodings' >/dev/null 2>&1; then
        is_new_enough "$python" || die ".venv has a Python older than $oldest; make clean, then try again"
        if "$python" -c 'import importlib.metadata as m; m.version("pip")' >/dev/null 2>&1; then
            return
        fi
        # Left half made, or made by a tool that puts no pip in.
        "$python" -m ensurepip --upgrade --default-pip >/dev/null 2>&1 && return
    fi
    base=$(find_python)
    say "making .venv with $base"
    remove_environment
    "$base" -m venv .venv || die "$base could not make .venv; see above. The way round: PYTHON=/path/to/python with an environment of your own"
}

pip_install() { "$python" -m pip install -qq "$@"; } # errors only

missing() { "$python" -P cluster/missing.py "$extra"; }

has_nvidia_driver() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }

wants_cpu_torch() {
    case ${TORCH:-} in
    cpu) ;;
    cuda) return 1 ;;
    '') ! has_nvidia_driver || return 1 ;;
    *) die "TORCH=$TORCH: cpu, cuda, or empty to decide by the machine" ;;
    esac
    [ "$(uname -s)" = Linux ] # elsewhere there is one build only
}

# PyPI's torch for Linux brings several GB of CUDA. The local version +cpu matches no such build. A mirror
# or a directory of wheels that pip is set up for may have it; asking PyTorch's own index comes second.
install_cpu_torch() {
    wanted="torch==$("$python" -P cluster/missing.py --lower-bound torch)+cpu"
    if first=$(pip_install "$wanted" 2>&1); then
        return
    fi
    say "pip's own sources have no $wanted; asking $torch_index"
    "$python" -m pip install -q --extra-index-url "$torch_index" "$wanted" || { # -q shows retries
        printf '%s\n' "$first" >&2
        die "$wanted could be had neither from pip's own sources nor from $torch_index." \
            "Ways out: pip's own setting PIP_FIND_LINKS=<directory with that wheel>; PYTHON=<an interpreter that has torch>;" \
            "or TORCH=cuda for PyPI's build, several GB larger, which also computes on a CPU"
    }
}

[ $# -ge 1 ] || die "usage: sh cluster/install.sh EXTRA [PYTHON]"
extra=$1
target=$extra
[ "$extra" != base ] || target=

if [ -n "${2:-}" ]; then
    python=$2
    place="the environment of $2"
    "$python" -c '' 2>/dev/null || die "PYTHON=$2: does not run; give the path of an interpreter"
    is_new_enough "$python" || die "PYTHON=$2: is older than $oldest"
    check_path "$("$python" -c 'import sys; print(sys.executable)')"
else
    python=.venv/bin/python
    place=.venv
    check_path "$(pwd -P)"
    lock_environment
    make_environment
fi

lacking=$(missing)
if [ -n "$lacking" ]; then
    "$python" -c 'import pip' 2>/dev/null || die "$place lacks packages, and pip to install them with:" "$lacking"
    if [ "$place" != .venv ] && printf '%s\n' "$lacking" | grep -q '^torch: .* is there'; then
        die "$place does not fit, and replacing torch there is not ours to do:" "$lacking" \
            "Update it, or leave PYTHON out for an environment in .venv"
    fi
    if [ "$lacking" = "lrurec-dist: not this checkout" ]; then
        say "adding this checkout to $place"
        isolation=--no-build-isolation
        "$python" -P cluster/missing.py --build || isolation=
        # shellcheck disable=SC2086 # empty means no argument
        pip_install --no-deps $isolation --editable .
    else
        build=
        cpu_torch=
        if printf '%s\n' "$lacking" | grep -q '^torch:'; then
            build=", PyPI's build of torch: on Linux several GB and minutes"
            if wants_cpu_torch; then
                cpu_torch=yes
                build=", CPU build of torch: about 1.7 GB on disk, 1 to 3 minutes"
            fi
        fi
        count=$(printf '%s\n' "$lacking" | wc -l | tr -d ' ')
        [ "$place" = .venv ] || say "lacking there: $(printf '%s\n' "$lacking" | sed -e 's/: missing, .*//' -e 's/: not this checkout//' | paste -s -d ';' - | sed 's/;/; /g')"
        say "installing into $place ($count to install$build) ..."
        [ -z "$cpu_torch" ] || install_cpu_torch
        pip_install --editable ".${target:+[$target]}"
    fi
    lacking=$(missing)
    [ -z "$lacking" ] || die "pip reported success, but $place still lacks:" "$lacking"
fi

if [ "$place" = .venv ]; then
    pwd -P >.venv/.place
    touch ".venv/.ready-$extra"
fi
