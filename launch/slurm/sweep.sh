#!/bin/bash
# A table as an array of jobs, one run (a row and a seed) for each index, and a last job
# that puts the table together. Options of sbatch come first, then those of
# `samrobust table`. From the checkout:
#
#   launch/slurm/sweep.sh --time=04:00:00 --array-limit=8 -- \
#       --config=configs/cifar10.py --seeds=3 --workdir=/shared/runs/cifar10
#
# --array-limit=N lets N of them run at a time; --runs=N says how many there are, where
# `samrobust table --list` does not work on this machine. Each index is a train.sbatch of its own
# (edit that one): preempted, it is requeued and resumes. Rerunning the same command starts
# what is missing: finished runs are kept. The workdir must be on a disk that all nodes
# share.
set -euo pipefail

here=$(dirname "$0")
refuse() { echo "sweep.sh: error: $*" >&2; exit 2; }

options=() gpus=() limit='' runs=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --array-limit=*) limit=%${1#*=} ;;
    --runs=*) runs=${1#*=} ;;
    --gpus*=* | --gres=* | -G?*) gpus+=("$1") ;; # the table's job wants none
    *) options+=("$1") ;;
  esac
  shift
done
[ "${1:-}" = -- ] || refuse "Expected '--' between the options of sbatch and of the table."
shift
[[ " $*" == *" --workdir="* ]] || refuse "Expected --workdir=DIR, on a disk all nodes share."

# shellcheck source=/dev/null
source <(grep '^SAMROBUST_[A-Z]*=' "$here/train.sbatch")
if [ -z "$runs" ]; then
  set +eu # conda's and Lmod's scripts
  # shellcheck source=/dev/null
  [ "$SAMROBUST_ENV" = none ] || source "$SAMROBUST_ENV" ||
    refuse "Expected a file that can be sourced, got SAMROBUST_ENV=$SAMROBUST_ENV."
  set -eu
  # shellcheck disable=SC2086 # several words
  runs=$(JAX_PLATFORMS=cpu $SAMROBUST_EXEC samrobust table "$@" --list | wc -l)
fi
[ "$runs" -gt 0 ] || refuse "Expected rows and seeds to run, got none of them."

array=$(sbatch --parsable --array="0-$((runs - 1))$limit" --output=%x-%A_%a.log \
  ${options[@]+"${options[@]}"} ${gpus[@]+"${gpus[@]}"} \
  "$here/train.sbatch" table "$@" --shard="{index}/$runs")
# --parsable gives JOB or JOB;CLUSTER.
table=$(SAMROBUST_PROCESS_PER=node sbatch --parsable --dependency="afterany:${array%%;*}" --job-name=samrobust-table \
  ${options[@]+"${options[@]}"} --nodes=1 --gpus-per-node=0 --time=00:30:00 \
  "$here/train.sbatch" table "$@" --collect)
echo "$runs runs: job ${array%%;*}; the table: job ${table%%;*}"
