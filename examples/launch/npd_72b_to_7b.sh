#!/usr/bin/env bash
# Near-policy distillation 72B -> 7B on several nodes: one command a stage, every node runs this same script.
#
#   NNODES=6 NODE_RANK=$RANK MASTER_ADDR=node0 RUN=/shared/run TEACHER=/shared/Qwen2.5-72B-Instruct \
#   STUDENT=/shared/Qwen2.5-7B-Instruct PROMPTS=/shared/prompts.jsonl examples/launch/npd_72b_to_7b.sh [--dry-run]
#
# The first TRAIN_NODES nodes annotate and train under torchrun, the last SERVER_NODES nodes run vLLM servers. RUN is on
# a file system that all nodes share; stages meet there in sealed directories, so the script may be killed anywhere and
# started again. --dry-run prints every command that this node would start.
set -euo pipefail

DRY_RUN=0
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    *) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

# Paths: all of them on the shared file system.
RUN=${RUN:-/shared/npd-72b-to-7b}
TEACHER=${TEACHER:-/shared/models/Qwen2.5-72B-Instruct}
STUDENT=${STUDENT:-/shared/models/Qwen2.5-7B-Instruct}
PROMPTS=${PROMPTS:-/shared/data/prompts.jsonl}

# Nodes and devices.
NNODES=${NNODES:-6}
NODE_RANK=${NODE_RANK:-0}
TRAIN_NODES=${TRAIN_NODES:-4}
SERVER_NODES=${SERVER_NODES:-2}
DEVICES_PER_NODE=${DEVICES_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
PLATFORM=${PLATFORM:-auto}
PYTHON=${PYTHON:-python}

# Rollout servers: they listen on SERVER_HOST alone, and answer who has read the token under $RUN.
SERVERS_PER_NODE=${SERVERS_PER_NODE:-8}
SERVER_HOST=${SERVER_HOST:-$(hostname)}
SERVER_PORT=${SERVER_PORT:-8100}
SERVER_DTYPE=${SERVER_DTYPE:-bfloat16}
GREEDY_PATHS=${GREEDY_PATHS:-1}
SAMPLED_PATHS=${SAMPLED_PATHS:-1}
MAX_TOKENS=${MAX_TOKENS:-4096}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-8192}

# Teacher.
TOP_K=${TOP_K:-10}
TEACHER_TP=${TEACHER_TP:-8}
TEACHER_PP=${TEACHER_PP:-1}
TEACHER_SEQ_LENGTH=${TEACHER_SEQ_LENGTH:-32768}
BF16=${BF16:-true}
FOLLOW_SECONDS=${FOLLOW_SECONDS:-600}  # the teacher follows the rollouts, and gives up after so long without an answer

# Student training.
STUDENT_TP=${STUDENT_TP:-4}
STUDENT_PP=${STUDENT_PP:-1}
SEQUENCE_PARALLEL=${SEQUENCE_PARALLEL:-true}
SEQ_LENGTH=${SEQ_LENGTH:-32768}
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}
TRAIN_ITERS=${TRAIN_ITERS:-2000}
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
LR=${LR:-1e-5}
LR_WARMUP_ITERS=${LR_WARMUP_ITERS:-50}
KD_ALPHA=${KD_ALPHA:-0.9}
KD_MODE=${KD_MODE:-tail}
FILTER=${FILTER:-delta_ifd}
UPDATES=${UPDATES:-1}

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ATTEMPT=${ATTEMPT:-${SLURM_JOB_ID:-0}}  # a new value for each start, so that an old attempt's failure is not this one's
FAILED="$RUN/.failed-$ATTEMPT"
DONE="$RUN/.done-$ATTEMPT"
SERVERS="$RUN/servers-$ATTEMPT"

