// Files of latents: what their header says.

const LENGTH_BYTES = 8;
const MAX_HEADER_BYTES = 100_000;

export function isLatentsFile(file) {
  return /\.safetensors$/i.test(file.name);
}

/**
 * Facts about a .safetensors file, for people; the service judges whether it is a good one.
 * @param {Blob} file
 */
export async function factsOf(file) {
  const facts = { file: bytes(file.size) };
  try {
    const view = new DataView(await file.slice(0, LENGTH_BYTES).arrayBuffer());
    const length = Number(view.getBigUint64(0, true));
    if (length > MAX_HEADER_BYTES) return facts;
    const header = JSON.parse(await file.slice(LENGTH_BYTES, LENGTH_BYTES + length).text());
    const { shape, dtype } = header.latents ?? {};
    const told = header.__metadata__ ?? {};
    if (shape) facts.shape = shape.join(" × ");
    if (dtype) facts.numbers = dtype;
    if (told.latent) facts.kind = told.normalized === "true" ? `${told.latent}, normalised` : told.latent;
    if (told.model) facts.model = told.model;
    if (told.checkpoint_sha256) facts.checkpoint = told.checkpoint_sha256.slice(0, 12);
  } catch {
    // not such a file: the service says so in a better sentence
  }
  return facts;
}

/** A number of bytes for people. */
export function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${Math.round(count / 1000)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

/** Give the person a file. */
export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
