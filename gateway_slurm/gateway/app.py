"""``jupyter slurm gateway``: the shared deployment, an application on jupyter_server.

It serves kernels, sessions, kernelspecs and allocations to Jupyter servers with ``--gateway-url``, to notebook clients
and to editors. It serves no contents, terminals or files. Its settings are in ``jupyter_slurm_gateway_config.py`` on
Jupyter's config path, or on the command line. The settings of Slurm and of allocations are in
``jupyter_slurm_config.py``, as for every server.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import re
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from jupyter_server.serverapp import ServerApp
from traitlets import CFloat, CInt, Dict, Int, Unicode, default, validate

from gateway_slurm import __version__
from gateway_slurm.errors import StoreError
from gateway_slurm.gateway.audit import AuditLog
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider, http_url
from gateway_slurm.gateway.auth.peer import PeerProof
from gateway_slurm.gateway.channels.websocket import SlurmWebsocketConnection
from gateway_slurm.gateway.clean_log import keep_clean
from gateway_slurm.gateway.door import FREE_BODY, MAX_HEADER, Door, GatewayHTTPServer
from gateway_slurm.gateway.handlers import UnknownHandler
from gateway_slurm.gateway.jupyter_compat import HookedServerApp, set_http_server
from gateway_slurm.gateway.kernel_manager import SlurmMappingKernelManager
from gateway_slurm.gateway.metrics import GatewayCollector
from gateway_slurm.gateway.peers.client import PeerClient
from gateway_slurm.gateway.peers.directory import StoreDirectory
from gateway_slurm.gateway.peers.forward import Forwarder
from gateway_slurm.gateway.peers.peers import Peers
from gateway_slurm.gateway.revocation import OpenWebsockets
from gateway_slurm.gateway.sessions import GatewaySessionManager, NoContents
from gateway_slurm.gateway.slots import UserSlots
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.gateway.systemd import (
    HTTP_SOCKET,
    READY,
    RESPONSE_SOCKET,
    STOPPING,
    ServiceManager,
    passed_sockets,
)
from gateway_slurm.link.endpoints import format_endpoint
from gateway_slurm.service import STANDSTILL_SECONDS, SlurmService

_ALL_ADDRESSES = ("", "*", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
# Each kernel needs some ten descriptors, and each page one. The usual hard limit is far higher.
MAX_OPEN_FILES = 65536
DEPLOYMENT = "gateway"  # unless SlurmService.deployment is set


def _default_is(trait: str, value: Any) -> Any:
    """In the body of a class: another default for a trait of jupyter_server's."""
    return default(trait)(lambda _app: value)


def default_peer_url(app: Any) -> str:
    """The URL of this process, made from its own settings; empty for a Unix socket."""
    if app.sock:
        return ""
    host = socket.getfqdn() if app.ip in _ALL_ADDRESSES else app.ip
    host = "127.0.0.1" if host == "localhost" else host
    return f"{'https' if app.certfile else 'http'}://{format_endpoint(host, app.port)}{app.base_url}"


