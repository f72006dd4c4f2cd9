"""The service on Ray Serve: as many processes as asked for, behind one address."""

import logging
import os
import threading
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from lrurec_dist.errors import WorkersError
from lrurec_dist.reporting import say
from lrurec_dist.serve.http_door import Application
from lrurec_dist.serve.http_server import Plan, address, build_application
from lrurec_dist.signals import interrupt, on_sigterm

NAME = "lrurec"


class Replica:
    """A process of the service."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __serve_build_asgi_app__(self) -> Application:  # Ray Serve calls it so
        return build_application(self._plan)


def run_on_ray(plan: Plan) -> None:
    """Serve until a KeyboardInterrupt on the cluster that RAY_ADDRESS names, or on a Ray of this job's own.

    Raises:
        WorkersError: the processes of the service do not start; their reason is in the message.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    settings = plan.settings
    ray_address = os.environ.get("RAY_ADDRESS") or "local"
    # Logical CPUs: one a replica. What Ray Serve itself runs asks for none.
    options: dict[str, Any] = {"address": ray_address, "logging_level": "ERROR", "log_to_driver": False}
    if ray_address == "local":
        options["num_cpus"] = max(os.cpu_count() or 1, settings.replicas)
    try:
        with on_sigterm(interrupt):  # Ray puts an answer of its own there, which goes with the context
            ray.init(**options)
        _start(plan)
        say(f"serve: {address(settings, settings.port)}")
        threading.Event().wait()
    finally:
        if ray.is_initialized():
            if ray_address == "local":
                serve.shutdown()
            else:  # others may serve there, too
                serve.delete(NAME)
            ray.shutdown()


def _start(plan: Plan) -> None:
    settings = plan.settings
    # A replica has to be given as many requests as it may gather.
    deployment = serve.deployment(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_waiting,
        ray_actor_options={"num_cpus": 1},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(serve.ingress()(Replica))
    try:
        # Only this machine listens: `serve.host` is an address of its own.
        serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
        serve.run(deployment.bind(plan), name=NAME, route_prefix="/")
    except (RuntimeError, TimeoutError, RayError) as error:
        raise WorkersError(
            f"serve.runner=ray: the service did not start: {error}; run the same command again, or serve.runner=process"
        ) from None
