"""HTTP server of tools/app.py: routes, limits, security headers.

An image is sent as the raw body of a request. It is neither parsed as a form nor written to a file. The body is read in
chunks, and refused once it is too large. Predictions run in a thread, one at a time, in the order of the requests.
"""

import socket
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from sepvit_lib.common.errors import UserError, out_of_memory
from tools.page.predictors import Predictor, read_upload
from tools.page.samples import Sample

STATIC = Path(__file__).resolve().parent / "static"
MAX_BYTES = 20 * 2**20  # per image file
MAX_CONNECTIONS = 64  # simultaneous ones; further requests get status 503
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
HEADERS = {
    # The browser loads nothing from other servers, even if a class name contains HTML.
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class Service:
    """Handles the page's requests.

    Attributes:
        predictor: the network.
        samples: the sample images, by name.
        worker: limiter that allows one prediction at a time.
    """

    predictor: Predictor
    samples: Mapping[str, Sample]
    worker: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    async def about(self, request: Request) -> Response:
        """Respond with a description of the network and its samples."""
        content: dict[str, Any] = {name: getattr(self.predictor, name) for name in ("kind", "facts", "note")}
        samples = [dict(name=name, label=sample.label) for name, sample in self.samples.items()]
        return JSONResponse({**content, "samples": samples, "max_bytes": MAX_BYTES})

    async def sample(self, request: Request) -> Response:
        """Respond with a sample image."""
        sample = self.samples.get(request.path_params["name"])
        if sample is None:
            return refusal(404, "There is no such sample.")
        return Response(sample.content, media_type="image/png")

    async def predict(self, request: Request) -> Response:
        """Respond with the prediction for the image in the request's body."""
        if not is_own_page(request):
            return refusal(403, "Requests from other sites are refused.")
        try:
            content = await read_body(request)
        except ClientDisconnect:
            return Response(status_code=204)
        if content is None:
            return refusal(413, f"The file is larger than {MAX_BYTES // 2**20} MB. Make it smaller.")
        async with self.worker:
            if await request.is_disconnected():
                return Response(status_code=204)  # the client is gone
            return await anyio.to_thread.run_sync(self.answer, content)

    def answer(self, content: bytes) -> Response:
        """Read an image and predict it."""
        try:
            return JSONResponse(self.predictor.predict(read_upload(content, self.predictor.orientation)).to_json())
        except UserError as error:
            return refusal(422, str(error))
        except (RuntimeError, MemoryError) as error:
            traceback.print_exc()
            if out_of_memory(error):
                return refusal(503, "There is not enough memory for this image. Make it smaller.")
            return refusal(500, "The network failed on this image. The terminal of app.py shows why.")


async def read_body(request: Request) -> bytes | None:
    """Read a request's body; None if it is larger than `MAX_BYTES`.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    if int(request.headers.get("content-length", "0")) > MAX_BYTES:
        return None
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > MAX_BYTES:
            return None
    return bytes(content)


def is_own_page(request: Request) -> bool:
    """Whether a request comes from this page or a program other than a browser. Browsers send the origin."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()


def refusal(status: int, message: str) -> Response:
    """Make an error response with a message for the page."""
    return JSONResponse({"error": message}, status_code=status)


def build_application(predictor: Predictor, samples: Mapping[str, Sample], is_loopback: bool) -> Starlette:
    """Make the application.

    Args:
        predictor: see `Service`.
        samples: see `Service`.
        is_loopback: whether the server listens on a loopback address. If so, requests with other host names are
            refused, to prevent DNS rebinding by other sites.
    """
    service = Service(predictor, samples)
    routes: list[Any] = [
        Route("/about", service.about),
        Route("/samples/{name}", service.sample),
        Route("/predict", service.predict, methods=["POST"]),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    hosts = LOOPBACK_NAMES if is_loopback else ["*"]
    own_hosts = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return Starlette(routes=routes, middleware=[own_hosts])


def serve(application: Starlette, listener: socket.socket) -> None:
    """Serve an application until Ctrl-C. Requests in progress are completed first.

    Args:
        application: the application.
        listener: the listening socket.
    """
    settings: dict[str, Any] = dict(lifespan="off", ws="none", http="h11", loop="asyncio")
    settings |= dict(log_level="warning", access_log=False, server_header=False, headers=list(HEADERS.items()))
    settings |= dict(limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=5)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after shutting down
        uvicorn.Server(uvicorn.Config(application, **settings)).run(sockets=[listener])
