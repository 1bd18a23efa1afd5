#!/usr/bin/env bash
# From a bare machine to a network of one bit in one command: environment, both stages of ResNet-20 on scikit-learn's
# handwritten digits, evaluation, quantization error, and the packed file. Everything lands in .venv and
# quickstart_results. One that was stopped goes on where it was; one that has ended is replaced.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
[ $# = 0 ] || fail "quickstart.sh takes no arguments; train with run_stage1.sh and run_stage2.sh"
make_environment

results=$root/quickstart_results
config=$root/cifar10/configs/quickstart.yaml
stage1=$results/stage1/model_best.pth.tar
stage2=$results/stage2/model_best.pth.tar
packed=$results/packed.safetensors
begun=$results/begun resume=
this="$(cksum < "$config") $("$python" -c 'import biper; print(biper.__version__)')"
if [ "$(cat "$begun" 2> /dev/null)" = "$this" ]; then
    resume=--resume
    echo "going on where the quickstart was stopped; to begin anew: rm -r $results"
else
    rm -rf "$results/stage1" "$results/stage2" "$results"/quantization_error.* "$results"/packed.*
    mkdir -p "$results"
    echo "$this" > "$begun"
fi

echo; echo "== Stage 1: real weights sin(freq*w), binary activations"
"$python" -u "$root/cifar10/main.py" --config "$config" --results_dir "$results" --save stage1 $resume
echo; echo "== Stage 2: binary weights, starting from stage 1"
"$python" -u "$root/cifar10/main_stage2.py" --config "$config" --results_dir "$results" --save stage2 --load_ckpt_stage1 "$stage1" $resume
echo; echo "== Evaluation of the binary network"
"$python" -u -m biper evaluate "$stage2"
echo; echo "== Quantization error of both stages"
"$python" -u "$root/compute_QE.py" "$stage1" "$stage2" --plot "$results/quantization_error.png" --csv "$results/quantization_error.csv"
echo; echo "== The binary network as bits: one packed file"
"$python" -u "$root/export.py" "$stage2" -o "$packed" --facts "$results/packed.json"
"$python" -u -m biper evaluate "$packed"
rm "$begun"

echo "== Summary"
"$python" "$root/scripts/summarize_quickstart.py" "$results"
cat <<SUMMARY
picture:                  $results/quantization_error.png
for a microcontroller:    $root/.venv/bin/biper export $packed --c network_in_c
as a web page:            $root/.venv/bin/biper export $packed --web network_page
curves:                   $root/.venv/bin/tensorboard --logdir $results
Next: the paper's CIFAR-10 recipe (a GPU helps):
  cd $root && source .venv/bin/activate
  python cifar10/dataset/download.py --dataset cifar10
  bash run_stage1.sh cifar10 && bash run_stage2.sh cifar10
  bash eval.sh results/cifar10_resnet18_1w1a_stage2/model_best.pth.tar
SUMMARY
