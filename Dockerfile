# An image for GPU nodes. PyTorch's wheel brings CUDA's libraries and the host brings the driver; torch.compile and Triton
# need a C compiler and Python's headers.
#   docker build --build-arg COMMIT="$(git describe --always --dirty --abbrev=40)" -t scaling-testbed .
#   mkdir -p runs data
#   docker run --rm --gpus all --shm-size=1g --user "$(id -u):$(id -g)" \
#     -v "$PWD/runs:/work/runs" -v "$PWD/data:/work/data" scaling-testbed \
#     scaling-testbed train model=nano_s budget.steps=200
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The dependencies: a layer that only these two files change. The package itself is installed below.
WORKDIR /work
COPY pyproject.toml constraints.txt ./
RUN touch README.md LICENSE \
    && pip install --no-cache-dir -c constraints.txt '.[analysis,export,wandb]' \
    && pip uninstall --yes scaling-testbed

COPY . .
RUN pip install --no-cache-dir --no-deps -e .

# Any user may write here, so that --user with the host's id works; caches of Triton and PyTorch lie under HOME.
RUN useradd --create-home testbed && mkdir -p runs data && chmod 777 /work /work/runs /work/data /home/testbed
USER testbed
ENV HOME=/home/testbed USER=testbed

# The build context has no .git; a run records this commit.
ARG COMMIT=
ENV SCALING_TESTBED_COMMIT=$COMMIT
CMD ["scaling-testbed", "--help"]
