# A hospital's SuperNode: carries bytes between the coordinator and the site's socket; it sees no image.
# Build from the repository's root: docker build -f docker/carrier.Dockerfile -t synthward-carrier .
# Not yet run under a Docker engine by us; the full deployment is later work.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY client client
COPY server server
RUN pip install --no-cache-dir --constraint constraints.txt .
ENV FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 UV_OFFLINE=1
RUN groupadd --gid 1500 synthward && useradd --create-home --uid 1502 --gid synthward carrier
USER carrier
VOLUME ["/certificates", "/run/synthward"]
# What the coordinator calls this site when `synthward-site serve` does not answer.
ENV SITE_NAME=site
ENTRYPOINT ["sh", "-c", "exec flower-supernode --node-config \"site=\\\"/run/synthward/site.sock\\\" name=\\\"$SITE_NAME\\\"\" \"$@\"", "carrier"]
CMD ["--superlink", "coordinator:8443", "--root-certificates", "/certificates/ca.crt", "--auth-supernode-private-key", "/certificates/site.key", "--host", "127.0.0.1", "--port", "9091"]
