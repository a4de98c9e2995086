#!/usr/bin/env bash
# Near-policy distillation 72B -> 7B on several nodes: every node runs this same script.
#
#   ATTEMPT=1 NNODES=4 NODE_RANK=$RANK MASTER_ADDR=node0 RUN=/shared/run TEACHER=/shared/Qwen2.5-72B-Instruct \
#   STUDENT=/shared/Qwen2.5-7B-Instruct PROMPTS=/shared/prompts.jsonl examples/launch/npd_72b_to_7b.sh
#
# Further flags go to the run: --dry-run prints what this node would do, --train.adam-beta2 0.98 changes a setting.
# All nodes run vLLM servers, then all annotate and train (the recipe's take_turns); with TRAIN_NODES below NNODES the
# first TRAIN_NODES annotate and train, and the others serve meanwhile. RUN is on a file system that all nodes
# share; the script may be killed anywhere and started again, with the same new ATTEMPT on every node. Slurm
# (npd.sbatch) gives ATTEMPT, NNODES, NODE_RANK and MASTER_ADDR.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What to edit: paths, all of them on the shared file system; nodes; the recipe.
RUN=${RUN:-/shared/npd-72b-to-7b}
TEACHER=${TEACHER:-/shared/models/Qwen2.5-72B-Instruct}
STUDENT=${STUDENT:-/shared/models/Qwen2.5-7B-Instruct}
PROMPTS=${PROMPTS:-/shared/data/prompts.jsonl}
RECIPE=${RECIPE:-$HERE/../recipes/npd_72b_to_7b.yaml}
NNODES=${NNODES:-${SLURM_JOB_NUM_NODES:-4}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
TRAIN_NODES=${TRAIN_NODES:-$NNODES}
DEVICES_PER_NODE=${DEVICES_PER_NODE:-8}
MASTER_PORT=${MASTER_PORT:-29500}
SERVER_HOST=${SERVER_HOST:-}  # empty: the node's own name
SERVER_PORT=${SERVER_PORT:-8100}

# What Slurm knows.
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
    { echo "error: scontrol must name the nodes, got none; set MASTER_ADDR" >&2; exit 2; }
fi
if [ "${SLURM_STEP_NUM_TASKS:-$NNODES}" != "$NNODES" ]; then
  echo "error: srun must start one task per node, got $SLURM_STEP_NUM_TASKS for $NNODES nodes;" \
    "give --ntasks-per-node=1" >&2
  exit 2
fi
ATTEMPT=${ATTEMPT:-${SLURM_STEP_ID:+$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.$SLURM_STEP_ID}}

exec "${PYTHON:-python}" -m megatron_npd run --config "$RECIPE" --run-dir "$RUN" --teacher "$TEACHER" \
  --student "$STUDENT" --prompts "$PROMPTS" --nnodes "$NNODES" --node-rank "$NODE_RANK" --train-nodes "$TRAIN_NODES" \
  --nproc-per-node "$DEVICES_PER_NODE" --master-addr "${MASTER_ADDR:-localhost}" --master-port "$MASTER_PORT" \
  --server-host "$SERVER_HOST" --server-port "$SERVER_PORT" --attempt "$ATTEMPT" "$@"
