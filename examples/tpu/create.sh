#!/usr/bin/env bash
# Written, not run on Google Cloud; tests/packaging/test_deployment.py runs it with a
# stand-in for gcloud.
#
#   NAME=jaxrl ZONE=us-west4-a examples/tpu/create.sh
#
# Asks for a TPU slice and waits until it is there: 16 chips of v5e if TYPE and RUNTIME
# say nothing else. `examples/tpu/train.sh` then trains on it;
# `gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force` ends it.
set -euo pipefail
: "${NAME:?what to call the slice}" "${ZONE:?the zone of Google Cloud}"

gcloud compute tpus queued-resources create "$NAME" \
  --node-id "$NAME" \
  --zone "$ZONE" \
  --accelerator-type "${TYPE:-v5litepod-16}" \
  --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}"

while true; do
  state=$(gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" \
    --format 'value(state.state)')
  echo "$NAME: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) exit 1 ;;
  esac
  sleep "${EVERY:-30}"
done
