# segkit at the versions it was last tested with. As in the Makefile, torch goes first and alone; on
# Linux it brings CUDA, and for a machine without a GPU:
#
#     docker build --build-arg TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" --tag segkit .
#     docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/data" segkit check my_dataset
FROM python:3.11-slim

# Triton compiles the kernels of a GPU with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG TORCH_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/segkit
COPY constraints.txt ./
RUN pip install torch -c constraints.txt $TORCH_ARGS
COPY pyproject.toml README.md LICENSE ./
COPY segkit ./segkit
RUN pip install ".[demo,report,openvino]" -c constraints.txt

# Whoever runs it: matplotlib and compiled engines keep their caches where anyone may write.
ENV HOME=/tmp
WORKDIR /data
ENTRYPOINT ["segkit"]
CMD ["--help"]
