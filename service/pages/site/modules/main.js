// The page: from a file to pictures and figures.

import { RouterFigure, element, showCloseness, showFacts, showTimes } from "./figures.js";
import { offerGenerated, showSource } from "./generated.js";
import { nameOf, takeFiles } from "./intake.js";
import { bytes, factsOf, isLatentsFile, save } from "./latents.js";
import { linesOf } from "./lines.js";
import { KeyDialog, Notices } from "./notices.js";
import { canvasOf, fileOf } from "./pictures.js";
import { Service, ServiceError } from "./service.js";
import { Stage } from "./stage.js";

const byId = (id) => document.getElementById(id);
const NO_KEY = 401;
const ROUTER_NOTE = byId("router-note").textContent;
const SAMPLE_NAME = "photo.jpg";

const service = new Service();
const stage = new Stage();
const notices = new Notices();
const router = new RouterFigure(showLayer);
const keyDialog = new KeyDialog((key) => {
  service.key = key;
  showLines();
  connect();
});

/** What /info says; null until it answers. */
let info = null;
/** The file that is shown. */
let current = null;
/** Router maps of the shown photo, [L][h][w]. */
let maps = null;
let work = new AbortController();

async function connect() {
  try {
    info = await service.info();
  } catch (error) {
    info = null;
    showStatus(...(STATUSES[error.status] ?? ["error", "not reachable"]));
    fail(error, error.status === NO_KEY ? undefined : connect); // a key connects by itself
    return;
  }
  notices.hide();
  showStatus("ready", `${info.model} on ${info.device}`);
  const shape = info.latent.shape.join(" × ");
  byId("model").textContent = `${info.model}: ${info.image_size} px in, ${shape} numbers between, ${info.dtype}.`;
  byId("router-card").hidden = !info.router;
  offerGenerated(info.checkpoint_sha256);
}

const STATUSES = { [NO_KEY]: ["waiting", "needs a key"], 503: ["waiting", "loading"] };

function showStatus(state, text) {
  const status = byId("status");
  status.dataset.state = state;
  status.textContent = text;
}

/** Show an error, or ask for the key; `retry` does again what failed. */
function fail(error, retry) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ServiceError)) {
    console.error(error);
    error = { title: "The answer could not be shown", detail: String(error.message ?? error) };
  }
  if (error.status === NO_KEY) {
    const why = service.hasKey ? "The service does not know this key. Please check it." : "";
    keyDialog.ask(why || "This service answers only with a key. It stays in this tab's memory.", retry);
    return;
  }
  notices.show(error, retry);
}

async function take(file) {
  work.abort();
  work = new AbortController();
  const { signal } = work;
  notices.hide();
  current = null;
  showLines(file);
  markSample(file.name);
  enableTaking(false);
  try {
    checkSize(file);
    stage.showBusy(file, isLatentsFile(file) ? "Decoding the latents" : "Encoding and decoding");
    await (isLatentsFile(file) ? takeLatents(file, signal) : takePhoto(file, signal));
  } catch (error) {
    if (signal.aborted) return;
    stage.showEmpty();
    clearFigures();
    fail(error, () => take(file));
  }
}

function clearFigures() {
  maps = null;
  showCards("photo");
  showCloseness(null, null);
  router.showGhost();
  showTimes(null);
  byId("save-picture").hidden = true;
}

function checkSize(file) {
  const limit = info?.limits.max_body_bytes ?? Infinity;
  if (file.size > limit) {
    throw new ServiceError({
      title: "Too large",
      detail: `${file.name} has ${bytes(file.size)}; this service takes at most ${bytes(limit)}.`,
    });
  }
}

async function takePhoto(photo, signal) {
  const options = { originals: "true", ...(info?.router && { router: "maps" }) };
  const [enriched, base] = await Promise.all([
    service.reconstruct(photo, options, signal),
    service.reconstruct(photo, { latent: "base" }, signal),
  ]);
  const files = [enriched.originals[0], base.images[0], enriched.images[0]].map((text) => fileOf(text));
  const [original, plain, rich] = await Promise.all(files.map(canvasOf));
  if (signal.aborted) return;
  current = photo;
  showCards("photo");
  stage.showComparison({ original, base: plain, enriched: rich });
  showCloseness(base, enriched);
  showTimes(enriched.times);
  maps = enriched.router_maps?.[0] ?? null;
  showLayer(null);
  if (maps) router.show(info.layers, enriched.router_mean[0]);
  offerPicture(files[2], photo.name);
  enableTaking(true);
  tell(`${photo.name}: ${enriched.psnr[0]?.toFixed(1)} dB enriched, ${base.psnr[0]?.toFixed(1)} dB base`);
}

