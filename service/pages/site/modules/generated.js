// New pictures: latents that a generator drew beforehand, a file per class.

import { element } from "./figures.js";

const FOLDER = "page/generated";

/**
 * Offer the second tab, if the service runs the tokenizer whose latents these are.
 * @param {string} checkpoint sha256 of the service's checkpoint
 */
export async function offerGenerated(checkpoint) {
  const index = await readIndex();
  const isOurs = index !== null && index.checkpoint_sha256 === checkpoint;
  document.getElementById("sources").hidden = !isOurs;
  if (!isOurs) {
    showSource("photos");
    return;
  }
  document.getElementById("generated").replaceChildren(...index.classes.map(classButton));
}

/** Show one of the tabs, `photos` or `generated`. */
export function showSource(name) {
  document.querySelector(`input[name=source][value=${name}]`).checked = true;
  document.getElementById("photos").hidden = name !== "photos";
  for (const id of ["generated", "generated-note"]) document.getElementById(id).hidden = name !== "generated";
}

function classButton(name) {
  const spoken = name.replaceAll("_", " ");
  const picture = element("img", { src: `${FOLDER}/${name}.jpg`, alt: spoken });
  const button = element("button", { type: "button", title: spoken }, picture);
  button.dataset.address = `${FOLDER}/${name}.safetensors`;
  return button;
}

async function readIndex() {
  try {
    const answer = await fetch(`${FOLDER}/index.json`);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null; // without them the page is about photos alone
  }
}
