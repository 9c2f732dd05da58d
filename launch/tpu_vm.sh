#!/usr/bin/env bash
# A samrobust command on Cloud TPU VMs, one host or a slice of many, through gcloud:
#
#   export NAME=sam ZONE=us-central1-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   export BUCKET=gs://my-bucket/sam
#   launch/tpu_vm.sh up train --config=configs/cifar10.py:sam,rho=0.2 --workdir=runs/sam
#
#   up COMMAND ...   create, install, run, collect, delete; after a preemption all of it
#                    again, from the last checkpoint. It may be stopped and called again:
#                    the VM works on, and deletes itself when it is done.
#   create           make the VM                install   bring the last commit there
#   run COMMAND ...  start the command there    status    of the VM, with the log's end
#   collect          fetch runs/                delete    the VM; the bucket stays
#
# The workdir must lie in runs/, and every NAME needs a folder of the bucket to itself.
# Worker 0 works on its own disk, where a finished checkpoint appears in one step, and
# copies runs/ to the bucket every SAVE_SECONDS: more is not lost with a VM. A copy that
# was cut off does no harm: a checkpoint's sums arrive after all else of it, and one
# without them is left out on a new VM, which takes the one before, or starts anew if it
# was the first. One that was damaged later is refused by samrobust as everywhere.
set -euo pipefail

# --- Edit here, or set the variables. ---
NAME=${NAME:-samrobust}
ZONE=${ZONE:-us-central1-a}
TYPE=${TYPE:-v5litepod-16}              # gcloud compute tpus accelerator-types list
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # gcloud compute tpus versions list
BUCKET=${BUCKET:-}                      # gs://BUCKET/FOLDER that the VM may write to
SPOT=${SPOT:-yes}                       # yes: cheaper, can be preempted
QUEUED=${QUEUED:-yes}                   # yes: wait in Google's queue for capacity
CREATE_FLAGS=${CREATE_FLAGS:-}          # as --network=NAME --service-account=ACCOUNT
SSH_FLAGS=${SSH_FLAGS:-}                # as --internal-ip, or --tunnel-through-iap
PYTHON=${PYTHON:-3.12}                  # that of the image
SAVE_SECONDS=${SAVE_SECONDS:-60}
POLL_SECONDS=${POLL_SECONDS:-30}
MAX_FAILURES=${MAX_FAILURES:-20} # in a row: no permission or quota, no connection, crashes
# ---

say() { echo "tpu_vm.sh: $*" >&2; }
refuse() { say "error: $*"; exit 2; }
vm() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
# shellcheck disable=SC2086 # several flags
on() { vm ssh --worker="$1" --command="$2" $SSH_FLAGS; }

create() {
  # There is something to copy from before the first checkpoint: nothing is an error.
  echo "$NAME" | gcloud storage cp - "$BUCKET/.samrobust" --quiet
  local options=(--accelerator-type="$TYPE")
  if [ "$SPOT" = yes ]; then options+=(--spot); fi
  # shellcheck disable=SC2206 # several flags
  options+=($CREATE_FLAGS)
  if [ "$QUEUED" = yes ]; then
    queued create --node-id="$NAME" --runtime-version="$VERSION" "${options[@]}"
  else
    vm create --version="$VERSION" "${options[@]}"
  fi
}

delete() { if [ "$QUEUED" = yes ]; then queued delete --force; else vm delete; fi; }

# READY, CREATING, PREEMPTED and so on, or a state of the queue; nothing without a VM.
state() {
  vm describe --format='value(state)' 2>/dev/null && return
  [ "$QUEUED" != yes ] || queued describe --format='value(state.state)' 2>/dev/null || true
}

