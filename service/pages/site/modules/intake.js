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
  for (const group of document.querySelectorAll(".samples")) {
    group.addEventListener("click", (event) => {
      const button = event.target.closest("[data-address]");
      if (button) takeSample(button.dataset.address, onFile, onError);
    });
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

/** The last part of an address. */
export function nameOf(address) {
  return address.split("/").at(-1);
}

async function takeSample(address, onFile, onError) {
  try {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const content = await answer.blob();
    onFile(Object.assign(new File([content], nameOf(address), { type: content.type }), { address }));
  } catch {
    onError({ title: "The sample did not load", detail: "The service cannot be reached. It may have stopped." });
  }
}
