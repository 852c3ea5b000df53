// Notices: what went wrong, when it will be tried again, and the question for a key.

import { element } from "./figures.js";

const TICK_MS = 200;
const DEFAULT_RETRY_S = 3;

export class Notices {
  #root = document.getElementById("notice");
  #timer = 0;

  /**
   * Show an error. Where the service asks to come back later, count down and then do so.
   * @param {{title: string, detail: string, status?: number, requestId?: string, retryAfterS?: number}} error
   * @param {() => void} [retry] tries again
   */
  show(error, retry) {
    this.hide();
    const text = element("div", {}, element("strong", { textContent: error.title }), " ", error.detail ?? "");
    if (error.requestId) {
      text.append(element("span", { className: "id", textContent: `request ${error.requestId.slice(0, 12)}` }));
      text.lastChild.title = error.requestId;
    }
    const actions = element("div", { className: "actions" });
    const again = element("button", { type: "button", className: "quiet", textContent: "Try again" });
    again.addEventListener("click", () => this.#leave(retry));
    if (retry) actions.append(again);
    const close = element("button", { type: "button", className: "quiet", textContent: "Dismiss" });
    close.addEventListener("click", () => this.hide());
    actions.append(close);
    if (retry && [429, 503].includes(error.status)) this.#countDown(error.retryAfterS || DEFAULT_RETRY_S, again, retry);
    this.#root.replaceChildren(text, actions);
    this.#root.dataset.kind = this.#timer ? "wait" : "error";
    this.#root.hidden = false;
  }

  hide() {
    clearInterval(this.#timer);
    this.#timer = 0;
    this.#root.hidden = true;
    this.#root.replaceChildren();
  }

  #leave(retry) {
    this.hide();
    retry();
  }

  #countDown(seconds, button, retry) {
    const endMs = performance.now() + 1000 * seconds;
    const tick = () => {
      const leftS = Math.ceil((endMs - performance.now()) / 1000);
      button.textContent = `Trying again in ${leftS} s`;
      if (leftS <= 0) this.#leave(retry);
    };
    button.title = "Try now";
    tick();
    this.#timer = setInterval(tick, TICK_MS);
  }
}

/** The dialog that asks for the service's key. */
export class KeyDialog {
  #dialog = document.getElementById("key-dialog");
  #input = document.getElementById("key");
  #why = document.getElementById("key-why");
  #usualWhy = this.#why.textContent;
  #then = () => {};

  /** @param {(key: string) => void} onKey told the key; an empty one takes it away */
  constructor(onKey) {
    document.getElementById("open-key").addEventListener("click", () => this.ask());
    document.getElementById("close-key").addEventListener("click", () => this.#dialog.close());
    document.getElementById("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const then = this.#then;
      onKey(this.#input.value);
      this.#dialog.close();
      then();
    });
    this.#dialog.addEventListener("close", () => (this.#input.value = ""));
  }

  /**
   * @param {string} [why] instead of the usual sentence
   * @param {() => void} [then] done once there is a key
   */
  ask(why = "", then = () => {}) {
    this.#why.textContent = why || this.#usualWhy;
    this.#then = then;
    if (!this.#dialog.open) this.#dialog.showModal();
    this.#input.focus();
  }
}
