// The server's HTTP interface: requests with the API key, and streams of server-sent events.

const storage = sessionStorage; // the key goes with the tab

export const key = {
  get: () => storage.getItem("jaxengine-key") ?? "",
  set: (value) => storage.setItem("jaxengine-key", value.trim()),
};

/** Raised for an answer that is no success; `status` is its code. */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function request(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
  });
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const parsed = JSON.parse(text);
    message = parsed.error?.message ?? parsed.message ?? text;
  } catch { /* no JSON: the text is the message */ }
  throw new ServerError(response.status, message || response.statusText);
}

/** The JSON objects of a stream of server-sent events, up to [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split(/\r?\n\r?\n/);
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim());
      if (!data.length) continue;
      if (data.join("") === "[DONE]") return;
      const event = JSON.parse(data.join("\n"));
      if (event.error) throw new ServerError(event.error.code ?? 500, event.error.message);
      yield event;
    }
  }
}

/** Samples of Prometheus' text format, added up over their labels: name -> number. */
export function samples(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = line.match(/^([\w:]+)(\{[^}]*\})?\s+(\S+)/);
    if (!match || match[1].endsWith("_bucket")) continue;
    const value = Number(match[3]);
    if (Number.isFinite(value)) found[match[1]] = (found[match[1]] ?? 0) + value;
  }
  return found;
}
