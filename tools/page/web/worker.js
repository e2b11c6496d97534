// The page's service worker. It adds the headers that allow threads, which a plain file server does not send, and keeps
// the files, so that the page also opens without a network connection. With a connection, files are always the newest.

const CACHE = "sepvit"; // of all pages of one origin; files are kept by address
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(respond(event));
});

async function respond(event) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(event.request);
  let found;
  try {
    found = await fetch(event.request, { cache: "no-cache" }); // asks whether the file has changed
  } catch (error) {
    if (kept) return kept;
    throw error;
  }
  if (!found.ok) return found;
  const { body, status, statusText } = found;
  const isolated = new Response(body, { status, statusText, headers: { ...Object.fromEntries(found.headers), ...HEADERS } });
  const version = (reply) => reply?.headers.get("etag") ?? reply?.headers.get("last-modified");
  if (!kept || !version(found) || version(kept) !== version(found)) {
    event.waitUntil(cache.put(event.request, isolated.clone()).catch(console.warn)); // storage may be full
  }
  return isolated;
}
