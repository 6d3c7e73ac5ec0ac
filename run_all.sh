#!/usr/bin/env bash
# Raw interactions and item texts in, the paper's result tables out:
#   prepare -> stage-PT -> stage-FT1, FT2 -> export LF/PT/FT -> rankings without training -> ID models -> table
# A step whose output is there and was made from the same inputs, options and code says "up to date".
set -euo pipefail
{  # read whole before it starts: it may be edited meanwhile

usage() {
  cat <<'TEXT'
bash run_all.sh [NAME] [options]        NAME: a dataset (default drugstore)
  drugstore    embedded (CC0); source for stage-PT: grocery. No GPU, no download but the language model
  pantry instruments arts movies sports   the paper's targets (CUDA); sources: books clothing sports movies
  industrial office                       whole Amazon categories (downloaded into data/raw/), each the other's source
  anything else                           data/NAME/interactions.csv and items.jsonl; name --source, or stage-PT is left out
options
  --plm P        minilm, longformer, a hub name or a folder   (default: longformer for the paper's targets, else minilm)
  --source "A B" datasets for stage-PT                        (default: as above)
  --pretrained F start from this stage-PT checkpoint (pretrain.py's folder, or a published file with its --plm) instead
  --seeds "0 1"  seeds of the ID models                       (default: 0; paper's targets: 0 1 2)
  --rec-seeds "0 1"  seeds of stage-FT1 and FT2; the first one's embeddings are exported        (default: 0)
  --full         the paper's budget (default for its targets) instead of the small one, made for 20 minutes on 2 cores
  --longer       between the two: all of the paper's rates and, as --full, every kind of rows; many hours on 2 cores
  --toy          the smallest budget, of minutes: shows that everything runs, says nothing about quality
  --table1       also stage-FT1 and FT2 with a few layers tuned: one of each third of the depth, single ones (seed 0)
  --table5       also texts beside trained IDs, and RecFormer with trainable items
  --figure2      also stage-PT on a share of the source users, SASRec from each, and the curve
  --shares "1 9" its shares, in percent, beside 100   (default: the paper's 0.01 to 50; small sources need 2 and more)
  --again        make everything again      --keep   use earlier results where only code has changed since
Each budget other than the default, and each --plm, --source, --pretrained named here, has a place of its own below runs/.
PYTHON=python3.12 bash run_all.sh: another Python. Several GPUs: pretrain.py and finetune.py first, by torchrun, with the chain's options.
TEXT
}

fail() { echo "error: $1" >&2; exit 2; }
NAME= PLM= SOURCE= PRETRAINED= SEEDS= REC_SEEDS=0 BUDGET= MORE= PLM_PLACE= SOURCE_PLACE= AGAIN=()
SHARES="0.01 0.1 1 2 10 20 50"
while [ $# -gt 0 ]; do
  case $1 in
    --plm|--source|--pretrained|--seeds|--rec-seeds|--shares) [ $# -ge 2 ] || fail "$1 needs a value (bash run_all.sh --help)" ;;&
    --help|-h) usage; exit 0 ;;
    --plm) PLM=${2%/}; PLM_PLACE=/${PLM##*/}; shift 2 ;;
    --source) [ -n "$2" ] || fail "--source '': name prepared datasets (own data without --source has no stage-PT)"
              SOURCE=$2; SOURCE_PLACE=/from-${2// /+}; shift 2 ;;
    --pretrained) PRETRAINED=$(realpath -e -- "$2" 2>/dev/null) || fail "--pretrained $2: no such file or folder"
                  SOURCE_PLACE=/pretrained-$(basename -- "$2"); shift 2 ;;
    --seeds) SEEDS=$2; shift 2 ;;
    --rec-seeds) REC_SEEDS=$2; shift 2 ;;
    --shares) SHARES=$2; shift 2 ;;
    --full|--longer|--toy) BUDGET=${1#--}; shift ;;
    --table1|--table5|--figure2) MORE+=" $1"; shift ;;
    --again|--keep) AGAIN=("$1"); shift ;;
    -*) fail "unknown option $1 (bash run_all.sh --help)" ;;
    *) [ -z "$NAME" ] || fail "one dataset at a time: $NAME, $1"; NAME=$1; shift ;;
  esac
done
: "${NAME:=drugstore}"
[[ $NAME =~ ^[A-Za-z0-9_-]+$ ]] || fail "dataset name '$NAME': letters, digits, - and _ only"
numbers() { [[ "$1 " =~ ^\ *($2\ +)+$ ]] || fail "--seeds, --rec-seeds and --shares take numbers, such as '0 1', not '$1'"; }
numbers "${SEEDS:-0}" '[0-9]+'
numbers "$REC_SEEDS" '[0-9]+'
numbers "$SHARES" '[0-9]+(\.[0-9]+)?'
[ ! -d "$PLM" ] || PLM=$(realpath -- "$PLM")
[ -z "${ELEPHANT_DATA:-}" ] || export ELEPHANT_DATA=$(realpath -m -- "$ELEPHANT_DATA")
ROOT=$(realpath -m -- "${ELEPHANT_RUNS:-$(dirname "$0")/runs}")
cd "$(dirname "$0")"

