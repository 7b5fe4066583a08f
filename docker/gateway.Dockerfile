# The gateway alone, without torch and vLLM, in front of workers that run elsewhere. From the repository's top:
#
#   docker build -f docker/gateway.Dockerfile -t galley-gateway .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/galley.yaml:/etc/galley/galley.yaml:ro" galley-gateway

FROM python:3.11-slim-bookworm AS builder
WORKDIR /src
COPY LICENSE README.md pyproject.toml requirements.lock ./
COPY kernels kernels
COPY plugins plugins
COPY server server
# A venv without pip, so that the image cannot install anything once it is built.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/galley \
    && python -m pip --python /opt/galley/bin/python install --constraint requirements.lock .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --create-home galley
COPY --from=builder /opt/galley /opt/galley
COPY docker/healthcheck.py /opt/galley/healthcheck.py
COPY docker/galley.yaml /etc/galley/galley.yaml
ENV PATH=/opt/galley/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/galley
EXPOSE 8000
# Live, not ready: a gateway whose workers are away still answers, with 503, and a restart would not bring them back.
HEALTHCHECK --interval=5s --timeout=10s --start-period=30s --retries=3 \
    CMD ["python", "/opt/galley/healthcheck.py", "8000", "/health/live"]
ENTRYPOINT ["galley"]
CMD ["gateway", "/etc/galley/galley.yaml", "--host", "0.0.0.0"]