# As a clone, so that every result names its commit.
install() {
  local here temporary
  here=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
  [ -z "$(git -C "$here" status --porcelain)" ] || say "what is not committed stays here"
  temporary=$(mktemp -d)
  git clone --quiet --depth=1 "file://$here" "$temporary/samrobust"
  tar -C "$temporary" -czf "$temporary/samrobust.tgz" samrobust
  # shellcheck disable=SC2086 # several flags
  gcloud compute tpus tpu-vm scp "$temporary/samrobust.tgz" "$NAME:samrobust.tgz" \
    --zone="$ZONE" --quiet --worker=all $SSH_FLAGS
  rm -rf "$temporary"
  on all "set -e
    rm -rf samrobust installed && tar -xzf samrobust.tgz
    PATH=\$HOME/.local/bin:\$PATH
    command -v uv >/dev/null || python3 -m pip install -q --user uv
    uv venv -q --clear --python $PYTHON venv
    uv pip install -q --python venv --require-hashes -r samrobust/requirements.lock
    uv pip install -q --python venv -e 'samrobust[tpu]'
    mkdir -p runs"
  on 0 'touch installed' # all of them are
}

run() {
  local there=samrobust/launch/tpu_vm.sh
  # On a new VM only: on another one the disk is newer than the bucket.
  # What a crash left at work would hold the chips.
  # shellcheck disable=SC2016 # expanded there
  on all 'for group in $(cat pid save.pid 2>/dev/null); do
      if grep -qs tpu_vm.sh "/proc/$group/cmdline"; then kill -KILL -- "-$group"; fi
    done'
  on 0 "rm -f code saved
    [ -f restored ] || { BUCKET='$BUCKET' bash $there _restore && touch restored; }"
  on all "nohup setsid bash $there _work $(printf '%q ' "$@") > log 2>&1 < /dev/null &
    echo \$! > pid"
  on 0 "BUCKET='$BUCKET' SAVE_SECONDS=$SAVE_SECONDS \
    NAME=$NAME ZONE=$ZONE QUEUED=$QUEUED END_VM=${END_VM:-no} \
    nohup setsid bash $there _save $(printf '%q ' "$@") > save.log 2>&1 < /dev/null &
    echo \$! > save.pid"
}

# On every worker: the command, which outlives the connection that started it.
_work() {
  local code=0
  trap : TERM # when the VM goes down, wait for the command, which saves
  # Without the TPU an error, and no run on the CPU.
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} venv/bin/samrobust "$@" || code=$?
  echo "$code" > code
}

# On worker 0, beside it: copies until the command has ended, and then says how it did,
# in the bucket too. Nobody may be there to hear it, so it ends the bill.
_save() {
  trap '' TERM # a VM that goes down leaves half a minute
  while [ ! -f code ] && kill -0 "$(cat pid)"; do
    sleep "$SAVE_SECONDS"
    _copy || true
  done
  until _copy; do sleep "$SAVE_SECONDS"; done
  cp code saved
  if [ "$END_VM" = yes ] && [[ $(cat code) =~ ^(0|1|2|130)$ ]]; then
    echo "$(cat code) $*" | gcloud storage cp - "$BUCKET.ended" --quiet
    delete # needs the right to: else `up` does it
  fi
}

# The exit code of the command, if it has ended and its VM is gone.
ended() {
  local code words
  read -r code words <<<"$(gcloud storage cat "$BUCKET.ended" 2>/dev/null)" || true
  if [ "$words" = "$*" ]; then echo "$code"; fi
}

# What makes a file count comes after the file: the sums of checkpoints after the rest of
# them and after the logs, those of the last ones after those of the best ones, of which
# they know, and the result after all of them. Nothing is removed before that.
_copy() {
  _snapshot || return
  local later
  for later in '.*/metadata/metadata|.*result\.json' \
    '.*/last/.*/metadata/metadata|.*result\.json' '.*result\.json'; do
    gcloud storage rsync --recursive --exclude="$later" copy "$BUCKET" || return
  done
  gcloud storage rsync --recursive --delete-unmatched-destination-objects copy "$BUCKET"
}

