#!/usr/bin/env bash
# Raw interactions and item texts in, the paper's result table out:
#   prepare -> stage-PT -> stage-FT1, FT2 -> export LF/PT/FT -> SASRec and BERT4Rec from them -> table
# A step whose output is there and was made from the same inputs and options says "up to date" and costs seconds.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'EOF'
bash run_all.sh [NAME] [options]        NAME: a dataset (default grocery)
  grocery      embedded (CC0); source for stage-PT: household. No GPU, no download but the language model
  pantry instruments arts movies sports   the paper's targets (CUDA); sources: books clothing sports movies
  industrial office                       Amazon extracts under data/raw/, each the other's source
  anything else                           data/NAME/interactions.csv and items.jsonl; name --source, or stage-PT is left out
options
  --plm P        minilm, longformer, a hub name or a folder   (default: longformer for the paper's targets, else minilm)
  --source "A B" datasets for stage-PT                        (default: as above)
  --seeds "0 1"  seeds of the ID models                       (default: 0; paper's targets: 0 1 2)
  --rec_seeds "1 2"  more seeds of stage-FT1 and FT2, for RecFormer's own row  (default: 0 alone, whose embeddings are exported)
  --full         the paper's budget (default for its targets) instead of the small one, made for 20 minutes on 2 cores
  --longer       between the two: README's tables
  --toy          a budget of seconds: shows that everything runs, says nothing about quality
  --quick-table  without the centred initialisations
  --table1       also stage-FT1 and FT2 with a few layers tuned: none, one of each third of the depth, single ones
  --table4       also SASRec with full cross-entropy                            (--longer and --full: always)
  --table5       also texts beside trained IDs, and RecFormer with trainable items
  --figure2      also stage-PT on a share of the source users, SASRec from each, and the curve
  --shares "1 9" its shares, in percent   (default: the paper's 0.01 to 100; small sources need 2 and more)
  --help
EOF
}

NAME=grocery PLM= SOURCE= SEEDS= REC_SEEDS= BUDGET= QUICK= MORE= SHARES="0.01 0.1 1 2 10 20 50 100"
fail() { echo "error: $1" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --help|-h) usage; exit 0 ;;
    --plm|--source|--seeds|--rec_seeds|--shares) [ $# -ge 2 ] || fail "$1 needs a value (bash run_all.sh --help)"
      case $1 in --plm) PLM=$2 ;; --source) SOURCE=$2 ;; --seeds) SEEDS=$2 ;; --rec_seeds) REC_SEEDS=$2 ;; --shares) SHARES=$2 ;; esac; shift 2 ;;
    --full) BUDGET=full; shift ;;
    --longer) BUDGET=longer; shift ;;
    --toy) BUDGET=toy; shift ;;
    --quick-table) QUICK=1; shift ;;
    --table1|--table4|--table5|--figure2) MORE+=" $1"; shift ;;
    -*) fail "unknown option $1 (bash run_all.sh --help)" ;;
    *) NAME=$1; shift ;;
  esac
done
[[ $NAME =~ ^[A-Za-z0-9_-]+$ ]] || fail "dataset name '$NAME': letters, digits, - and _ only"

PAPER=
case $NAME in
  grocery) : "${SOURCE:=household}" ;;
  industrial) : "${SOURCE:=office}" ;;
  office) : "${SOURCE:=industrial}" ;;
  pantry|instruments|arts|movies|sports)
    PAPER=1; : "${SOURCE:=books clothing sports movies}" "${PLM:=longformer}" "${BUDGET:=full}" "${SEEDS:=0 1 2}" ;;
esac
: "${PLM:=minilm}" "${SEEDS:=0}" "${BUDGET:=small}"
[[ $MORE != *--figure2* || -n $SOURCE ]] || fail "--figure2 needs a --source for stage-PT"

# ---------------------------------------------------------------- budgets: the only place where numbers differ
case $BUDGET in
  full)    PT=(--batch 64 --accumulate 8) FT1=() FT2=() SASREC=(--lrs 0.0003 0.001 0.003 0.01) BERT4REC=("${SASREC[@]}") ;;  # the paper's
  longer)  PT=(--batch 32 --accumulate 1 --max_steps 134 --warmup 10)
           FT1=(--batch 32 --epochs 6 --patience 2 --warmup 20) FT2=(--batch 32 --epochs 3 --patience 2 --warmup 20)
           SASREC=(--lrs 0.001 --epochs 60 --patience 5) BERT4REC=(--lrs 0.001 --epochs 30 --patience 3) ;;
  small)   PT=(--batch 32 --accumulate 1 --max_steps 40 --warmup 10)
           FT1=(--batch 32 --epochs 1 --warmup 10) FT2=("${FT1[@]}")
           SASREC=(--lrs 0.001 --epochs 60 --patience 5) BERT4REC=(--lrs 0.001 --epochs 15 --patience 3) ;;
  toy)     PT=(--batch 8 --accumulate 1 --max_steps 3) FT1=(--batch 32 --epochs 1 --warmup 2) FT2=("${FT1[@]}")
           SASREC=(--lrs 0.001 --epochs 1) BERT4REC=("${SASREC[@]}") ;;