PYTHON=${PYTHON:-python}
# the value of a key, or of one below it, in a row.json
of_row() { "$PYTHON" -c 'import functools, json, sys; print(functools.reduce(dict.get, sys.argv[2:], json.load(open(sys.argv[1]))))' "$@" 2>/dev/null || fail "$1: no row of ours; remove it"; }
# a checkpoint of ours says what it began as
[ -n "$PLM" ] || [ ! -f "$PRETRAINED/row.json" ] || PLM=$(of_row "$PRETRAINED/row.json" plm)
PAPER= DEFAULT=small
case $NAME in
  drugstore) : "${SOURCE:=grocery}" ;;
  industrial) : "${SOURCE:=office}" ;;
  office) : "${SOURCE:=industrial}" ;;
  pantry|instruments|arts|movies|sports)
    PAPER=1 DEFAULT=full; : "${SOURCE:=books clothing sports movies}" "${PLM:=longformer}" "${SEEDS:=0 1 2}" ;;
esac
: "${PLM:=minilm}" "${SEEDS:=0}" "${BUDGET:=$DEFAULT}"
PLACE=$PLM_PLACE$SOURCE_PLACE
[ "$BUDGET" = $DEFAULT ] || PLACE=/$BUDGET$PLACE
[ ! -e "$ROOT/.place" ] || fail "ELEPHANT_RUNS ($ROOT) is where a chain puts its runs: unset it"
[[ $MORE != *--figure2* || -n $SOURCE ]] || fail "--figure2 needs a --source for stage-PT"
export ELEPHANT_RUNS=$ROOT$PLACE

# ---------------------------------------------------------------- budgets: the only place where numbers differ
RATES=(--lrs 0.0003 0.001 0.003 0.01)  # the paper's
case $BUDGET in
  full)   TOKENS=() PT=(--batch 64 --accumulate 8) FT=() SEQ=("${RATES[@]}") WIDTH=() ;;
  longer) TOKENS=(--max-tokens 128) PT=(--batch 64 --accumulate 1 --warmup 100 --patience 3) FT=(--batch 32 --patience 5)
          SEQ=("${RATES[@]}") WIDTH=() ;;
  # patience 10, the paper's, leaves one seed in five of SASRec with one negative at popularity
  small)  TOKENS=(--max-tokens 128) PT=(--batch 32 --accumulate 1 --max-steps 40 --warmup 10)
          FT=(--batch 32 --epochs 1 --warmup 10) SEQ=(--lrs 0.001 --epochs 40 --patience 20 --max-items 20) WIDTH=(--hidden 128) ;;
  toy)    TOKENS=(--max-tokens 64) PT=(--batch 8 --accumulate 1 --max-steps 3) FT=(--batch 32 --epochs 1 --warmup 2)
          SEQ=(--lrs 0.001 --epochs 1) WIDTH=() ;;
esac
# own data may have fewer items than that, and its own width
case $NAME in drugstore|industrial|office) ;; *) WIDTH=() ;; esac
RUN=$ELEPHANT_RUNS/$NAME
# A step runs in the background: where this shell alone is told to end, it ends the step first (Ctrl-C goes to both)
step() { (trap - TERM INT; exec "$PYTHON" "$@") & wait $!; }
trap 'kill ${!:-} 2>/dev/null && wait $! || true; exit 143' TERM
trap 'wait ${!:-} || true; exit 130' INT
again() { step "$@" ${AGAIN[@]+"${AGAIN[@]}"}; }

# ---------------------------------------------------------------- 1. data
# published weights need no source domains
[[ -z $PRETRAINED || $MORE == *--figure2* ]] || SOURCE=
for name in $NAME $SOURCE; do step -m common.data "$name"; done
# a mark, so that no chain is put into the place of another
[[ -z $PLACE || -e $ELEPHANT_RUNS/.place ]] || { mkdir -p "$ELEPHANT_RUNS"; echo "$PLACE" > "$ELEPHANT_RUNS/.place"; }

# ---------------------------------------------------------------- 2. language model: PT, FT1, FT2
# one stage-PT serves all of the paper's targets; it leaves out the last two items, as two sources are targets too
[[ -z $PAPER && " $SOURCE " != *" $NAME "* ]] || PT+=(--leave-out)
START=(--plm "$PLM" ${TOKENS[@]+"${TOKENS[@]}"})
if [ -n "$PRETRAINED" ]; then
  START+=(--checkpoint "$PRETRAINED")
