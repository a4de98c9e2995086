#!/usr/bin/env bash
# Near-policy distillation 72B -> 7B on several nodes: one command a stage, every node runs this same script.
#
#   NNODES=6 NODE_RANK=$RANK MASTER_ADDR=node0 ATTEMPT=1 RUN=/shared/run TEACHER=/shared/Qwen2.5-72B-Instruct \
#   STUDENT=/shared/Qwen2.5-7B-Instruct PROMPTS=/shared/prompts.jsonl examples/launch/npd_72b_to_7b.sh
#
#   --dry-run           print every command that this node would start
#   --STAGE.FLAG VALUE  one more flag of a stage's command, like --train.adam-beta2 0.98 or --rollout.temperature=0.8;
#                       STAGE is prompts, serve, rollout, annotate, select, pack or train
#
# The first TRAIN_NODES nodes annotate and train under torchrun, the others run vLLM servers. RUN is on a file system
# that all nodes share; stages meet there in sealed directories, so the script may be killed anywhere and started again,
# with the same new ATTEMPT on every node. Slurm (npd.sbatch) gives ATTEMPT, NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }

DRY_RUN=0
PROMPTS_FLAGS=() SERVE_FLAGS=() ROLLOUT_FLAGS=() ANNOTATE_FLAGS=() SELECT_FLAGS=() PACK_FLAGS=() TRAIN_FLAGS=()
for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    --prompts.* | --serve.* | --rollout.* | --annotate.* | --select.* | --pack.* | --train.*)
      stage=${argument#--} stage=${stage%%.*}
      declare -n flags="${stage^^}_FLAGS"
      flags+=("--${argument#*.}") ;;
    [!-]*)
      [ -R flags ] || die "$argument must follow a flag --STAGE.FLAG; see --help"
      flags+=("$argument") ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done

# Paths: all of them on the shared file system.
RUN=${RUN:-/shared/npd-72b-to-7b}
TEACHER=${TEACHER:-/shared/models/Qwen2.5-72B-Instruct}
STUDENT=${STUDENT:-/shared/models/Qwen2.5-7B-Instruct}
PROMPTS=${PROMPTS:-/shared/data/prompts.jsonl}

# Nodes and devices.
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-6}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
TRAIN_NODES=${TRAIN_NODES:-4}
SERVER_NODES=${SERVER_NODES:-$((NNODES - TRAIN_NODES))}
DEVICES_PER_NODE=${DEVICES_PER_NODE:-8}
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || die "scontrol must name the nodes; set MASTER_ADDR"
fi
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
PLATFORM=${PLATFORM:-auto}
PYTHON=${PYTHON:-python}

# Rollout servers: they listen on SERVER_HOST alone, and answer who has read the token under $RUN.
SERVERS_PER_NODE=${SERVERS_PER_NODE:-8}
SERVER_HOST=${SERVER_HOST:-}  # empty: the node's own name
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

# -- what can be refused, before anything starts ---------------------------------------------------------------
world=$((TRAIN_NODES * DEVICES_PER_NODE))
replicas=$((world / (STUDENT_TP * STUDENT_PP)))
((TRAIN_NODES > 0 && SERVER_NODES > 0 && TRAIN_NODES + SERVER_NODES == NNODES)) ||
  die "TRAIN_NODES + SERVER_NODES must be NNODES ($NNODES), each at least 1, got $TRAIN_NODES + $SERVER_NODES; set them"
((0 <= NODE_RANK && NODE_RANK < NNODES)) ||
  die "NODE_RANK must be from 0 to NNODES - 1 ($((NNODES - 1))), got $NODE_RANK; give each node its own"
((world % (TEACHER_TP * TEACHER_PP) == 0)) ||
  die "TRAIN_NODES x DEVICES_PER_NODE must be a multiple of TEACHER_TP x TEACHER_PP ($TEACHER_TP x $TEACHER_PP), got $world; change one"
