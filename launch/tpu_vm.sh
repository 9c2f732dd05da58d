#!/usr/bin/env bash
# A samrobust command on Cloud TPU VMs, one host or a slice of many, through gcloud:
#
#   export NAME=sam ZONE=us-central1-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh up train --config=configs/cifar10.py:sam,rho=0.2 --workdir=gs://my-bucket/sam
#
#   up COMMAND ...   create, install, run, delete; after a preemption all of it again, from
#                    the last checkpoint. It may be stopped and called again: the VM works
#                    on, and deletes itself when it is done.
#   create           make the VM                install   bring the last commit there
#   run COMMAND ...  start the command there    status    of the VM, with the log's end
#   delete           the VM; the bucket stays
#
# The workdir lies in a bucket, gs://BUCKET/FOLDER, where all is that a run leaves. Beside
# it, in gs://BUCKET/FOLDER.vm, are the workers' logs and the compiled programs, with which
# the next VM starts sooner.
set -euo pipefail

# --- Edit here, or set the variables. ---
NAME=${NAME:-samrobust}
ZONE=${ZONE:-us-central1-a}
TYPE=${TYPE:-v5litepod-16}              # gcloud compute tpus accelerator-types list
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # gcloud compute tpus versions list
DATA=${DATA:-}                          # gs://... of TFDS's prepared data; else downloaded
SPOT=${SPOT:-yes}                       # yes: cheaper, can be preempted
QUEUED=${QUEUED:-yes}                   # yes: wait in Google's queue for capacity
CREATE_FLAGS=${CREATE_FLAGS:-}          # as --network=NAME --service-account=ACCOUNT
SSH_FLAGS=${SSH_FLAGS:-}                # as --internal-ip, or --tunnel-through-iap
PYTHON=${PYTHON:-3.12}                  # that of the image
LOG_SECONDS=${LOG_SECONDS:-60}          # between two copies of the logs
POLL_SECONDS=${POLL_SECONDS:-30}
MAX_FAILURES=${MAX_FAILURES:-20} # of calls in a row, or crashes in all
# ---

say() { echo "tpu_vm.sh: $*" >&2; }
refuse() { say "error: $*"; exit 2; }
vm() { gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
queued() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" --quiet "${@:2}"; }
# shellcheck disable=SC2086 # several flags
on() { vm ssh --worker="$1" --command="$2" $SSH_FLAGS; }

create() {
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
    uv pip install -q --python venv -e 'samrobust[tpu,gcs]'
    mkdir -p data
    [ -z '$DATA' ] || gcloud storage rsync --recursive '$DATA' data"
  on 0 'touch installed' # all of them are
}

run() {
  # What a crash left at work would hold the chips.
  # shellcheck disable=SC2016 # expanded there
  on all 'group=$(cat pid 2>/dev/null)
    if grep -qs tpu_vm.sh "/proc/$group/cmdline"; then kill -KILL -- "-$group"; fi
    rm -f code'
  on all "NAME=$NAME ZONE=$ZONE QUEUED=$QUEUED LOG_SECONDS=$LOG_SECONDS \
    END_VM=${END_VM:-no} nohup setsid bash samrobust/launch/tpu_vm.sh _work \
    $(printf '%q ' "$@") > log 2>&1 < /dev/null &
    echo \$! > pid"
}

# On every worker: the command, which outlives the connection that started it. What it
# leaves is in the bucket by then, and nobody may be there to hear that it has ended: so
# it says how it did there, too, and ends the bill.
_work() {
  local code=0
  trap : TERM # when the VM goes down, wait for the command, which saves
  while sleep "$LOG_SECONDS"; do _keep_log; done &
  # Without the TPU an error, and no run on the CPU.
  JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} TFDS_DATA_DIR=$HOME/data \
    JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$BESIDE/xla} \
    venv/bin/samrobust "$@" || code=$?
  { kill $! && wait $!; } 2>/dev/null || true
  _keep_log
  echo "$code" > code
  # On worker 0, which alone has `installed`.
  if [ "$END_VM" = yes ] && [ -f installed ] && [[ $code =~ ^(0|1|2|130)$ ]]; then
    echo "$code $*" | gcloud storage cp - "$BESIDE/ended" --quiet
    delete || true # needs the right to: else `up` does it
  fi
}

_keep_log() { gcloud storage cp - "$BESIDE/$HOSTNAME.log" --quiet < log || true; }

# The exit code of the command, if it has ended and its VM is gone.
ended() {
  local code words
  read -r code words <<<"$(gcloud storage cat "$BESIDE/ended" 2>/dev/null)" || true
  if [ "$words" = "$*" ]; then echo "$code"; fi
}

# new, installed, running, lost (with a restart of the VM), or the command's exit code.
progress() {
  # shellcheck disable=SC2016 # expanded there
  on 0 'if [ -f code ]; then cat code
    elif [ ! -f installed ]; then echo new
    elif [ ! -f pid ]; then echo installed
    elif kill -0 "$(cat pid)" 2>/dev/null; then echo running
    else echo lost; fi' 2>/dev/null || echo unreachable
}

up() {
  local failures=0 crashes=0 is words
  export END_VM=yes
  while [ "$failures" -lt "$MAX_FAILURES" ] && [ "$crashes" -lt "$MAX_FAILURES" ]; do
    is=$(state)
    if [ "$is" = READY ]; then is=$(progress); fi
    if [ -z "$is" ]; then is=$(ended "$@"); fi
    say "$NAME: ${is:-no VM}"
    case $is in
      "")
        if ! words=$("$0" create 2>&1 | tee /dev/stderr); then
          case $words in
            *"no more capacity"*) ;; # one waits as long as it takes
            *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT* | *[Qq]uota*)
              refuse "Expected the right, the quota and the names for a VM, see above." ;;
            *) failures=$((failures + 1)) ;;
          esac
        fi
        ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        "$0" delete || failures=$((failures + 1))
        ;;
      new) "$0" install || failures=$((failures + 1)) ;;
      installed | lost | 75) "$0" run "$@" || failures=$((failures + 1)) ;;
      running) failures=0 ;;
      0 | 1 | 2 | 130)
        { [ -z "$(state)" ] || delete; } &&
          { gcloud storage rm "$BESIDE/ended" --quiet || true; } && exit "$is"
        failures=$((failures + 1))
        ;;
      [0-9]*) # it crashed
        crashes=$((crashes + 1))
        [ "$crashes" -ge "$MAX_FAILURES" ] || "$0" run "$@" || failures=$((failures + 1))
        ;;
      unreachable) failures=$((failures + 1)) ;;
    esac
    sleep "$POLL_SECONDS"
  done
  say "error: $failures failures in a row, $crashes crashes." \
    "The VM may still be there: see status, delete."
  exit 1
}

status() {
  local is
  is=$(state)
  echo "$NAME: ${is:-no VM}"
  [ "$is" != READY ] || on 0 'tail -n 20 log 2>/dev/null || echo "nothing was started"'
}

command=${1:-}
case $command in
  up | create | install | run | status | delete | _work) ;;
  *) refuse "Expected up, create, install, run, status or delete, got '$command'." ;;
esac
case $command in up | run | _work)
  [[ " $* " =~ \ --workdir=(gs://[^/ ]+/[^ ]*[^/ ])/?\  ]] ||
    refuse "Expected --workdir=gs://BUCKET/FOLDER, got: ${*:2}"
  BESIDE=${BASH_REMATCH[1]}.vm
  ;;
esac
"$@"