elif [ -n "$SOURCE" ]; then
  PRETRAINED=$ELEPHANT_RUNS/pretrained/${PLM##*/}-${SOURCE// /+}
  again pretrain.py $SOURCE --plm "$PLM" --out "$PRETRAINED" "${PT[@]}" ${TOKENS[@]+"${TOKENS[@]}"}
  START=(--checkpoint "$PRETRAINED")
fi
again finetune.py "$NAME" --stage 1 "${START[@]}" --seeds $REC_SEEDS ${FT[@]+"${FT[@]}"}
again finetune.py "$NAME" --stage 2 --seeds $REC_SEEDS ${FT[@]+"${FT[@]}"}

# ---------------------------------------------------------------- 3. item embeddings, and what they reach untrained
export_() { again export_embeddings.py "$NAME" --out "$RUN/embeddings/$1.pt" "${@:2}"; }
export_ lf --plm "$PLM"
[ -z "$PRETRAINED" ] || export_ pt --checkpoint "$PRETRAINED" --plm "$PLM"
export_ ft --checkpoint "$RUN/ft1-seed${REC_SEEDS%% *}"
again evaluate.py untrained "$NAME"

# ---------------------------------------------------------------- 4. ID models
E="lf ft"
[ -z "$PRETRAINED" ] || E="lf pt ft"
of() { for e in $E; do echo "$e-$1"; done; }  # the variants of one mode
train() { again train_seq.py "$NAME" --seeds $SEEDS "${SEQ[@]}" "$@"; }
for loss in ce bce; do
  sasrec() { train --model sasrec --loss $loss "$@"; }
  sasrec ${WIDTH[@]+"${WIDTH[@]}"} --variants random $(of trainable)
  sasrec ${WIDTH[@]+"${WIDTH[@]}"} --init-scale centred --variants $(of trainable)
  case $BUDGET in longer|full)
    sasrec --init-scale whitened --variants $(of trainable)
    sasrec --init-scale permuted --variants lf-trainable
    sasrec --hidden 128 --variants random
    for scale in centred whitened; do sasrec --hidden 128 --init-scale $scale --variants $(of trainable); done ;;
  esac
done
train --model sasrec --loss bce ${WIDTH[@]+"${WIDTH[@]}"} --variants $(of freeze) ft-further-all ft-further-emb
train --model bert4rec ${WIDTH[@]+"${WIDTH[@]}"} --variants random $(of trainable)
train --model gru4rec ${WIDTH[@]+"${WIDTH[@]}"} --init-scale centred --variants random $(of trainable)
[ $BUDGET != longer ] || train --model bert4rec --hidden 128 --variants random $(of trainable)  # README's row
case $BUDGET in longer|full)
  train --model bert4rec --variants $(of freeze) ft-further-all ft-further-emb
  train --model bert4rec --init-scale centred --variants $(of trainable) ;;
esac

# ---------------------------------------------------------------- tables 5 and 1, figure 2
if [[ $MORE == *--table5* ]]; then
  train --model sasrec --loss bce ${WIDTH[@]+"${WIDTH[@]}"} --variants $(of id+text)
  again finetune.py "$NAME" --stage 2 --trainable-items --seeds ${REC_SEEDS%% *} ${FT[@]+"${FT[@]}"}
fi
if [[ $MORE == *--table1* ]]; then
  again finetune.py "$NAME" --stage 0 --plm "$PLM" ${TOKENS[@]+"${TOKENS[@]}"}
  depth=$(of_row "$RUN/ft1-seed${REC_SEEDS%% *}/row.json" config layers)
  third=$((depth / 3)) sets=
  [ $third -gt 0 ] || fail "--table1 tunes thirds of the depth: $PLM has $depth layers, three are needed"
  for ((i = 0; i < third; i++)); do sets+=" $i,$((i + third)),$((i + 2 * third))"; done
  for layers in $sets $((third - 1)) $((2 * third - 1)) $((depth - 1)); do
    again finetune.py "$NAME" --stage 1 "${START[@]}" --tune-layers "$layers" ${FT[@]+"${FT[@]}"}
    again finetune.py "$NAME" --stage 2 --tune-layers "$layers" ${FT[@]+"${FT[@]}"}
  done
fi
if [[ $MORE == *--figure2* ]]; then
  for share in $SHARES 100; do
    part=$PRETRAINED
    if [ "$share" != 100 ]; then
      part=$ELEPHANT_RUNS/pretrained/${PLM##*/}-${SOURCE// /+}-share$share
      again pretrain.py $SOURCE --plm "$PLM" --share $share --out "$part" "${PT[@]}" ${TOKENS[@]+"${TOKENS[@]}"}
    fi
    export_ pt-share$share --checkpoint "$part" --plm "$PLM"
    for scale in raw centred; do
      train --model sasrec --loss bce ${WIDTH[@]+"${WIDTH[@]}"} --init-scale $scale --variants pt-share$share-trainable
    done
  done
  again evaluate.py untrained "$NAME"
  step evaluate.py curve "$NAME"
fi

# ---------------------------------------------------------------- 5. table
step evaluate.py table "$NAME"
[ -z "$PLACE" ] || echo "this chain's runs: export ELEPHANT_RUNS=$(printf %q "$ELEPHANT_RUNS") before evaluate.py and the other scripts, not before run_all.sh"
exit
}
