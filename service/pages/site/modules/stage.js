// The stage: two pictures under one divider, their differences from the original, and a map over them.

import { differenceOf, heatOf } from "./pictures.js";

const GAIN = 8;
const NAMES = { original: "Original", base: "Base", enriched: "Enriched", picture: "" };
const STEPS = { PageUp: 10, PageDown: -10 };

export class Stage {
  #root = document.getElementById("stage");
  #controls = document.getElementById("controls");
  #split = document.getElementById("split");
  #map = document.getElementById("map");
  #preview = this.#root.querySelector(".preview");
  #difference = document.getElementById("difference");
  /** Canvases by name: original, base, enriched. */
  #pictures = {};
  #differences = new Map();

  constructor() {
    this.#split.addEventListener("input", () => this.#placeDivider());
    this.#split.addEventListener("keydown", (event) => {
      if (!(event.key in STEPS)) return;
      event.preventDefault();
      this.#split.value = Number(this.#split.value) + STEPS[event.key];
      this.#placeDivider();
    });
    this.#controls.addEventListener("change", (event) => {
      if (event.target === this.#difference && this.#difference.checked) this.#leaveOriginal();
      this.#draw();
    });
    this.#placeDivider();
  }

  /** Nothing to see yet, or no more. */
  showEmpty() {
    this.#pictures = {};
    this.#enter("empty");
  }

  /** A photo is on its way: it is shown as the browser reads it, if it can. */
  showBusy(photo, text) {
    this.#forgetPreview();
    if (photo.type.startsWith("image/")) {
      this.#preview.onload = () => (this.#preview.hidden = false);
      this.#preview.src = URL.createObjectURL(photo);
    }
    this.#root.querySelector(".busy").textContent = text;
    this.#enter("busy");
  }

  /** Original, base and enriched, each a canvas of one size. */
  showComparison(pictures) {
    this.#pictures = pictures;
    this.#differences.clear();
    this.#enter("compare");
    this.#draw();
  }

  /** One picture without a comparison. */
  showPicture(canvas) {
    this.#enter("picture");
    paint("left-picture", canvas);
  }

  /**
   * Lay a layer's weights over the pictures: one colour above zero, another below.
   * @param {number[][]} rows
   */
  showMap(rows) {
    const largest = Math.max(...rows.flat().map(Math.abs));
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).split(",").map(Number);
    const heat = heatOf(rows, { positive: colour("--map-positive"), negative: colour("--map-negative") }, largest);
    paint("map", heat);
    this.#map.hidden = false;
  }

  hideMap() {
    this.#map.hidden = true;
  }

  #enter(state) {
    if (state !== "busy") this.#forgetPreview();
    this.#root.dataset.state = state;
    this.#root.setAttribute("aria-busy", String(state === "busy"));
    this.#controls.hidden = state !== "compare";
    this.#split.disabled = state !== "compare";
    this.hideMap();
  }

  #forgetPreview() {
    if (this.#preview.src) URL.revokeObjectURL(this.#preview.src);
    this.#preview.onload = null;
    this.#preview.removeAttribute("src");
    this.#preview.hidden = true;
  }

  #draw() {
    for (const side of ["left", "right"]) {
      const name = this.#controls.querySelector(`input[name=${side}]:checked`).value;
      const isDifference = this.#difference.checked;
      paint(`${side}-picture`, isDifference ? this.#differenceOf(name) : this.#pictures[name]);
      const tag = this.#root.querySelector(`.tag.${side}`);
      tag.textContent = isDifference ? `|${NAMES[name]} − Original| × ${GAIN}` : NAMES[name];
      tag.dataset.name = name;
    }
    this.#describe();
  }

  #differenceOf(name) {
    if (!this.#differences.has(name)) {
      this.#differences.set(name, differenceOf(this.#pictures[name], this.#pictures.original, GAIN));
    }
    return this.#differences.get(name);
  }

  /** The original's difference from itself is black: show both reconstructions' instead. */
  #leaveOriginal() {
    for (const [side, name] of [["left", "base"], ["right", "enriched"]]) {
      const chosen = this.#controls.querySelector(`input[name=${side}]:checked`);
      if (chosen.value === "original") this.#controls.querySelector(`input[name=${side}][value=${name}]`).checked = true;
    }
  }

  #placeDivider() {
    this.#root.style.setProperty("--split", `${this.#split.value}%`);
    this.#describe();
  }

  #describe() {
    const [left, right] = [...this.#root.querySelectorAll(".tag")].map((tag) => tag.textContent);
    this.#split.setAttribute("aria-valuetext", `${left} up to ${Math.round(this.#split.value)} percent, then ${right}`);
  }
}

function paint(id, picture) {
  const canvas = document.getElementById(id);
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").drawImage(picture, 0, 0);
}
