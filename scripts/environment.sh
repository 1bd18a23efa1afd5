# Sourced by the commands at the top: where the repository is, and a Python that has biper.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "error: $*" >&2
    exit 2
}

# Python 3.10 or newer, by the names under which it is commonly installed.
find_base_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.10 or newer is needed, and was not found"
}

# make_environment [EXTRA]: .venv with the project installed, extras included; skipped when that was done for this folder
# and these dependencies and C sources. Sets $python.
make_environment() {
    local extra=${1:-} base
    python=$root/.venv/bin/python
    local done_for
    done_for=$(echo "$root"; cat "$root/pyproject.toml" "$root/setup.py"; cksum "$root"/biper/packed/packed*.[ch])
    if [ -x "$python" ] && [ "$(cat "$root/.venv/.installed${extra:+-$extra}" 2>/dev/null)" = "$done_for" ]; then
        echo "using the environment in $root/.venv"
        return
    fi
    base=$(find_base_python) || exit 2
    echo "installing into $root/.venv (once; minutes, and several GB for torch)"
    if ! "$python" -m pip --version >/dev/null 2>&1; then  # missing, moved, or half made
        "$base" -m venv --clear "$root/.venv" || fail "cannot make $root/.venv: install Python's venv module (python3-venv)"
    fi
    local quiet=--quiet
    [ ! -t 1 ] || quiet=--progress-bar=on
    "$python" -m pip install $quiet --editable "$root${extra:+[$extra]}" || fail "the installation failed; run the command again to go on"
    echo "$done_for" >"$root/.venv/.installed"
    [ -z "$extra" ] || echo "$done_for" >"$root/.venv/.installed-$extra"
}

# use_environment: sets $python to the active environment's if this folder's biper is installed there, else to .venv's.
use_environment() {
    local candidate check='import os, sys
from importlib.util import find_spec
spec = find_spec("biper")
sys.exit(not (spec and find_spec("torch") and os.path.samefile(os.path.dirname(spec.origin), sys.argv[1])))'
    for candidate in python "$root/.venv/bin/python"; do
        # from / and not from here: biper's folder in the working directory is no installation
        if command -v "$candidate" >/dev/null && (cd / && "$candidate" -c "$check" "$root/biper" 2>/dev/null); then
            python=$candidate
            return
        fi
    done
    fail "biper is not installed from $root: run 'bash $root/quickstart.sh', or 'pip install -e $root' in your environment"
}

# train_stage SCRIPT [FAMILY] [FLAGS...]: one stage with the family's ResNet-18 recipe; the flags win over it.
train_stage() {
    local script=$1 family=cifar10
    shift
    if [[ ${1:--} != -* ]]; then
        family=$1
        shift
    fi
    [ -f "$root/$family/$script" ] || fail "unknown data set family '$family': there is no $root/$family/$script"
    use_environment
    exec "$python" -u "$root/$family/$script" --config "$root/$family/configs/resnet18.yaml" "$@"
}
