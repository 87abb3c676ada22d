# Sourced by the scripts beside it: the virtual environment .venv, installed if it is not yet, and the launchers' settings.
# Needs Python 3.10 or later and nothing else. Set PYTHON to choose the interpreter.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "$*" >&2; exit 1; }

find_python() {
    local python
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    die "expected Python 3.10 or later as python3 (or in PYTHON), found none"
}

make_venv() {
    local python=$1
    "$python" -m venv --clear .venv && return
    # Debian packs what venv needs apart from Python
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "python3 -m venv failed: install your system's python3-venv"
    apt-get update -qq
    apt-get install -y -qq "$("$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
    "$python" -m venv --clear .venv
}

get_compiler() { # for the kernels of the CPU, which the package works without
    [ -z "${CXX-}" ] && ! command -v g++ >/dev/null || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ && return
    fi
    echo "found no g++: the kernels of the CPU are not compiled, layers use the slower reference" >&2
}

install() {
    local wanted python
    wanted=$(cksum pyproject.toml launch/setup.sh syncnorm/kernels/cpu/*.{py,h,cpp})
    [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && return
    echo "installing into .venv (torch takes a while)"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none yet, or one that was not finished
        python=$(find_python)
        make_venv "$python"
    fi
    .venv/bin/python -m pip install --quiet torch==2.13.0 # the tested version
    get_compiler
    .venv/bin/python -m pip install --quiet --editable '.[mpi,examples,test,docs,release]'
    echo "$wanted" >.venv/installed
}

install
export PATH="$PWD/.venv/bin:$PATH"

# One thread per rank unless the user says otherwise: ranks share the cores, and sums do not depend on their number.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Open MPI 4 and 5: as root, and with more ranks than cores.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_mpi_yield_when_idle=1
# Intel MPI: with more ranks than cores.
export I_MPI_PIN=0 I_MPI_WAIT_MODE=1
