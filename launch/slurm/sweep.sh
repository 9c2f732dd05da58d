#!/bin/bash
# A table as an array of jobs, one run (a row and a seed) for each index, and a last job
# that puts the table together. Options of sbatch come first, then those of
# `samrobust table`. From the checkout:
#
#   launch/slurm/sweep.sh --time=04:00:00 --array-limit=8 -- \
#       --config=configs/cifar10.py --seeds=3 --workdir=/shared/runs/cifar10
#
# --array-limit=N lets N of them run at a time. Each index is a train.sbatch of its own
# (edit that one): preempted, it is requeued and resumes. Rerunning the same command starts
# what is missing: finished runs are kept. The workdir must be on a disk that all nodes
# share.
set -euo pipefail

here=$(dirname "$0")
refuse() { echo "sweep.sh: error: $*" >&2; exit 2; }

options=() limit=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --array-limit=*) limit=%${1#*=} ;;
    *) options+=("$1") ;;
  esac
  shift
done
[ "${1:-}" = -- ] || refuse "Expected '--' between the options of sbatch and of the table."
shift
[[ " $*" == *" --workdir="* ]] || refuse "Expected --workdir=DIR, on a disk all nodes share."

# shellcheck source=/dev/null
source <(grep '^SAMROBUST_ENV=' "$here/train.sbatch")
# shellcheck source=/dev/null
source "$SAMROBUST_ENV"
runs=$(JAX_PLATFORMS=cpu samrobust table "$@" --list | wc -l)
[ "$runs" -gt 0 ] || refuse "Expected rows and seeds to run, got none of them."

array=$(sbatch --parsable --array="0-$((runs - 1))$limit" --output=%x-%A_%a.log \
  ${options[@]+"${options[@]}"} "$here/train.sbatch" table "$@" --shard="{index}/$runs")
# --parsable gives JOB or JOB;CLUSTER.
table=$(sbatch --parsable --dependency="afterany:${array%%;*}" --job-name=samrobust-table \
  ${options[@]+"${options[@]}"} --nodes=1 --time=00:30:00 \
  "$here/train.sbatch" table "$@" --collect)
echo "$runs runs: job ${array%%;*}; the table: job ${table%%;*}"
