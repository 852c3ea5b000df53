// Pictures as pixels: out of base64, and their difference.

/** A file out of base64. */
export function fileOf(base64, type = "image/png") {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index += 1) bytes[index] = text.charCodeAt(index);
  return new Blob([bytes], { type });
}

/** A canvas with a picture file on it. */
export async function canvasOf(file) {
  const bitmap = await createImageBitmap(file);
  const canvas = emptyCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas;
}

/** |first - second| times a gain, as a picture. */
export function differenceOf(first, second, gain) {
  const { width, height } = first;
  const [a, b] = [first, second].map((canvas) => canvas.getContext("2d").getImageData(0, 0, width, height));
  for (let index = 0; index < a.data.length; index += 4) {
    for (let channel = index; channel < index + 3; channel += 1) {
      a.data[channel] = Math.min(255, gain * Math.abs(a.data[channel] - b.data[channel]));
    }
  }
  const canvas = emptyCanvas(width, height);
  canvas.getContext("2d").putImageData(a, 0, 0);
  return canvas;
}

/**
 * Numbers as a transparent picture: one colour above zero, another below, the stronger the denser.
 * @param {number[][]} rows
 * @param {{positive: number[], negative: number[]}} colours red, green and blue from 0 to 255
 * @param {number} largest magnitude, which is the densest
 */
export function heatOf(rows, { positive, negative }, largest) {
  const canvas = emptyCanvas(rows[0].length, rows.length);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, index) => {
    const [red, green, blue] = value < 0 ? negative : positive;
    const density = 225 * Math.min(1, Math.abs(value) / (largest || 1));
    pixels.data.set([red, green, blue, density], 4 * index);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function emptyCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}
