"""What runs at the coordinator for as long as the deployment lasts: Flower's SuperLink, and the proxy before it.

SPDX-License-Identifier: Apache-2.0

Flower's control API has no login and shares the SuperLink's port, so that port stays on loopback. Hospitals reach
/v1/fleet/ alone, through nginx; there Flower asks every carrier for the signature of a key that was admitted.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from common.errors import DataError, FederationError
from common.files import atomic_write
from common.locks import held
from common.supervision import Kept, Program
from server.deployment.certificates import days_left
from server.deployment.folder import Deployment, command
from server.deployment.nodes import register_admitted

_LOOK_SECONDS = 0.5
_WARN_DAYS = 30
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")  # not on every user's path
_PROXY = """\
# Written by `synthward deploy up`; changes are lost.
daemon off;
worker_processes 1;
pid "{state}/nginx.pid";
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path "{state}/body";
    proxy_temp_path "{state}/proxy";
    fastcgi_temp_path "{state}/fastcgi";
    uwsgi_temp_path "{state}/uwsgi";
    scgi_temp_path "{state}/scgi";
    client_max_body_size 16m;  # Flower sends pieces of 5 MB, and reads them before it looks at their signature
    limit_conn_zone $binary_remote_addr zone=hospitals:1m;
    limit_conn hospitals 64;
    client_body_timeout 60s;
    server {{
        listen {listen} ssl;
        ssl_certificate "{folder}/server.crt";
        ssl_certificate_key "{folder}/server.key";
        ssl_protocols TLSv1.2 TLSv1.3;
        # What Flower gets is what stands here: nginx's own reading of it, which decodes and shortens, is another.
        if ($request_uri !~ "^/v1/fleet/[a-z-]+$") {{ return 403; }}
        location /v1/fleet/ {{
            limit_except POST {{ deny all; }}
            proxy_pass https://127.0.0.1:{superlink};
            proxy_http_version 1.1;
            proxy_set_header Host localhost;  # Flower reads the path out of a URL that begins with it
            proxy_set_header X-Forwarded-For "";
            proxy_set_header X-Forwarded-Proto "";
            proxy_set_header Connection "";
            proxy_request_buffering off;  # nothing of a model is written here, and nothing waits to be whole
            proxy_max_temp_file_size 0;
            proxy_ssl_trusted_certificate "{folder}/authority.crt";
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
        }}
        location / {{ return 403; }}
    }}
}}
"""


def up(deployment: Deployment, stop: threading.Event, tell: Callable[[str], None]) -> None:
    """Run the services until `stop` is set.

    Args:
        tell: shown what happens, one line each.

    Raises:
        DataError: a port is taken, the certificate has expired, nginx is missing, or the services run already.
        StorageError: the folder cannot be written.
    """
    busy = DataError("its services run already", where=str(deployment.path), remedy="Stop those first.")
    (deployment.path / "state").mkdir(exist_ok=True)
    with held(deployment.path / "state" / "up.lock", busy=busy):
        _warn_of_expiry(deployment, tell)
        _require_fitting_key(deployment)
        require_path_without_blanks()
        deployment.write_flower_settings()  # port or folder may be others than they were
        addresses = deployment.addresses
        for host, port in ((addresses.listen, addresses.port), ("127.0.0.1", addresses.superlink_port)):
            _require_free(host, port, deployment.path)
        services = [Kept(program, tell) for program in (_superlink(deployment), _proxy(deployment))]
        try:
            _keep(deployment, services, stop, tell)
        finally:
            for service in reversed(services):
                service.end()


def _keep(
    deployment: Deployment, services: list[Kept], stop: threading.Event, tell: Callable[[str], None]
) -> None:  # fmt: skip
    """Look after the services; whenever the SuperLink has started, tell it whom it may let in."""
    known, ready, warned = None, False, ""
    while not stop.wait(_LOOK_SECONDS):
        for service in services:
            service.look()
        superlink = services[0]
        if superlink.runs and superlink.pid != known and listens("127.0.0.1", deployment.addresses.superlink_port):
            try:
                register_admitted(deployment, tell)
            except FederationError as error:  # it is about to end again, or still busy
                if error.what != warned:
                    warned = error.what
                    tell(f"warning: {error.what}")
                continue
            known = superlink.pid
        if not ready and known is not None and listens(reached(deployment), deployment.addresses.port):
            ready = True
            tell(f"ready: hospitals reach this machine as {deployment.addresses.host}:{deployment.addresses.port}")


def _superlink(deployment: Deployment) -> Program:
    path = deployment.path
    arguments = (
        "--host", "127.0.0.1", "--port", str(deployment.addresses.superlink_port),
        "--ssl-ca-certfile", str(deployment.authority), "--ssl-certfile", str(deployment.certificate),
        "--ssl-keyfile", str(path / "server.key"), "--enable-supernode-auth",
        "--database", str(path / "state" / "superlink.db"), "--disable-runtime-dependency-installation",
    )  # fmt: skip
    superlink, log = str(command("flower-superlink")), path / "state" / "superlink.log"
    return Program("the SuperLink", lambda: (superlink, *arguments), deployment.environment(), log)


def _proxy(deployment: Deployment) -> Program:
    found = nginx()
    addresses, state = deployment.addresses, deployment.path / "state" / "proxy"
    state.mkdir(parents=True, exist_ok=True)
    host = f"[{addresses.listen}]" if ":" in addresses.listen else addresses.listen
    text = _PROXY.format(
        state=state, folder=deployment.path, listen=f"{host}:{addresses.port}", superlink=addresses.superlink_port
    )
    file = state / "nginx.conf"
    atomic_write(file, text.encode())
    arguments = (str(found), "-c", str(file), "-e", "stderr")
    return Program("the proxy", lambda: arguments, deployment.environment(), deployment.path / "state" / "proxy.log")


def nginx() -> Path:
    """Where nginx is.

    Raises:
        DataError: nowhere.
    """
    found = shutil.which("nginx") or next((f"{p}/nginx" for p in _PLACES if Path(p, "nginx").exists()), None)
    if found is None:
        raise DataError("no nginx on this machine", remedy="Install it, as with: apt install nginx-light")
    return Path(found)


def listens(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def reached(deployment: Deployment) -> str:
    """By which address this machine reaches its own proxy."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(deployment.addresses.listen, deployment.addresses.listen)