esac
PYTHON=${PYTHON:-python}
RUN=${ELEPHANT_RUNS:-runs}/$NAME
# one stage-PT serves all of the paper's targets; it leaves out the last two items, as two sources are targets too
PT_FILE=$RUN/recformer/pt.pt
if [ -n "$PAPER" ]; then PT_FILE=${ELEPHANT_RUNS:-runs}/pretrained/paper.pt; PT+=(--leave_out); fi

# ---------------------------------------------------------------- 1. data
for name in $NAME $SOURCE; do $PYTHON -m common.data "$name"; done

# ---------------------------------------------------------------- 2. language model: PT, FT1, FT2
START=(--plm "$PLM")
if [ -n "$SOURCE" ]; then
  $PYTHON pretrain.py $SOURCE --plm "$PLM" --out "$PT_FILE" "${PT[@]}"
  START=(--checkpoint "$PT_FILE")
fi
$PYTHON finetune.py "$NAME" --stage 1 "${START[@]}" --seeds 0 $REC_SEEDS ${FT1[@]+"${FT1[@]}"}
$PYTHON finetune.py "$NAME" --stage 2 --seeds 0 $REC_SEEDS ${FT2[@]+"${FT2[@]}"}

# ---------------------------------------------------------------- 3. item embeddings
$PYTHON export_embeddings.py "$NAME" --plm "$PLM" --out "$RUN/embeddings/lf.pt"
[ -z "$SOURCE" ] || $PYTHON export_embeddings.py "$NAME" --checkpoint "$PT_FILE" --out "$RUN/embeddings/pt.pt"
$PYTHON export_embeddings.py "$NAME" --checkpoint "$RUN/recformer/ft1.pt" --out "$RUN/embeddings/ft.pt"

# ---------------------------------------------------------------- 4. ID models
VARIANTS="random lf-freeze ft-freeze lf-trainable ft-trainable ft-further-all ft-further-emb"
SCALED="lf-trainable ft-trainable"
if [ -n "$SOURCE" ]; then VARIANTS+=" pt-freeze pt-trainable" SCALED+=" pt-trainable"; fi
train() { $PYTHON train_seq.py "$NAME" --seeds $SEEDS "$@"; }
train --model sasrec --variants $VARIANTS "${SASREC[@]}"
train --model bert4rec --variants $VARIANTS "${BERT4REC[@]}"
[ -n "$QUICK" ] || train --model sasrec --init_scale centred --variants $SCALED "${SASREC[@]}"
case $BUDGET$MORE in
  longer*|full*|*--table4*) train --model sasrec --loss ce --variants random $SCALED "${SASREC[@]}" ;;
esac
case $BUDGET in longer|full)  # scale and meaning told apart
  train --model bert4rec --init_scale centred --variants $SCALED "${BERT4REC[@]}"
  for scale in rescaled whitened; do train --model sasrec --init_scale $scale --variants $SCALED "${SASREC[@]}"; done
  train --model sasrec --init_scale permuted --variants lf-trainable "${SASREC[@]}" ;;
esac

# ---------------------------------------------------------------- tables 5 and 1, figure 2
if [[ $MORE == *--table5* ]]; then
  train --model sasrec --variants lf-id+text ft-id+text ${SOURCE:+pt-id+text} "${SASREC[@]}"
  $PYTHON finetune.py "$NAME" --stage 2 --trainable_items --out "$RUN/recformer/ft2-items.pt" ${FT2[@]+"${FT2[@]}"}
fi
if [[ $MORE == *--table1* ]]; then
  $PYTHON finetune.py "$NAME" --stage 0 --plm "$PLM"
  depth=$($PYTHON -c 'import json, sys; print(json.load(open(sys.argv[1]))["config"]["layers"])' "$RUN/recformer/ft1.json")
  third=$((depth / 3)) sets=
  [ $third -gt 0 ] || fail "--table1 tunes thirds of the depth: $PLM has $depth layers, three are needed"
  for ((i = 0; i < third; i++)); do sets+=" $i,$((i + third)),$((i + 2 * third))"; done
  for layers in $sets $((third - 1)) $((2 * third - 1)) $((depth - 1)); do
    one=$RUN/recformer/ft1-$layers.pt two=$RUN/recformer/ft2-$layers.pt
    $PYTHON finetune.py "$NAME" --stage 1 "${START[@]}" --tune_layers "$layers" --out "$one" ${FT1[@]+"${FT1[@]}"}
    $PYTHON finetune.py "$NAME" --stage 2 --checkpoint "$one" --tune_layers "$layers" --out "$two" ${FT2[@]+"${FT2[@]}"}
  done
fi
if [[ $MORE == *--figure2* ]]; then
  for share in $SHARES; do
    runs=${ELEPHANT_RUNS:-runs}/figure2/$share
    $PYTHON pretrain.py $SOURCE --plm "$PLM" --share $share --out "$runs/$NAME/recformer/pt.pt" "${PT[@]}"
    $PYTHON export_embeddings.py "$NAME" --checkpoint "$runs/$NAME/recformer/pt.pt" --out "$runs/$NAME/embeddings/pt.pt"
    for scale in raw centred; do
      ELEPHANT_RUNS=$runs train --model sasrec --init_scale $scale --variants pt-trainable "${SASREC[@]}"
    done
  done
  $PYTHON evaluate.py curve "$NAME"
fi

# ---------------------------------------------------------------- 5. table
$PYTHON evaluate.py table "$NAME"
