# The coordinator: Flower's SuperLink, to which `flwr run` submits the study. Build from the repository's root:
#   docker build -f docker/server.Dockerfile -t synthward-server .
# Not yet run under a Docker engine by us; the full deployment is later work.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY server server
COPY client client
COPY configs configs
RUN pip install --no-cache-dir --constraint constraints.txt .
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 UV_OFFLINE=1
RUN useradd --create-home coordinator && mkdir /state /runs && chown coordinator /state /runs
USER coordinator
VOLUME ["/state", "/runs", "/certificates"]
EXPOSE 8443
ENTRYPOINT ["flower-superlink"]
CMD ["--host", "0.0.0.0", "--port", "8443", "--ssl-ca-certfile", "/certificates/ca.crt", "--ssl-certfile", "/certificates/server.pem", "--ssl-keyfile", "/certificates/server.key", "--enable-supernode-auth", "--database", "/state/state.db", "--disable-runtime-dependency-installation"]
