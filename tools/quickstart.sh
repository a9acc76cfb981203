#!/usr/bin/env bash
# From a fresh clone to a trained model and pictures of what it sees: sets up the environment,
# trains a small Mask DINO on the microscopy images in datasets/nuclei, evaluates it, and draws its
# predictions beside the ground truth. Everything lands in output/nuclei. An interrupted run goes
# on where it was when this is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup_env.sh

python=${VENV:-.venv}/bin/python
config=configs/nuclei/instance/maskdino_lite2.yaml
output=output/nuclei
pictures=$output/predictions

say() { printf 'quickstart: %s\n' "$*"; }

# Prints the result of the finished run: mask and box AP and AP50. Fails if the last thing that the
# run logged is no evaluation.
last_evaluation() {
  "$python" - "$output/metrics.json" <<'PYTHON'
import json
import sys
from pathlib import Path

path = Path(sys.argv[1])
lines = path.read_text().splitlines() if path.is_file() else []
last = json.loads(lines[-1]) if lines else {}
if "segm/AP" not in last:
    sys.exit(f"{path} does not end with an evaluation")
masks, boxes = ([last[f"{task}/{name}"] for name in ("AP", "AP50")] for task in ("segm", "bbox"))
print(
    f"masks: AP {masks[0]:.1f}, AP50 {masks[1]:.1f}; boxes: AP {boxes[0]:.1f}, AP50 {boxes[1]:.1f}"
    " (in percent, on the validation images)"
)
PYTHON
}

if [ -f "$output/model_final.pth" ] && last_evaluation >/dev/null 2>&1; then
  say "$output/model_final.pth is trained already; to start over: rm -r $output"
else
  [ ! -f "$output/last_checkpoint" ] || say "going on from $(cat "$output/last_checkpoint")"
  say "training $config, on two CPU cores about a quarter of an hour"
  started=$SECONDS
  "$python" tools/train_net.py --config-file "$config" --resume OUTPUT_DIR "$output"
  say "training and evaluation took $(((SECONDS - started + 59) / 60)) minutes"
fi

weights=$output/ema/model_final.pth  # the averaged weights, which were evaluated
[ -f "$weights" ] || weights=$output/model_final.pth
say "drawing predictions beside the ground truth"
"$python" tools/visualize.py predictions --config-file "$config" \
  --weights "$weights" --dataset nuclei_val --output "$pictures" --num-images 8

say "done; everything is in $output:"
say "  model_final.pth      the trained model; ema/model_final.pth: its averaged weights, the better ones"
say "  predictions/         $(find "$pictures" -type f | wc -l) pictures, predictions beside the ground truth"
say "  metrics.json         losses and results over time; log.txt: the log"
say "  $(last_evaluation)"
say "to use it: source ${VENV:-.venv}/bin/activate, then"
say "  maskdino predict --config-file $output/config.yaml --weights $weights --input FOLDER --output drawn"
