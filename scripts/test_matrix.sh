#!/usr/bin/env bash
# The suite under what differs between machines: vector instructions, threads, a compiler or none, the oldest supported
# Python and torch. A line for each way at the end, and a log of each in test_matrix/.
# Further arguments go to pytest: bash scripts/test_matrix.sh tests/test_distributed.py
# With ONLY the ways whose names contain it: ONLY='torch 2.6' bash scripts/test_matrix.sh
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment dev
cd "$root"
logs=$root/test_matrix
rm -rf "$logs"
mkdir "$logs"
table=$logs/table.txt
{ uname -m; grep -m 1 '^model name' /proc/cpuinfo; "$python" -c 'import torch; print("torch", torch.__version__)'; } >"$table" 2>&1

# way NAME PYTHON [VARIABLE=VALUE...]: the suite in this environment.
way() {
    local name=$1 used=$2 start=$SECONDS result=passed
    shift 2
    [[ $name == *"${ONLY:-}"* ]] || return 0
    echo "== $name"
    # torch.compile keeps what it made for a processor, and crashes where that is read as if by another one
    env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TORCHINDUCTOR_CACHE_DIR="$logs/compiled" \
        "$@" "$used" -m pytest -p no:cacheprovider --numprocesses=3 --dist=worksteal "${tests[@]}" \
        >"$logs/${name// /_}.log" 2>&1 || result=FAILED
    rm -rf "$logs/compiled"
    echo "$result | $name | $* | $(tail -n 1 "$logs/${name// /_}.log") | $((SECONDS - start)) s" | tee -a "$table"
}

# without_compiler: a PATH with all that is on this one but C compilers.
without_compiler() {
    local folder=$logs/programs file
    mkdir "$folder"
    for file in /usr/local/bin/* /usr/bin/* /bin/*; do
        case ${file##*/} in
        cc | gcc | clang | *-gcc | *-gcc-[0-9]* | gcc-[0-9]* | clang-[0-9]*) ;;
        *) ln -sf "$file" "$folder/" ;;
        esac
    done
    echo "$folder"
}

# with_torch VERSION VISION: an environment with a version of torch, on the oldest supported Python that this machine has.
with_torch() {
    local base
    base=$(python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || find_base_python)
    "$base" -m venv "$logs/torch" &&
        "$logs/torch/bin/python" -m pip install --quiet "torch==$1.*" "torchvision==$2.*" &&
        "$logs/torch/bin/python" -m pip install --quiet --editable "$root[dev]" "torch==$1.*" >&2 &&
        echo "$logs/torch/bin/python"
}

tests=("$@")
way "as it is" "$python"
way "torch with AVX2" "$python" ATEN_CPU_CAPABILITY=avx2
way "oneDNN without AMX" "$python" ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16
way "oneDNN and torch with AVX2" "$python" ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
way "packed networks with AVX2" "$python" BIPER_POPCOUNT=avx2
way "2 threads" "$python" OMP_NUM_THREADS=2
way "4 threads" "$python" OMP_NUM_THREADS=4
way "no compiler" "$python" CC= "PATH=$(without_compiler)" "XDG_CACHE_HOME=$logs/cache"
while read -r version vision; do # the oldest, and the one whose compiler loses gradients (docs/performance.md)
    [[ "torch $version" == *"${ONLY:-}"* ]] || continue
    if other=$(with_torch "$version" "$vision"); then
        way "torch $version on $("$other" --version)" "$other" </dev/null
    else
        echo "FAILED | torch $version | no environment" | tee -a "$table"
    fi
    rm -rf "$logs/torch"
done <<<"2.6 0.21
2.11 0.26"
rm -rf "$logs/programs" "$logs/cache"
echo
cat "$table"
grep -q '^passed' "$table" && ! grep -q '^FAILED' "$table"
