#!/usr/bin/env bash
# Written, not run on Google Cloud; tests/packaging/test_deployment.py runs it with a
# stand-in for gcloud.
#
#   NAME=jaxrl ZONE=us-west4-a IMAGE=... examples/tpu/train.sh CONFIG.yaml [--section.key VALUE ...]
#
# Starts the same command on every host of the slice, in the image of
# docker/tpu.Dockerfile; the processes find each other. SHARED (/mnt/shared) is a folder
# of every host that all share, such as a mounted Filestore: relative paths of the
# configuration begin there, and so do downloaded models and the token for them
# (SHARED/huggingface/token). `docker stop --time 180 jaxrl` on any host stops the run,
# which saves; the same command again goes on from the newest checkpoint.
set -euo pipefail
: "${NAME:?what the slice is called}" "${ZONE:?the zone of Google Cloud}"
: "${IMAGE:?the image of docker/tpu.Dockerfile}"
: "${1:?usage: train.sh CONFIG.yaml [--section.key VALUE ...]}"

printf -v command '%q ' sudo docker run --rm --init --name jaxrl --privileged \
  --net=host --volume "${SHARED:-/mnt/shared}:/runs" --env HF_HOME=/runs/huggingface \
  "$IMAGE" train "$@"
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all \
  --command "$command"
