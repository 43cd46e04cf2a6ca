# A hospital's site: Flower's SuperNode with the site file mounted at /site. Build from the repository's root:
#   docker build -f docker/client.Dockerfile -t synthward-site .
# Not yet run under a Docker engine by us; the full deployment is later work.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY client client
COPY server server
RUN pip install --no-cache-dir --constraint constraints.txt .
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 UV_OFFLINE=1 OMP_WAIT_POLICY=passive
RUN useradd --create-home site
USER site
VOLUME ["/site", "/certificates"]
ENTRYPOINT ["flower-supernode"]
CMD ["--superlink", "coordinator:8443", "--root-certificates", "/certificates/ca.crt", "--auth-supernode-private-key", "/certificates/site.key", "--node-config", "site=\"/site/site.toml\"", "--host", "127.0.0.1", "--port", "9091"]
