# For GPU nodes: CUDA's runtime libraries come with PyTorch's wheel, the driver from the host, a C compiler for
# torch.compile and Triton from here.
#   docker build -t scaling-testbed .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" -v "$PWD/data:/work/data" scaling-testbed \
#     .venv/bin/python -m scaling_testbed.train
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
RUN make setup
CMD ["make", "test"]