((world % (STUDENT_TP * STUDENT_PP) == 0)) ||
  die "TRAIN_NODES x DEVICES_PER_NODE must be a multiple of STUDENT_TP x STUDENT_PP ($STUDENT_TP x $STUDENT_PP), got $world; change one"
((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * replicas) == 0)) ||
  die "GLOBAL_BATCH_SIZE must be a multiple of MICRO_BATCH_SIZE x replicas ($MICRO_BATCH_SIZE x $replicas), got $GLOBAL_BATCH_SIZE; change it"
case "$TRAIN_NODES $MASTER_ADDR" in
  1\ *) ;;
  *\ localhost | *\ 127.0.0.1 | *\ ::1)
    die "MASTER_ADDR must be the first node's name or address as the others reach it, got $MASTER_ADDR; set it" ;;
esac
[ "${SLURM_STEP_NUM_TASKS:-$NNODES}" = "$NNODES" ] ||
  die "srun must start one task a node, got $SLURM_STEP_NUM_TASKS for $NNODES nodes; srun --ntasks-per-node=1"
if [ "$DRY_RUN$SERVER_HOST" = 0 ] && ((NODE_RANK >= TRAIN_NODES)); then
  SERVER_HOST=$(hostname)
  case "$(getent ahostsv4 "$SERVER_HOST")" in
    127.*) die "SERVER_HOST must be this node's name or address as the others reach it, got $SERVER_HOST, here its loopback; set it" ;;
  esac
fi
SERVER_HOST=${SERVER_HOST:-$(hostname)}
ATTEMPT=${ATTEMPT:-${SLURM_STEP_ID:+$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$SLURM_STEP_ID}}
[ -n "$ATTEMPT" ] || [ "$DRY_RUN" = 1 ] ||
  die "ATTEMPT must be the same on every node and new at each start, got none; set it, or start the script with srun"

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STATE="$RUN/attempts/$ATTEMPT"  # what the nodes tell one another of this start, and of no other
FAILED="$STATE/failed"
DONE="$STATE/done"
TOKEN="$STATE/token"  # of the servers; its owner alone may read it
export MEGATRON_NPD_STARTER=$$  # our commands end with this script

run() {  # print the command, and wait for its end, which a failure elsewhere may cut short (watch)
  printf '[node %s] %s\n' "$NODE_RANK" "$*"
  [ "$DRY_RUN" = 1 ] || { "$@" & wait $!; }
}
run_beside() {  # the same, for a job in the background: the job is the command itself, so that a signal reaches it
  printf '[node %s] %s &\n' "$NODE_RANK" "$*"
  [ "$DRY_RUN" = 1 ] || exec "$@"
}
sealed() { [ -f "$1/manifest.json" ]; }
wait_for() {  # FILE: until another node has written it
  until [ "$DRY_RUN" = 1 ] || [ -e "$1" ]; do sleep 1; done
}
watch() {  # end this node once another one has failed
  until [ -e "$FAILED" ]; do
    kill -0 $$ 2> /dev/null || exit 0
    sleep 1
  done
  echo "error: another node failed: $(cat "$FAILED")" >&2
  kill $$
}
on_exit() {
  code=$?
  [ "$code" = 0 ] || [ -e "$FAILED" ] || echo "node $NODE_RANK, exit code $code; see its log" > "$FAILED"
  jobs -p | xargs -r kill 2> /dev/null || true
  wait
  exit "$code"
}
if [ "$DRY_RUN" = 0 ]; then
  mkdir -p "$STATE" "$RUN/report"
  mkdir "$STATE/node-$NODE_RANK" 2> /dev/null || die "ATTEMPT must be new at each start, got $ATTEMPT again; set another"
  trap on_exit EXIT
  trap 'exit 1' INT TERM
  watch &
fi

