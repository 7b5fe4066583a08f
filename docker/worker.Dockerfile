# One worker on a CPU: vLLM's OpenAI server with Galley's plugins. From the repository's top:
#
#   docker build -f docker/worker.Dockerfile -t galley-worker .
#   docker run --rm --shm-size=1g -p 127.0.0.1:8001:8001 -v galley-cache:/cache galley-worker
#
# Shared memory: vLLM's processes hand tensors to each other through /dev/shm, of which a container has 64 MB by
# default. --shm-size=1g is enough for one worker; --ipc=host does as well, and shares the host's.

FROM python:3.11-slim-bookworm AS builder
WORKDIR /src
COPY LICENSE README.md install.sh pyproject.toml requirements.lock ./
COPY kernels kernels
COPY plugins plugins
COPY server server
# install.sh leaves a link to this folder, which the final stage does not have: the second command puts the packages
# themselves in its place.
RUN --mount=type=cache,target=/root/.cache/pip \
    GALLEY_DEVICE=cpu ./install.sh /opt/galley worker \
    && /opt/galley/bin/pip install --no-deps --no-build-isolation --force-reinstall .

FROM python:3.11-slim-bookworm
# g++: kernels are built for the processor at hand when they are first used, and `compile: on` writes C++ of its own.
# libnuma1: vLLM's CPU kernels are linked to it.
# libtcmalloc-minimal4: the worker preloads this allocator, which many small tensors gain from.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home galley \
    && install -d -o galley -g galley /cache
COPY --from=builder /opt/galley /opt/galley
COPY docker/healthcheck.py /opt/galley/healthcheck.py
# /cache is for a volume. The built-in model is unpacked there at the first start, which takes seconds, and not at build
# time: the image has its compressed weights already, and the volume is wanted in any case, for what torch.compile made
# (a minute's work) and for models from a hub.
ENV PATH=/opt/galley/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache
USER 10001:10001
WORKDIR /home/galley
EXPOSE 8001
# A large model may load for a quarter of an hour before failures count; the first success ends the start period.
HEALTHCHECK --interval=10s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python", "/opt/galley/healthcheck.py", "8001", "/health"]
ENTRYPOINT ["galley"]
CMD ["worker", "--host", "0.0.0.0", "--port", "8001"]