run() {  # print the command, and start it unless this is a dry run
  printf '[node %s] %s\n' "$NODE_RANK" "$*"
  [ "$DRY_RUN" = 1 ] || "$@"
}
run_beside() {  # the same, for a job in the background: the job is the command itself, so that a signal reaches it
  printf '[node %s] %s &\n' "$NODE_RANK" "$*"
  [ "$DRY_RUN" = 1 ] || exec "$@"
}
sealed() { [ -f "$1/manifest.json" ]; }
wait_for() {  # FILE: until another node has written it
  [ "$DRY_RUN" = 1 ] && return
  until [ -e "$1" ]; do
    if [ -e "$FAILED" ]; then echo "error: another node failed: $(cat "$FAILED")" >&2; exit 1; fi
    sleep 1
  done
}
on_exit() {
  code=$?
  [ "$DRY_RUN" = 1 ] && exit "$code"
  [ "$code" = 0 ] || echo "node $NODE_RANK, exit code $code; see its log" > "$FAILED"
  jobs -p | xargs -r kill 2> /dev/null || true
  wait
  exit "$code"
}
trap on_exit EXIT
[ "$DRY_RUN" = 1 ] || mkdir -p "$RUN" "$SERVERS"

once() {  # OUTPUT COMMAND...: node 0 makes a sealed directory, the other nodes wait for it
  local out=$1; shift
  if ! sealed "$out" && [ "$NODE_RANK" = 0 ]; then run "$@"; fi
  wait_for "$out/manifest.json"
}
everywhere() {  # OUTPUT SCRIPT ARGUMENTS...: torchrun over the training nodes
  local out=$1; shift
  if ! sealed "$out" && [ "$NODE_RANK" -lt "$TRAIN_NODES" ]; then
    run "$PYTHON" -m torch.distributed.run --nnodes "$TRAIN_NODES" --node-rank "$NODE_RANK" \
      --nproc-per-node "$DEVICES_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --log-dir /dev/null "$@"
  fi
  wait_for "$out/manifest.json"
}

# -- servers: started once, refreshed afterwards ---------------------------------------------------------------
FIRST_SERVER_NODE=$((NNODES - SERVER_NODES))
newest=0
for round in $(seq 1 "$UPDATES"); do
  if sealed "$RUN/policies/$(printf v%04d "$round")"; then newest=$round; fi
done
policy() { if [ "$1" = 0 ]; then echo "$STUDENT"; else echo "$RUN/policies/$(printf v%04d "$1")"; fi; }

if [ "$NODE_RANK" -ge "$FIRST_SERVER_NODE" ]; then
  run_beside "$PYTHON" "$ROOT/tools/serve.py" --model "$(policy "$newest")" --policy-version "$(printf v%04d "$newest")" \
    --num-servers "$SERVERS_PER_NODE" --host "$SERVER_HOST" --port "$SERVER_PORT" --dtype "$SERVER_DTYPE" \
    --max-model-len "$MAX_MODEL_LEN" --platform "$PLATFORM" --urls-file "$SERVERS/$NODE_RANK.urls" \
    --token-file "$SERVERS/token" &
  [ "$DRY_RUN" = 0 ] || wait
fi
if [ "$NODE_RANK" -ge "$TRAIN_NODES" ]; then  # a server node: its servers run until the run is done
  [ "$DRY_RUN" = 0 ] || exit 0
  until [ -e "$DONE" ] || [ -e "$FAILED" ]; do kill -0 %1 || { echo "error: a server died" >&2; exit 1; }; sleep 1; done
  exit 0
fi
for node in $(seq "$FIRST_SERVER_NODE" $((NNODES - 1))); do wait_for "$SERVERS/$node.urls"; done
if [ "$DRY_RUN" = 1 ]; then
  URLS="[http://NODE:$SERVER_PORT,...]"
else
  URLS="[$(cat "$SERVERS"/*.urls | paste -sd,)]"
fi

# -- the rounds ----------------------------------------------------------------------------------------------
once "$RUN/prompts" "$PYTHON" "$ROOT/tools/prepare_prompts.py" --prompts "$PROMPTS" --student "$STUDENT" \
  --teacher "$TEACHER" --out "$RUN/prompts" --max-prompt-len $((MAX_MODEL_LEN - 1))

