"""The server of the page of tools/app.py: what it answers, what it refuses, and its bounds.

An image is the body of a request as it is, so that it is neither parsed as a form nor kept in a file. It is read in
pieces and refused once it is too large. Predictions run in a thread, one at a time, in the order of the requests.
"""

import socket
import traceback
from collections.abc import Mapping
from contextlib import suppress
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sepvit_lib.training.errors import UserError, out_of_memory
from tools.app_predictors import Predictor, read_upload
from tools.app_samples import Sample

STATIC = Path(__file__).resolve().parent / "app"
MOST_BYTES = 20 * 2**20  # of an image's file
MOST_WAITING = 16  # images that are being sent, are waiting or are predicted
SLOWEST = 60.0  # seconds to send an image in
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]"]
HEADERS = {
    # Nothing of other servers is loaded, not even if a class were named by HTML.
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class TooLarge(Exception):  # noqa: N818 not an error
    """An image's file is larger than `MOST_BYTES`."""


class SafeHeaders:
    """Middleware: adds `HEADERS` to every response.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in HEADERS.items()),
                ]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Service:
    """Answers the page's requests.

    Args:
        predictor: the network.
        samples: the sample images, by name.
        facts: what the page says about the network, besides the predictor's own facts.
    """

    def __init__(self, predictor: Predictor, samples: Mapping[str, Sample], facts: Mapping[str, str]) -> None:
        self.predictor = predictor
        self.samples = samples
        self.facts = facts
        self.places = anyio.Semaphore(MOST_WAITING)
        self.worker = anyio.CapacityLimiter(1)

    async def about(self, request: Request) -> Response:
        """Answer what the network is, and which samples there are."""
        predictor = self.predictor
        return JSONResponse(
            dict(
                kind=predictor.kind,
                facts={**predictor.facts, **self.facts},
                note=predictor.note,
                samples=[dict(name=sample.name, label=sample.label) for sample in self.samples.values()],
                most_bytes=MOST_BYTES,
            )
        )

    async def sample(self, request: Request) -> Response:
        """Answer with a sample image."""
        sample = self.samples.get(request.path_params["name"])
        if sample is None:
            return refusal(404, "There is no such sample.")
        return Response(sample.content, media_type=sample.media_type)

    async def predict(self, request: Request) -> Response:
        """Answer what the network predicts for the image in the request's body."""
        if not is_own_page(request):
            return refusal(403, "Requests of other sites are refused.")
        try:
            self.places.acquire_nowait()
        except anyio.WouldBlock:
            return refusal(503, "Too many images are waiting. Try again in a moment.")
        try:
            with anyio.fail_after(SLOWEST):
                content = await read_body(request)
            async with self.worker:
                if await request.is_disconnected():
                    return Response(status_code=204)  # nobody reads it
                return await anyio.to_thread.run_sync(self.answer, content)
        except TooLarge:
            return refusal(413, f"The file is larger than {MOST_BYTES // 2**20} MB. Make it smaller.")
        except TimeoutError:
            return refusal(408, f"The file took more than {SLOWEST:.0f} s to arrive.")
        except ClientDisconnect:
            return Response(status_code=204)
        finally:
            self.places.release()

    def answer(self, content: bytes) -> Response:
        """Read an image and predict it."""
        try:
            return JSONResponse(self.predictor.predict(read_upload(content, self.predictor.orientation)).to_json())
        except UserError as error:
            return refusal(422, str(error))
        except (RuntimeError, MemoryError) as error:
            traceback.print_exc()
            if out_of_memory(error):
                return refusal(503, "The machine has too little memory for this image. Make it smaller.")
            return refusal(500, "The network failed on this image. The terminal of app.py shows why.")


async def read_body(request: Request) -> bytes:
    """Read a request's body, at most `MOST_BYTES`.

    Raises:
        TooLarge: it is larger. It is read to twice that size, unkept, so that the client gets to read the answer.
        ClientDisconnect: the client went away.
    """
    with suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > 2 * MOST_BYTES:
            raise TooLarge
    content, received = bytearray(), 0
    async for piece in request.stream():
        received += len(piece)
        if received <= MOST_BYTES:
            content += piece
        else:
            content.clear()
        if received > 2 * MOST_BYTES:
            break
    if received > MOST_BYTES:
        raise TooLarge
    return bytes(content)


def is_own_page(request: Request) -> bool:
    """Whether a request comes from this page, or from a program that is no browser. Browsers name the origin."""
    origin = request.headers.get("origin")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()


def refusal(status: int, message: str) -> Response:
    """Make a response that refuses a request, with a message for the page."""
    return JSONResponse({"error": message}, status_code=status)


def build_application(
    predictor: Predictor, samples: Mapping[str, Sample], facts: Mapping[str, str], is_loopback: bool
) -> Starlette:
    """Make the application.

    Args:
        predictor: see `Service`.
        samples: see `Service`.
        facts: see `Service`.
        is_loopback: whether it listens on a loopback address. Then requests to other host names are refused, by which
            other sites could reach it (DNS rebinding).
    """
    service = Service(predictor, samples, facts)
    routes: list[Any] = [
        Route("/about", service.about),
        Route("/samples/{name}", service.sample),
        Route("/predict", service.predict, methods=["POST"]),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    hosts = LOOPBACK_NAMES if is_loopback else ["*"]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(SafeHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        ],
    )


def serve(application: Starlette, listener: socket.socket) -> None:
    """Serve an application until Ctrl-C. Requests in progress are answered first.

    Args:
        application: the application.
        listener: the listening socket.
    """
    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        timeout_graceful_shutdown=5,
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has closed
        uvicorn.Server(config).run(sockets=[listener])
