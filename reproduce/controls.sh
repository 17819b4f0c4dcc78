#!/usr/bin/env bash
# CoFiTune's controls on the two fact tasks: 11 settings x 3 seeds, about 40 minutes on two CPU cores. Finished runs are
# kept, so the script may be interrupted and started again. Then: python reproduce/table.py out/controls
set -euo pipefail
cd "$(dirname "$0")/.."

run() {  # run NAME ARGS...: one seed of one setting
    [ -f "out/controls/$1-$seed/results.json" ] ||
        python train.py --tasks currency,tool --steps 1200 --batch-size 24 --seed "$seed" "${@:2}" \
            --out "out/controls/$1-$seed" --overwrite
}
rate="--lr 2e-3"  # of those tried, the smallest at which CoFiTune is within two points of SFT on validation data
part="--method cofitune --layers 50%-100% --modules gate_proj,up_proj,down_proj"  # the search's choice, see README

for seed in 0 1 2; do
    run sft $rate --method sft
    run cofitune $rate $part
    run no-mask $rate $part --mask-on none
    run mask-on-gradient $rate $part --mask-on grad
    run random-mask $rate $part --mask-source random
    run smaller-rate --lr 9.9e-4 $part --mask-on none  # 2e-3 x mean(1 - I), which every cofitune run reports
    run sft-l2 $rate --method sft --l2-to-base 1e-2
    run sft-replay $rate --method sft --replay 0.1
    run cofitune-replay $rate $part --replay 0.1
    run sft-smallest-rate --lr 4e-4 --method sft
    run cofitune-smallest-rate --lr 4e-4 $part
done
