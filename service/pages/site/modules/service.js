// The service: requests, the key, and errors that a person can read.

/** An error to show: of the service (a problem document), of the network, or of this page. */
export class ServiceError extends Error {
  /**
   * @param {{title: string, detail: string, status?: number, requestId?: string, retryAfterS?: number}} told
   */
  constructor({ title, detail, status = 0, requestId = "", retryAfterS = 0 }) {
    super(detail);
    Object.assign(this, { title, detail, status, requestId, retryAfterS });
  }
}

export class Service {
  #key = "";

  /** Address of the service, without a slash at its end. */
  url = new URL(".", document.baseURI).href.replace(/\/$/, "");

  /** The key is kept here alone: neither in storage nor in the page. */
  set key(value) {
    this.#key = value.trim();
  }

  get hasKey() {
    return this.#key !== "";
  }

  /** What runs here. */
  async info() {
    return (await this.#send("info", {})).json();
  }

  /**
   * A photo's reconstruction.
   * @param {Blob} photo
   * @param {Record<string, string>} options of the query, beside format=json
   * @param {AbortSignal} signal
   */
  async reconstruct(photo, options, signal) {
    return this.#timed("reconstruct", { format: "json", ...options }, photo, signal);
  }

  /** Pictures of a file of latents. */
  async decode(file, signal) {
    return this.#timed("decode", { format: "json" }, file, signal);
  }

  /** A photo's latents as a .safetensors file. */
  async encode(photo, options) {
    return (await this.#send("encode", options, photo)).blob();
  }

  async #timed(path, options, body, signal) {
    const startedMs = performance.now();
    const answer = await this.#send(path, options, body, signal);
    const document = await answer.json();
    const times = timings(answer.headers.get("Server-Timing") ?? "");
    const elsewhereMs = performance.now() - startedMs - (times.total ?? 0);
    return { ...document, times: { ...times, network: Math.max(0, elsewhereMs) } };
  }

  async #send(path, options, body, signal) {
    const query = new URLSearchParams(options).toString();
    const headers = this.hasKey ? { Authorization: `Bearer ${this.#key}` } : {};
    const request = { method: body ? "POST" : "GET", headers, body, signal, cache: "no-store" };
    let answer;
    try {
      answer = await fetch(`${this.url}/${path}${query && "?"}${query}`, request);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServiceError({
        title: "The service cannot be reached",
        detail: `Nothing answers at ${this.url}. It may have stopped, or the network is down.`,
      });
    }
    if (!answer.ok) throw await problemOf(answer);
    return answer;
  }
}

/** Milliseconds by stage, of a Server-Timing header. */
export function timings(header) {
  const entries = header.split(",").map((entry) => /^\s*(\w+);dur=([\d.]+)/.exec(entry));
  return Object.fromEntries(entries.filter(Boolean).map(([, name, ms]) => [name, Number(ms)]));
}

async function problemOf(answer) {
  const told = {
    title: `The service answered with status ${answer.status}`,
    detail: "A proxy in front of it may be the cause: the answer is not one of the service's own.",
    status: answer.status,
    requestId: answer.headers.get("X-Request-ID") ?? "",
    retryAfterS: Number(answer.headers.get("Retry-After")) || 0,
  };
  if (answer.headers.get("Content-Type")?.startsWith("application/problem+json")) {
    const problem = await answer.json().catch(() => ({}));
    told.title = problem.title ?? told.title;
    told.detail = problem.detail ?? told.detail;
    told.requestId = problem.request_id ?? told.requestId;
  }
  return new ServiceError(told);
}
