// The ways in: choosing, dropping, pasting, and samples.

/**
 * Listen on every way in.
 * @param {(file: File) => void} onFile
 * @param {(error: {title: string, detail: string}) => void} onError
 */
export function takeFiles(onFile, onError) {
  chooseFiles(onFile);
  dropFiles(onFile);
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])][0];
    if (file) onFile(file);
  });
  for (const button of document.querySelectorAll("[data-sample]")) {
    button.addEventListener("click", () => takeSample(button, onFile, onError));
  }
}

function chooseFiles(onFile) {
  const input = document.getElementById("file");
  for (const id of ["choose", "choose-other"]) {
    document.getElementById(id).addEventListener("click", () => input.click());
  }
  input.addEventListener("change", () => {
    if (input.files.length) onFile(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
}

function dropFiles(onFile) {
  const veil = document.getElementById("dropping");
  let depth = 0; // entering a child leaves its parent
  const show = (isOver) => (veil.hidden = !isOver);
  addEventListener("dragenter", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    depth += 1;
    show(true);
  });
  addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    show(depth > 0);
  });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    show(false);
    const file = event.dataTransfer?.files[0];
    if (file) onFile(file);
  });
}

async function takeSample(button, onFile, onError) {
  const address = button.querySelector("img").src;
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    onFile(new File([await answer.blob()], `${button.dataset.sample}.jpg`, { type: "image/jpeg" }));
  } catch {
    onError({ title: "The sample did not load", detail: "The service cannot be reached. It may have stopped." });
  }
}