for round in $(seq 0 "$UPDATES"); do
  dir="$RUN/rounds/$(printf %04d "$round")"
  version=$(printf v%04d "$round")
  first_step=$((TRAIN_ITERS * round / (UPDATES + 1)))
  last_step=$((TRAIN_ITERS * (round + 1) / (UPDATES + 1)))
  rollout=""
  [ "$DRY_RUN" = 1 ] || mkdir -p "$dir"

  if [ "$NODE_RANK" = 0 ] && [ "$round" -gt "$newest" ] && ! sealed "$dir/rollouts"; then
    run "$PYTHON" "$ROOT/tools/refresh.py" --urls "$URLS" --token-file "$SERVERS/token" --policy "$(policy "$round")" --version "$version"
  fi
  if [ "$NODE_RANK" = 0 ] && ! sealed "$dir/rollouts"; then
    run_beside "$PYTHON" "$ROOT/tools/rollout.py" --prompts "$RUN/prompts" --out "$dir/rollouts" \
      --round "$round" --policy-version "$version" --urls "$URLS" --token-file "$SERVERS/token" --greedy-paths "$GREEDY_PATHS" \
      --sampled-paths "$SAMPLED_PATHS" --max-tokens "$MAX_TOKENS" --max-model-len "$MAX_MODEL_LEN" &
    rollout=$!
    [ "$DRY_RUN" = 0 ] || wait
  fi
  everywhere "$dir/annotations" "$ROOT/tools/annotate.py" --rollouts "$dir/rollouts" --out "$dir/annotations" \
    --teacher "$TEACHER" --student "$(policy "$round")" --top-k "$TOP_K" --seq-length "$TEACHER_SEQ_LENGTH" \
    --tensor-model-parallel-size "$TEACHER_TP" --pipeline-model-parallel-size "$TEACHER_PP" --bf16 "$BF16" \
    --follow-seconds "$FOLLOW_SECONDS" --platform "$PLATFORM"
  [ "$DRY_RUN" = 1 ] || [ -z "$rollout" ] || wait "$rollout"

  tau_of=()
  [ "$round" = 0 ] || tau_of=(--tau-of "$RUN/rounds/0000/selection")
  once "$dir/selection" "$PYTHON" "$ROOT/tools/select.py" --annotations "$dir/annotations" --out "$dir/selection" \
    --filter "$FILTER" "${tau_of[@]}"

  once "$dir/packs" "$PYTHON" "$ROOT/tools/pack.py" --annotations "$dir/annotations" --selection "$dir/selection" \
    --out "$dir/packs" --seq-length "$SEQ_LENGTH"

  if [ "$NODE_RANK" = 0 ]; then
    run "$PYTHON" "$ROOT/tools/schedule.py" --schedule "$RUN/schedule.jsonl" --packs "$dir/packs" --round "$round" \
      --from-row $((first_step * GLOBAL_BATCH_SIZE)) --policy-version "$version"
    [ "$DRY_RUN" = 1 ] || touch "$dir/.scheduled"
  fi
  wait_for "$dir/.scheduled"

  everywhere "$RUN/checkpoints/$(printf iter_%07d "$last_step")" "$ROOT/pretrain_npd.py" --hf-model "$STUDENT" \
    --data-path "$RUN/schedule.jsonl" --save "$RUN/checkpoints" --save-interval "$SAVE_INTERVAL" \
    --train-iters "$TRAIN_ITERS" --exit-at-iteration "$last_step" --micro-batch-size "$MICRO_BATCH_SIZE" \
    --global-batch-size "$GLOBAL_BATCH_SIZE" --tensor-model-parallel-size "$STUDENT_TP" \
    --pipeline-model-parallel-size "$STUDENT_PP" --sequence-parallel "$SEQUENCE_PARALLEL" --bf16 "$BF16" \
    --lr "$LR" --lr-warmup-iters "$LR_WARMUP_ITERS" --kd-alpha "$KD_ALPHA" --kd-mode "$KD_MODE" \
    --platform "$PLATFORM"

  next=$(printf v%04d $((round + 1)))
  once "$RUN/policies/$next" "$PYTHON" "$ROOT/tools/convert_checkpoint.py" --direction megatron-to-hf \
    --checkpoint "$RUN/checkpoints/$(printf iter_%07d "$last_step")" --hf-model "$STUDENT" --out "$RUN/policies/$next"
done

[ "$DRY_RUN" = 1 ] || touch "$DONE"
[ "$NODE_RANK" != 0 ] || echo "done: $RUN/policies/$next"