once() {  # OUTPUT COMMAND...: node 0 makes a sealed directory, the other nodes wait for it
  local out=$1; shift
  if ! sealed "$out" && [ "$NODE_RANK" = 0 ]; then run "$@"; fi
  wait_for "$out/manifest.json"
}
everywhere() {  # OUTPUT SCRIPT ARGUMENTS...: torchrun over the training nodes
  local out=$1; shift
  if ! sealed "$out"; then
    run "$PYTHON" -m megatron_npd.torchrun --nnodes "$TRAIN_NODES" --node-rank "$NODE_RANK" \
      --nproc-per-node "$DEVICES_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$@"
  fi
  wait_for "$out/manifest.json"
}

# -- servers: started once, refreshed afterwards ---------------------------------------------------------------
newest=0
for round in $(seq 1 "$UPDATES"); do
  if sealed "$RUN/policies/$(printf v%04d "$round")"; then newest=$round; fi
done
policy() { if [ "$1" = 0 ]; then echo "$STUDENT"; else echo "$RUN/policies/$(printf v%04d "$1")"; fi; }

if [ "$NODE_RANK" -ge "$TRAIN_NODES" ]; then  # a server node: its servers run until the run is done
  run_beside "$PYTHON" "$ROOT/tools/serve.py" --model "$(policy "$newest")" --policy-version "$(printf v%04d "$newest")" \
    --num-servers "$SERVERS_PER_NODE" --host "$SERVER_HOST" --port "$SERVER_PORT" --dtype "$SERVER_DTYPE" \
    --max-model-len "$MAX_MODEL_LEN" --platform "$PLATFORM" --urls-file "$STATE/node-$NODE_RANK/urls" \
    --token-file "$TOKEN" "${SERVE_FLAGS[@]}" &
  servers=$!
  [ "$DRY_RUN" = 0 ] || { wait; exit 0; }
  until [ -e "$DONE" ]; do
    kill -0 "$servers" 2> /dev/null || { echo "error: a server died" >&2; exit 1; }
    sleep 1
  done
  exit 0
fi
for node in $(seq "$TRAIN_NODES" $((NNODES - 1))); do wait_for "$STATE/node-$node/urls"; done
if [ "$DRY_RUN" = 1 ]; then
  URLS="[http://NODE:$SERVER_PORT,...]"
else
  URLS="[$(cat "$STATE"/node-*/urls | paste -sd,)]"
fi

# -- the rounds ----------------------------------------------------------------------------------------------
once "$RUN/prompts" "$PYTHON" "$ROOT/tools/prepare_prompts.py" --prompts "$PROMPTS" --student "$STUDENT" \
  --teacher "$TEACHER" --out "$RUN/prompts" --max-prompt-len $((MAX_MODEL_LEN - 1)) "${PROMPTS_FLAGS[@]}"