async function takeLatents(file, signal) {
  const [answer, facts] = await Promise.all([service.decode(file, signal), factsOf(file)]);
  const files = answer.images.map((text) => fileOf(text));
  const pictures = await Promise.all(files.map(canvasOf));
  if (signal.aborted) return;
  current = file;
  showCards("latents");
  showFacts(facts);
  showTimes(answer.times);
  const show = (index) => {
    stage.showPicture(pictures[index]);
    offerPicture(files[index], file.name);
  };
  showStrip(pictures, show);
  show(0);
  tell(`${pictures.length === 1 ? "The picture" : `${pictures.length} pictures`} of ${file.name}`);
}

/** Small copies of several pictures, to choose which one is shown. */
function showStrip(pictures, show) {
  const strip = byId("strip");
  strip.hidden = pictures.length < 2;
  const buttons = pictures.map((picture, index) => {
    const button = element("button", { type: "button", title: `Picture ${index + 1}` }, picture);
    button.setAttribute("aria-label", `Picture ${index + 1}`);
    button.addEventListener("click", () => show(index));
    return button;
  });
  strip.replaceChildren(...buttons);
}

function showCards(kind) {
  const isPhoto = kind === "photo";
  for (const [id, isShown] of [
    ["quality-card", isPhoto],
    ["router-card", isPhoto && info?.router],
    ["file-card", !isPhoto],
    ["strip", false],
  ]) {
    byId(id).hidden = !isShown;
  }
  byId("download").hidden = byId("kind").hidden = byId("latents-note").hidden = !isPhoto;
}

function showLayer(index) {
  const note = byId("router-note");
  if (index === null || !maps) {
    stage.hideMap();
    note.textContent = ROUTER_NOTE;
    return;
  }
  const weights = maps[index].flat();
  const mean = weights.reduce((sum, weight) => sum + weight) / weights.length;
  stage.showMap(maps[index].map((row) => row.map((weight) => weight - mean)));
  const range = `from ${signed(Math.min(...weights))} to ${signed(Math.max(...weights))}`;
  note.textContent = `Layer ${info.layers[index]}, ${range}: green where it weighs more than its mean, red where less.`;
}

function offerPicture(file, name) {
  const link = byId("save-picture");
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(file);
  link.download = `${stem(name)}-reconstructed.png`;
  link.hidden = false;
}

async function download() {
  const [photo, kind] = [current, byId("kind").value];
  enableTaking(false);
  try {
    const blob = await service.encode(photo, { latent: kind });
    save(blob, `${stem(photo.name)}-${kind}.safetensors`);
    byId("latents-note").textContent = `${bytes(blob.size)}, float16. Drop the file here: the picture comes back.`;
  } catch (error) {
    fail(error, download);
  } finally {
    enableTaking(true);
  }
}

function enableTaking(isPossible) {
  byId("download").disabled = !isPossible;
}

function showLines(file = current) {
  const language = document.querySelector("input[name=language]:checked").value;
  byId("lines").textContent = linesOf(language, {
    url: service.url,
    hasKey: service.hasKey,
    name: file?.name ?? SAMPLE_NAME,
    address: file?.address,
    isLatents: file ? isLatentsFile(file) : false,
    kind: byId("kind").value,
  });
}

async function copyLines() {
  const button = byId("copy");
  try {
    await navigator.clipboard.writeText(byId("lines").textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(byId("lines")); // no clipboard without https: mark the lines instead
    button.textContent = "Marked";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

function markSample(name) {
  for (const button of document.querySelectorAll("[data-address]")) {
    button.setAttribute("aria-pressed", String(name === nameOf(button.dataset.address)));
  }
}

function signed(weight) {
  return weight.toFixed(2).replace("-", "−");
}

function tell(text) {
  byId("told").textContent = text;
}

function stem(name) {
  return name.replace(/\.[^.]+$/, "");
}

takeFiles(take, (error) => notices.show(error));
byId("download").addEventListener("click", download);
byId("copy").addEventListener("click", copyLines);
byId("kind").addEventListener("change", () => showLines());
for (const choice of document.querySelectorAll("input[name=language]")) {
  choice.addEventListener("change", () => showLines());
}
for (const choice of document.querySelectorAll("input[name=source]")) {
  choice.addEventListener("change", () => showSource(choice.value));
}
showLines();
connect();
