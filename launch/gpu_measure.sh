#!/usr/bin/env bash
# Measures a machine with one GPU, in the order of what is missed most, for as long as it
# is there: launch/gpu_measure.sh --bundle=DIR --workdir=DIR [--budget=SECONDS]. Wants a
# Python with jax, flax, optax and orbax-checkpoint, PyTorch for the comparison, no
# network, and what launch/gpu_bundle.sh put into the bundle. Ends within SECONDS, 560
# where none are given; started again it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m launch.gpu_measure "$@"