for round in $(seq 0 "$UPDATES"); do
  dir="$RUN/rounds/$(printf %04d "$round")"
  version=$(printf v%04d "$round")
  first_step=$((TRAIN_ITERS * round / (UPDATES + 1)))
  last_step=$((TRAIN_ITERS * (round + 1) / (UPDATES + 1)))
  rollout=""
  [ "$DRY_RUN" = 1 ] || mkdir -p "$dir"

  if [ "$NODE_RANK" = 0 ] && [ "$round" -gt "$newest" ] && ! sealed "$dir/rollouts"; then
    run "$PYTHON" "$ROOT/tools/refresh.py" --urls "$URLS" --token-file "$TOKEN" --policy "$(policy "$round")" \
      --version "$version"
  fi
  if [ "$NODE_RANK" = 0 ] && ! sealed "$dir/rollouts"; then
    run_beside "$PYTHON" "$ROOT/tools/rollout.py" --prompts "$RUN/prompts" --out "$dir/rollouts" \
      --round "$round" --policy-version "$version" --urls "$URLS" --token-file "$TOKEN" \
      --greedy-paths "$GREEDY_PATHS" --sampled-paths "$SAMPLED_PATHS" --max-tokens "$MAX_TOKENS" --max-model-len "$MAX_MODEL_LEN" \
      "${ROLLOUT_FLAGS[@]}" &
    rollout=$!
    [ "$DRY_RUN" = 0 ] || wait
  fi
  everywhere "$dir/annotations" "$ROOT/tools/annotate.py" --rollouts "$dir/rollouts" --out "$dir/annotations" \
    --teacher "$TEACHER" --student "$(policy "$round")" --top-k "$TOP_K" --seq-length "$TEACHER_SEQ_LENGTH" \
    --tensor-model-parallel-size "$TEACHER_TP" --pipeline-model-parallel-size "$TEACHER_PP" --bf16 "$BF16" \
    --follow-seconds "$FOLLOW_SECONDS" --platform "$PLATFORM" "${ANNOTATE_FLAGS[@]}"
  [ "$DRY_RUN" = 1 ] || [ -z "$rollout" ] || wait "$rollout"

  tau_of=()
  [ "$round" = 0 ] || tau_of=(--tau-of "$RUN/rounds/0000/selection")
  once "$dir/selection" "$PYTHON" "$ROOT/tools/select.py" --annotations "$dir/annotations" --out "$dir/selection" \
    --filter "$FILTER" "${tau_of[@]}" "${SELECT_FLAGS[@]}"

  once "$dir/packs" "$PYTHON" "$ROOT/tools/pack.py" --annotations "$dir/annotations" --selection "$dir/selection" \
    --out "$dir/packs" --seq-length "$SEQ_LENGTH" "${PACK_FLAGS[@]}"

  if [ "$NODE_RANK" = 0 ]; then
    run "$PYTHON" "$ROOT/tools/schedule.py" --schedule "$RUN/schedule.jsonl" --packs "$dir/packs" --round "$round" \
      --from-row $((first_step * GLOBAL_BATCH_SIZE)) --policy-version "$version"
    [ "$DRY_RUN" = 1 ] || touch "$dir/.scheduled"
  fi
  wait_for "$dir/.scheduled"

  everywhere "$RUN/checkpoints/$(printf iter_%07d "$last_step")" "$ROOT/pretrain_npd.py" --hf-model "$STUDENT" \
    --data-path "$RUN/schedule.jsonl" --save "$RUN/checkpoints" --save-interval "$SAVE_INTERVAL" \
    --metrics-path "$RUN/report/metrics.jsonl" \
    --train-iters "$TRAIN_ITERS" --exit-at-iteration "$last_step" --micro-batch-size "$MICRO_BATCH_SIZE" \
    --global-batch-size "$GLOBAL_BATCH_SIZE" --tensor-model-parallel-size "$STUDENT_TP" \
    --pipeline-model-parallel-size "$STUDENT_PP" --sequence-parallel "$SEQUENCE_PARALLEL" --bf16 "$BF16" \
    --lr "$LR" --lr-warmup-iters "$LR_WARMUP_ITERS" --kd-alpha "$KD_ALPHA" --kd-mode "$KD_MODE" \
    --platform "$PLATFORM" "${TRAIN_FLAGS[@]}"

  next=$(printf v%04d $((round + 1)))
  once "$RUN/policies/$next" "$PYTHON" "$ROOT/tools/convert_checkpoint.py" --direction megatron-to-hf \
    --checkpoint "$RUN/checkpoints/$(printf iter_%07d "$last_step")" --hf-model "$STUDENT" --out "$RUN/policies/$next"
  [ "$NODE_RANK" != 0 ] || run "$PYTHON" "$ROOT/tools/report.py" --run-dir "$RUN"
done

[ "$DRY_RUN" = 1 ] || touch "$DONE"
[ "$NODE_RANK" != 0 ] || echo "done: the policy is $RUN/policies/$next, the report $RUN/report/report.html"