class SlurmGatewayApp(HookedServerApp):
    """Serves kernels on Slurm's nodes to many users."""

    name = "jupyter-slurm-gateway"
    version = __version__
    description = "The shared gateway: Jupyter kernels on Slurm's compute nodes, for many users."
    examples = """
    jupyter slurm token add alice --tokens=tokens.json
    jupyter slurm gateway --ip=0.0.0.0 --port=8888 --tokens=tokens.json --kernelspecs=/srv/projects
    """
    aliases = {  # noqa: RUF012 - a trait
        "ip": "SlurmGatewayApp.ip",
        "port": "SlurmGatewayApp.port",
        "tokens": "GatewayIdentityProvider.tokens_file",
        "kernelspecs": "GatewayKernelSpecManager.projects_root",
        "certfile": "SlurmGatewayApp.certfile",
        "keyfile": "SlurmGatewayApp.keyfile",
        "base-url": "SlurmGatewayApp.base_url",
        "config": "JupyterApp.config_file",
        "log-level": "Application.log_level",
    }
    flags = {  # noqa: RUF012 - a trait
        "debug": ({"Application": {"log_level": 10}}, "log everything but secrets"),
        "generate-config": ({"JupyterApp": {"generate_config": True}}, "write a config file with every setting"),
        "allow-root": ({"SlurmGatewayApp": {"allow_root": True}}, "run as root, for tests"),
        "kill-kernels": (
            {"SlurmMappingKernelManager": {"kill_kernels_on_exit": True}},
            "end kernels and their jobs with the gateway; otherwise they run on, and the next gateway restores them",
        ),
        "y": ({"JupyterApp": {"answer_yes": True}}, "answer yes to questions instead of asking"),
    }
    subcommands = Dict()
    classes = [  # noqa: RUF012 - a trait
        SlurmMappingKernelManager,
        GatewayKernelSpecManager,
        GatewayIdentityProvider,
        SlurmWebsocketConnection,
    ]
    kernel_manager: SlurmMappingKernelManager
    default_services = ()  # type: ignore[assignment] # mypy sees one of that many
    load_other_extensions = False
    raise_config_file_errors = True
    restores_kernels = True  # while it listens already; see kernel_manager.set_up_server
    _exit_status = 0
    _life: asyncio.Task[None] | None = None
    _rechecking: asyncio.Task[None] | None = None

    port = Int(
        ServerApp.port_default_value,
        config=True,
        help="Port that the gateway listens on (also: the environment variable JUPYTER_PORT). If it is taken, the next "
        "free one of ``port_retries`` ports is used.",
    )
    peer_url = Unicode(
        "",
        config=True,
        help="""URL, with the base URL, at which the other gateways of the deployment reach this process itself, not
        a load balancer. With https the certificate must have the URL's host name. Default: made from ``ip`` (for
        all addresses, this machine's name), ``port`` and ``certfile``; empty with ``sock``, where no other gateway
        can forward requests to it.""",
    )
    peer_cafile = Unicode(
        "",
        config=True,
        help="""File with the certificates of the authorities that sign the other gateways' certificates. Default:
        the system's authorities.""",
    )

    audit_log = Unicode(
        "",
        config=True,
        help="""File for the audit log: which user started, ended or was refused which kernel or allocation, and
        refused logins, as lines of JSON. The gateway creates it with mode 0600, and opens it again when it was moved.
        Default: none.""",
    )
    metrics_max_users = CInt(
        0,
        config=True,
        min=0,
        max=1000,
        help="""Number of users whose kernels ``/metrics`` counts by name, those with the most kernels; the others are
        counted together. Default 0: no names of users are in the metrics.""",
    )

    max_body_size = Int(
        4 << 20,
        min=FREE_BODY,
        config=True,
        help="Largest body of a request (bytes). What users send to kernels comes by websockets and is no body.",
    )
    request_timeout = CFloat(
        20.0,
        min=1.0,
        config=True,
        help="Seconds that a client's new connection may take until the headers of its first request have arrived.",
    )
    body_timeout = CFloat(60.0, min=1.0, config=True, help="Seconds that a request's body may take to arrive.")
    idle_timeout = CFloat(
        75.0,
        min=1.0,
        config=True,
        help="""Seconds that a connection is kept open for the client's next request. A proxy in front of the gateway
        must close its idle connections earlier, as nginx does by default.""",
    )
    recheck_interval = CFloat(
        30.0,
        min=0.5,
        max=50.0,
        config=True,
        help="""Seconds between two checks of the users of open websockets. A websocket is closed whose token was
        removed or has expired, whose user has logged out of the JupyterHub, or whose kernel's owner has left the
        project.""",
    )
    max_unknown_connections = CInt(
        1024,
        min=16,
        config=True,
        help="""Number of connections on which no request had a valid token yet. One more closes the oldest of the
        address that has most, if it is older than a second.
        Those of trusted_proxies, and by a Unix socket, are not counted.""",
    )
    max_unknown_per_address = CInt(
        256, min=4, config=True, help="The same for one client address; in IPv6 for one /64 network."
    )

    @validate("peer_url")
    def _valid_peer_url(self, proposal: Any) -> str:
        return http_url("SlurmGatewayApp.peer_url", proposal["value"])

    # The classes of a gateway. An admin sets their traits, and not the classes.
    _kernel_manager = _default_is("kernel_manager_class", SlurmMappingKernelManager)
    _kernel_spec_manager = _default_is("kernel_spec_manager_class", GatewayKernelSpecManager)
    _session_manager = _default_is("session_manager_class", GatewaySessionManager)
    _contents_manager = _default_is("contents_manager_class", NoContents)
    _identity_provider = _default_is("identity_provider_class", GatewayIdentityProvider)
    _websocket_connection = _default_is("kernel_websocket_connection_class", SlurmWebsocketConnection)
    _services = _default_is("extra_services", ["gateway_slurm.gateway.handlers"])
    _opens_browser = _default_is("open_browser", False)
    # Every request is authenticated by a header, which a browser does not send by itself.
    _remote_access = _default_is("allow_remote_access", True)

    @default("port")
    def _port_default(self) -> int:
        return int(os.getenv(self.port_env, self.port_default_value))

    @default("min_open_files_limit")
    def _default_min_open_files(self) -> int:
        return min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_OPEN_FILES)

    @default("default_url")
    def _default_url(self) -> str:
        return f"{self.base_url}api/spec.json"

    def load_config_file(self, suppress_errors: bool = False) -> None:  # type: ignore[override] # as JupyterApp's
        """Exit on a mistake in the file: the part that was not read may have limits and trusted users."""
        named = self.config_file and Path(self.config_file).expanduser()
        if named and not any(named.with_suffix(suffix).is_file() for suffix in (".py", ".json")):
            self.exit(f"{self.config_file} is no configuration file: --config names one that ends in .py or .json")
        try:
            super().load_config_file(suppress_errors=suppress_errors)
        except Exception as error:  # noqa: BLE001 - the file is code, and may raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if isinstance(error, SyntaxError) else f"{where.filename}, line {where.lineno}: "
            self.exit(f"a configuration file has a mistake: {place}{type(error).__name__}: {error}")

    def init_configurables(self) -> None:
        """Make the service as well, so that a mistake in its settings is found now and not at the first kernel."""
        super().init_configurables()
        self._restore_log = keep_clean(self.log)
        service = SlurmService.instance(self.log)
        self._events = service.events
        service.leave_at_exit = not self.kernel_manager.kill_kernels_on_exit
        self._collector = GatewayCollector(self.kernel_manager, max_users=self.metrics_max_users)
        path = Path(self.audit_log).expanduser()
        self._audit_log = AuditLog(path, service.events, self.log) if self.audit_log else None
        if isinstance(self.identity_provider, GatewayIdentityProvider):
            self.identity_provider.report_to(service.events)
        self._service_manager = ServiceManager()
        sockets = passed_sockets()
        self.http_sockets, service.response_sockets = sockets[HTTP_SOCKET], sockets[RESPONSE_SOCKET]
        for port in [name[1] for sock in self.http_sockets if isinstance(name := sock.getsockname(), tuple)]:
            self.port = port
        # The loop runs this first.
        self.io_loop.add_callback(self._restore)

    async def _restore(self) -> None:
        """Restore the earlier gateway's kernels; stop if the store cannot be used."""
        loops = SlurmService.instance(self.log).loops
        self._life = asyncio.ensure_future(self._service_manager.show_life(loops, STANDSTILL_SECONDS))
        self._rechecking = asyncio.ensure_future(self.open_websockets.watch(self.recheck_interval))
        restorer = self.kernel_manager.restorer
        await restorer.restore(DEPLOYMENT, on_retry=self._service_manager.extend)
        if isinstance(restorer.failure, StoreError):
            self.log.critical("the gateway cannot be started: %s", restorer.failure)
            self._exit_status = 1
            self.stop()
        else:
            self._service_manager.notify(READY)

    def start(self) -> None:
        """Serve until a signal, or ``stop``."""
        faulthandler.enable()  # systemd's watchdog sends SIGABRT: the log then says where each thread stood
        gc.freeze()  # no full collection, which stops all users for 20 to 50 ms, examines the imported modules
        super().start()
        if self._exit_status:
            self.exit(self._exit_status)

    def init_signal(self) -> None:
        """Without a terminal, SIGINT ends the server as SIGTERM does; with one, jupyter_server asks the user."""
        super().init_signal()
        if not (sys.stdin and sys.stdin.isatty()):
            signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))

    async def cleanup_kernels(self) -> None:
        """End the kernels or leave them running, by ``kill_kernels_on_exit``; then close the audit log."""
        await self.kernel_manager.shutdown_all()
        self._events.emit("gateway_stopped", version=__version__)
        if self._audit_log is not None:
            self._audit_log.close()

    def init_webapp(self) -> None:
        """Make the forwarder of requests to other gateways as well, for the handlers."""
        super().init_webapp()
        directory = StoreDirectory(SlurmService.instance())
        proof = PeerProof(lambda: directory.peer_key, lambda: directory.server_id)
        if isinstance(self.identity_provider, GatewayIdentityProvider):
            self.identity_provider.peers = proof
        peers = Peers(directory, log=self.log)
        self.forwarder = Forwarder(peers, PeerClient(proof, self.peer_cafile))
        self.web_app.settings["forwarder"] = self.forwarder
        self.web_app.settings["user_slots"] = UserSlots()
        outside = (rf"(?!{re.escape(self.base_url)}).*", UnknownHandler)
        self.web_app.add_handlers(r".*$", [outside])
        provider, specs = self.identity_provider, self.kernel_spec_manager
        assert isinstance(provider, GatewayIdentityProvider)
        assert isinstance(specs, GatewayKernelSpecManager)
        self.open_websockets = OpenWebsockets(provider, specs, self.kernel_manager, self.log)
        self.web_app.settings["open_websockets"] = self.open_websockets

    def make_door(self) -> Door:
        """What decides on the connections and bodies of clients."""
        provider = self.identity_provider
        assert isinstance(provider, GatewayIdentityProvider)
        door = Door(
            self.web_app,
            provider.find_user,
            max_body_size=self.max_body_size,
            request_timeout=self.request_timeout,
            max_unknown=self.max_unknown_connections,
            max_unknown_per_address=self.max_unknown_per_address,
            log=self.log,
            is_proxy=provider.is_proxy,
            budget=self.kernel_manager.budget,
        )
        provider.on_user = door.admit
        return door

    def init_httpserver(self) -> None:
        """Serve through a door. Put this gateway's URL on record for the others: from here on its port is known."""
        super().init_httpserver()
        if isinstance(self.identity_provider, GatewayIdentityProvider):
            server = GatewayHTTPServer(
                self.make_door(),
                ssl_options=self.ssl_options,
                xheaders=self.trust_xheaders,
                max_header_size=MAX_HEADER,
                max_body_size=self.max_body_size,
                max_buffer_size=self.max_buffer_size,
                idle_connection_timeout=self.idle_timeout,
                body_timeout=self.body_timeout,
            )
            set_http_server(self, server)
        url = SlurmService.instance().url = self.peer_url or default_peer_url(self)
        self._events.emit("gateway_started", url=url or self.sock, version=__version__)

    def find_server_extensions(self) -> None:
        """Load no installed extension: all users could reach its handlers."""

    async def cleanup_extensions(self) -> None:
        """Close the collector, the forwarder, the threads that read kernelspecs, and the identity provider."""
        self._service_manager.notify(STOPPING)
        await super().cleanup_extensions()
        for task in (self._life, self._rechecking):
            if task is not None:
                task.cancel()
        self._collector.close()
        self.forwarder.close()
        self._restore_log()
        if isinstance(self.kernel_spec_manager, GatewayKernelSpecManager):
            self.kernel_spec_manager.reader.close()
        if isinstance(self.identity_provider, GatewayIdentityProvider):
            self.identity_provider.close()

    def running_server_info(self, kernel_count: bool = True) -> str:
        return f"gateway_slurm {__version__} is at {self.connection_url}"

    def write_browser_open_files(self) -> None:
        """Write none: no browser opens a gateway."""

    def write_server_info_file(self) -> None:
        """Write none: ``jupyter server list`` lists a user's own servers."""
