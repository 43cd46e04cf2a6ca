# A hospital's own process: site file and images mounted at /site, answers on a socket under /run/synthward, no network.
# Build from the repository's root: docker build -f docker/client.Dockerfile -t synthward-site .
# Not yet run under a Docker engine by us; the full deployment is later work.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY client client
COPY server server
RUN pip install --no-cache-dir --constraint constraints.txt .
ENV OMP_WAIT_POLICY=passive
# Both containers of a site have the group `synthward`, which may open the socket; only this user may read /site.
RUN groupadd --gid 1500 synthward && useradd --create-home --uid 1501 --gid synthward site && install -d -o site -g synthward -m 2710 /run/synthward
USER site
VOLUME ["/site", "/run/synthward"]
ENTRYPOINT ["synthward-site"]
CMD ["serve", "/site/site.toml", "--sockets", "/run/synthward"]
