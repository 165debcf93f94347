# Build:  docker build -t vlmtrain .
# Run:    docker run --gpus all --ipc host -v "$PWD/data:/data" -v "$PWD/runs:/work/runs" vlmtrain \
#           torchrun --standalone --nproc_per_node 8 -m vlmtrain.train recipe=llava_1_5 data.images=/data/...
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir build==1.* \
 && /opt/build/bin/python -m build --wheel --outdir /wheels

# The compiler is kept: DeepSpeed builds its offloading kernels on first use.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv g++ \
 && rm -rf /var/lib/apt/lists/* && useradd --create-home --uid 10001 vlmtrain
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN python3 -m venv /opt/vlmtrain \
 && /opt/vlmtrain/bin/pip install --no-cache-dir -c /wheels/constraints.txt /wheels/*.whl
ENV PATH="/opt/vlmtrain/bin:$PATH"
USER vlmtrain
WORKDIR /work
CMD ["vlmtrain", "--help"]
