// Figures beside the pictures: closeness, router weights, times.

const STAGES = {
  read: "read the body",
  decode: "decode the photo",
  queue: "wait for a batch",
  batch: "wait for the device",
  device: "run the model",
  encode: "write the answer",
  network: "network, page",
};
const GHOST_LAYERS = 12;

const byId = (id) => document.getElementById(id);

/** A new element. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/**
 * PSNR and SSIM of both reconstructions.
 * @param {{psnr: (number|null)[], ssim: number[]} | null} base answer of /reconstruct; null before there is one
 */
export function showCloseness(base, enriched) {
  for (const [name, digits] of [["psnr", 2], ["ssim", 3]]) {
    const [low, high] = [base?.[name][0], enriched?.[name][0]];
    byId(`${name}-base`).textContent = decimal(low, digits);
    byId(`${name}-enriched`).textContent = decimal(high, digits);
    const gain = Number.isFinite(low) && Number.isFinite(high) ? high - low : undefined;
    byId(`${name}-gain`).textContent = gain > 0 ? `+${decimal(gain, digits)}` : decimal(gain, digits);
  }
}

/** A number with a real minus; null is infinite, as the service writes it. */
function decimal(value, digits) {
  if (value === null) return "∞";
  return value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

/** Bars of mean router weights. Pressing one asks for that layer's map. */
export class RouterFigure {
  #root = byId("router");
  #onSelect;

  /** @param {(index: number | null) => void} onSelect told which layer is pressed, null for none */
  constructor(onSelect) {
    this.#onSelect = onSelect;
    this.#root.addEventListener("click", (event) => this.#toggle(event.target.closest("button")));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.#toggle(null);
    });
    this.showGhost();
  }

  /** What the figure will look like. */
  showGhost() {
    const bars = Array.from({ length: GHOST_LAYERS }, (_, index) => 0.35 + 0.3 * Math.sin(index * 0.9));
    this.#draw(bars.map((value) => element("span", { className: "bar ghost" }, bar(value, 0.65, 0))));
  }

  /**
   * @param {number[]} layers numbers of the encoder's blocks
   * @param {number[]} weights mean of each
   */
  show(layers, weights) {
    const [highest, lowest] = [Math.max(0, ...weights), Math.min(0, ...weights)];
    this.#draw(
      weights.map((weight, index) => {
        const value = element("span", { className: "value" }, unseen("Mean weight "), shortWeight(weight));
        const number = element("span", { className: "layer" }, unseen(" of layer "), layers[index]);
        const made = element("button", { type: "button", className: "bar" }, bar(weight, highest, lowest, value), number);
        made.dataset.index = index;
        made.setAttribute("aria-pressed", "false");
        made.title = `Layer ${layers[index]}: ${weight.toFixed(3)} on average`;
        return made;
      }),
    );
  }

  #draw(bars) {
    this.#root.replaceChildren(...bars);
  }

  #toggle(pressed) {
    const index = pressed && pressed.getAttribute("aria-pressed") === "false" ? Number(pressed.dataset.index) : null;
    for (const button of this.#root.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
    }
    this.#onSelect(index);
  }
}

/** Words for those who hear the page. */
function unseen(text) {
  return element("span", { className: "hidden", textContent: text });
}

/** A bar that grows up or down from a zero line, whose place is the same for all. */
function bar(weight, highest, lowest, ...children) {
  const range = highest - lowest || 1;
  const made = element("span", { className: weight < 0 ? "fill negative" : "fill" });
  made.style.setProperty("height", `${(100 * Math.abs(weight)) / range}%`);
  made.style.setProperty("bottom", `${(100 * (Math.min(0, weight) - lowest)) / range}%`);
  const column = element("span", { className: "column" }, made, ...children);
  column.style.setProperty("--zero", `${(100 * -lowest) / range}%`);
  column.style.setProperty("--top", `${(100 * (Math.max(0, weight) - lowest)) / range}%`);
  return column;
}

function shortWeight(weight) {
  return weight.toFixed(Math.abs(weight) < 1 ? 2 : Math.abs(weight) < 10 ? 1 : 0).replace("-", "−").replace(/^(−?)0\./, "$1.");
}

/** Where the request's time went; null before there was one. */
export function showTimes(times) {
  const stages = Object.keys(STAGES).filter((name) => times?.[name] !== undefined);
  const wholeMs = stages.reduce((sum, name) => sum + times[name], 0);
  byId("times-total").textContent = times ? milliseconds(wholeMs) : "";
  byId("times").replaceChildren(
    ...stages.map((name) => {
      const part = element("span", { className: `part ${name}`, title: `${STAGES[name]}: ${milliseconds(times[name])}` });
      part.style.setProperty("flex-grow", times[name]);
      return part;
    }),
  );
  byId("times-legend").replaceChildren(
    ...stages.map((name) =>
      element(
        "li",
        {},
        element("span", { className: `key ${name}` }),
        element("span", { textContent: STAGES[name] }),
        element("span", { className: "number", textContent: milliseconds(times[name]) }),
      ),
    ),
  );
}

function milliseconds(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms)} ms`;
}

/** Name and value of each fact about a file. */
export function showFacts(facts) {
  byId("file-facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [
      element("dt", { textContent: name }),
      element("dd", { textContent: value }),
    ]),
  );
}
