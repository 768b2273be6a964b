#!/usr/bin/env bash
# Fine-tunes nano, the model of this package, on clips and images of one's own: from a JSON list to transformers.
#
#   launch/finetune_demo.sh [DIR]      DIR (./finetune_demo) gets the data, the run and the exported model
#
# Takes about two minutes on two CPU cores. `vl3` and `python` are those of the environment with this package; the last
# step needs torch, torchvision and transformers there, and is left out without them.
set -euo pipefail

demo="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/finetune_demo.py"
mkdir -p "${1:-finetune_demo}"
cd "${1:-finetune_demo}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" # a step has a row for each device, too many for so few samples

run() {
  printf '\n$ %s\n' "$(printf '%q ' "$@")"
  "$@"
}

run python "$demo" data
run vl3 data check --annotations train.json held_out.json --media media
run python "$demo" score nano
run vl3 train --config finetune:video --workdir RUN --config.init_from=nano \
  --config.data.datasets.train.annotations=train.json --config.data.datasets.train.media=media \
  --config.eval.annotations=held_out.json --config.eval.media=media \
  --config.epochs=20 --config.batch.samples=4 --config.data.length=512 --config.data.patches=1024 \
  --config.dtype=float32 --config.optimizer.kind=muon --config.optimizer.learning_rates.vision=4e-3 \
  --config.optimizer.learning_rates.projector=4e-3 --config.optimizer.learning_rates.llm=2e-3
run python "$demo" score RUN
run vl3 ask --model RUN --video media/earth_10.mp4 "What does the clip show?"
run vl3 convert export RUN OUT --format native
if python -c "import torch, torchvision, transformers" 2>/dev/null; then
  run python "$demo" transformers OUT media/coffee.png
else
  echo "OUT is ready for transformers; to try it here: pip install torch torchvision transformers"
fi