# runs/ as hard links in copy/, which hold still what a run removes meanwhile; again if a
# checkpoint came or went while they were made, or a file could not be linked. In the end
# it fails: what is missing here would be removed there. Claims are of this VM alone.
_snapshot() {
  local before
  for _ in 1 2 3 4 5; do
    before=$(_checkpoints)
    rm -rf copy
    mkdir copy || return
    if (cd runs && find . -name .claim -prune -o -type f -print0 |
      xargs -0 -r cp --link --parents --target-directory=../copy) &&
      [ "$before" = "$(_checkpoints)" ]; then
      cp log copy/worker0.log
      return
    fi
  done
  return 1
}

_checkpoints() { find runs -regex '.*/checkpoints/[a-z]*/[0-9]*' -prune -print | sort; }

# On worker 0 of a new VM: fetches runs/, but for checkpoints that had not arrived whole.
_restore() {
  local folder
  gcloud storage rsync --recursive "$BUCKET" runs
  _checkpoints | while read -r folder; do
    if [ ! -f "$folder/metadata/metadata" ]; then
      say "left out $folder: its copy was cut off"
      rm -rf "$folder"
    fi
  done
}

# new, installed, running, lost (with a restart of the VM), or the command's exit code.
progress() {
  # shellcheck disable=SC2016 # expanded there
  on 0 'if [ -f saved ]; then cat saved
    elif [ ! -f installed ]; then echo new
    elif [ ! -f save.pid ]; then echo installed
    elif kill -0 "$(cat save.pid)" 2>/dev/null; then echo running
    else echo lost; fi' 2>/dev/null || echo unreachable
}

up() {
  local failures=0 is words
  export END_VM=yes
  while [ "$failures" -lt "$MAX_FAILURES" ]; do
    is=$(state)
    if [ "$is" = READY ]; then is=$(progress); fi
    if [ -z "$is" ]; then is=$(ended "$@"); fi
    say "$NAME: ${is:-no VM}"
    case $is in
      "")
        if ! words=$("$0" create 2>&1 | tee /dev/stderr); then
          # One waits for capacity as long as it takes.
          [[ $words == *"no more capacity"* ]] || failures=$((failures + 1))
        fi
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        "$0" delete || failures=$((failures + 1))
        ;;
      new) "$0" install || failures=$((failures + 1)) ;;
      installed | lost | 75) "$0" run "$@" || failures=$((failures + 1)) ;;
      running) failures=0 ;;
      0 | 1 | 2 | 130)
        collect && { [ -z "$(state)" ] || delete; } &&
          { gcloud storage rm "$BUCKET.ended" --quiet || true; } && exit "$is"
        failures=$((failures + 1))
        ;;
      [0-9]*) # it crashed
        failures=$((failures + 1))
        "$0" run "$@" || true
        ;;
      unreachable) failures=$((failures + 1)) ;;
    esac
    sleep "$POLL_SECONDS"
  done
  say "error: $failures failures in a row. The VM may still be there: see status, delete."
  exit 1
}

status() {
  local is
  is=$(state)
  echo "$NAME: ${is:-no VM}"
  [ "$is" != READY ] || on 0 'tail -n 20 log 2>/dev/null || echo "nothing was started"'
}

collect() { mkdir -p runs && gcloud storage rsync --recursive "$BUCKET" runs; }

command=${1:-}
case $command in
  up | create | install | run | status | collect | delete | _restore | _work | _save) ;;
  *) refuse "Expected up, create, install, run, status, collect or delete, got '$command'." ;;
esac
case $command in up | create | run | collect)
  [[ $BUCKET == gs://?*/?* ]] || refuse "Expected BUCKET=gs://BUCKET/FOLDER, got '$BUCKET'." ;;
esac
case $command in up | run)
  [[ " $* " == *" --workdir=runs/"* ]] || refuse "Expected --workdir=runs/..., got: ${*:2}" ;;
esac
"$@"