def _require_free(host: str, port: int, folder: Path) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DataError(
                f"port {port} cannot be used ({error.strerror})", where=f"{folder}/deployment.toml",
                remedy="End what uses it, or give another port there, and with `deploy ship` a new invitation.",
            ) from error  # fmt: skip


def require_path_without_blanks() -> None:
    """See that Flower can make its database: alembic takes the path of its scripts apart at every blank.

    Raises:
        DataError: Flower is installed under a path with a blank.
    """
    spec = find_spec("flwr")
    path = str(spec.origin) if spec is not None else ""
    if " " in path:
        raise DataError("Flower's SuperLink does not run from a path with a blank", where=path,
                        remedy="Install synthward in another folder, as /opt/synthward.")  # fmt: skip


def _require_fitting_key(deployment: Deployment) -> None:
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(deployment.certificate, deployment.path / "server.key")
    except (OSError, ssl.SSLError) as error:
        raise DataError("is no key, or not of the certificate beside it", where=str(deployment.path / "server.key"),
                        remedy=f"Run: synthward deploy renew {deployment.quoted}") from error  # fmt: skip


def _warn_of_expiry(deployment: Deployment, tell: Callable[[str], None]) -> None:
    days = days_left(deployment.certificate)
    renew = f"synthward deploy renew {deployment.quoted}"
    if days < 0:
        raise DataError("the certificate has expired", where=str(deployment.certificate), remedy=f"Run: {renew}")
    if days < _WARN_DAYS:
        tell(f"warning: the certificate expires in {days:.0f} days; renew it with: {renew}")
