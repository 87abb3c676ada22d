# Sourced by launch/test --ecosystem after setup.sh: the virtual environment .venv-ecosystem, which has the packages of the
# extra test-ecosystem, installed if it is not yet, and their tests.

install_ecosystem() {
    local wanted python=.venv-ecosystem/bin/python
    wanted=$(cksum pyproject.toml launch/ecosystem.sh)
    [ "$(cat .venv-ecosystem/installed 2>/dev/null)" = "$wanted" ] && return
    echo "installing into .venv-ecosystem (2 GB, and more with a torch for CUDA)"
    "$python" -m pip --version >/dev/null 2>&1 || .venv/bin/python -m venv --clear .venv-ecosystem
    "$python" -m pip install --quiet torch==2.13.0 torchvision==0.28.0 # the tested version, and the one that fits it
    "$python" -m pip install --quiet --editable '.[mpi,test-ecosystem]'
    echo "$wanted" >.venv-ecosystem/installed
}

# test_ecosystem ARGUMENT...: run the tests of the other packages. Arguments go to pytest
test_ecosystem() {
    install_ecosystem
    export PATH="$PWD/.venv-ecosystem/bin:$PATH" PYTHONPATH="$PWD/tests/ecosystem/startup"
    python -m pytest tests/ecosystem "$@"
}
