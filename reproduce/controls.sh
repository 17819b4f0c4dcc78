#!/usr/bin/env bash
# CoFiTune's controls on the two fact tasks: 12 settings x 3 seeds, two runs at a time with one thread each, about half an
# hour on two CPU cores. Finished runs are kept, so the script may be interrupted and started again. Then:
#   python -m reproduce.table out/controls
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
mkdir -p out/controls

rate="--lr 2e-3"  # of those tried, the smallest at which CoFiTune is within two points of SFT on validation data
part="--layers 50%-100% --modules gate_proj,up_proj,down_proj"  # the search's first winner

settings() {
    cat <<EOF
sft --method sft $rate
cofitune --method cofitune $part $rate
no-mask --method cofitune $part $rate --mask-on none
mask-on-gradient --method cofitune $part $rate --mask-on grad
random-mask --method cofitune $part $rate --mask-source random
smaller-rate --method cofitune $part --lr 9.9e-4 --mask-on none
sft-at-4e-4 --method sft --lr 4e-4
sft-at-2e-4 --method sft --lr 2e-4
sft-at-1e-4 --method sft --lr 1e-4
cofitune-at-4e-4 --method cofitune $part --lr 4e-4
sft-l2 --method sft $rate --l2-to-base 1e-2
sft-replay --method sft $rate --replay 0.1
EOF
}

one() {  # one NAME-SEED ARGS...
    [ -f "out/controls/$1/results.json" ] || python train.py --tasks currency,tool --steps 1200 --batch-size 24 "${@:2}" \
        --out "out/controls/$1" --overwrite >"out/controls/$1.log" 2>&1 || { tail -n 1 "out/controls/$1.log" >&2; exit 255; }
    echo "$1: $(tail -n 1 "out/controls/$1.log")"
}
export -f one

for seed in 0 1 2; do
    settings | while read -r name args; do
        echo "$name-$seed $args --seed $seed"
    done
done | xargs -P "${JOBS:-2}" -L 1 bash -c 'one "$@"' one
