// Predicts images on the server of tools/app.py, and talks to no other.

export const FAILURE = "The server does not respond. Is app.py still running?";

// An error whose message is meant for the user.
export class Refusal extends Error {}

// A page that tools/export.py wrote and that was served from this address has installed a service worker.
navigator.serviceWorker?.getRegistrations().then((workers) => workers.forEach((worker) => {
  worker.unregister();
  sessionStorage.removeItem("reloaded"); // see isolate() in tools/page/web/predictor.js
}));

// Describes the network and its samples: see Service.about in tools/page/server.py.
const description = fetch("about").then((reply) => reply.json());
export const describe = () => description;

// Returns where the network runs, once it is loaded.
export const load = async () => (await description).facts.device;

// Predicts an image file. Returns the fields of tools/page/predictors.py's Answer, with pictures as ImageBitmap and the
// weights of blocks as Float32Array. Rejects with a Refusal, or with an AbortError once `signal` aborts.
export async function predict(file, signal) {
  const type = file.type.startsWith("image/") ? file.type : "application/octet-stream";
  const reply = await fetch("predict", { method: "POST", body: file, headers: { "Content-Type": type }, signal });
  if (!reply.ok) {
    const failed = reply.status === 503 ? "The server is busy. Try again in a moment." : `The server failed (status ${reply.status}). Its terminal shows why.`;
    throw new Refusal(await reply.json().then(({ error }) => error, () => failed));
  }
  const answer = await reply.json();
  const [picture, overlay] = await Promise.all([answer.picture, answer.overlay].map((text) => text && decodedPicture(text)));
  const blocks = answer.blocks.map((block) => ({ ...block, weights: new Float32Array(bytes(block.weights).buffer) }));
  return { ...answer, picture, overlay, blocks };
}

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function decodedPicture(text) {
  return createImageBitmap(new Blob([bytes(text)], { type: "image/png" }));
}
