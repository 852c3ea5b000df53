// The lines that do the same from a terminal.

const PYTHON_CLIENT = "# pip install ./client";

/**
 * @param {"curl" | "python"} language
 * @param {{url: string, hasKey: boolean, name: string, address?: string, isLatents: boolean, kind: string}} call
 *   address: where the file lies, if the service has it
 */
export function linesOf(language, call) {
  return (language === "curl" ? curlLines(call) : pythonLines(call)).join("\n");
}

function curlLines({ url, hasKey, name, address, isLatents, kind }) {
  const key = hasKey ? ` -H "Authorization: Bearer $DRORAE_API_KEY"` : "";
  const send = `curl -s${key} --data-binary @${shellWord(name)}`;
  const get = address ? [`curl -sO ${shellWord(`${url}/${address}`)}`] : [];
  if (isLatents) return [...get, `${send} -o picture.png ${shellWord(`${url}/decode`)}`];
  const option = kind === "base" ? "?latent=base" : "";
  return [
    ...get,
    `${send} -o reconstructed.png -H 'Accept: image/png' ${shellWord(`${url}/reconstruct${option}`)}`,
    `${send} ${shellWord(`${url}/reconstruct?format=json&router=mean`)}`,
    `${send} -o latents.safetensors ${shellWord(`${url}/encode${option}`)}`,
  ];
}

function pythonLines({ url, hasKey, name, address, isLatents, kind }) {
  const option = kind === "base" ? ', latent="base"' : "";
  const photo = JSON.stringify(name);
  const work = isLatents
    ? [`    picture = client.decode(${photo}, files="png")`]
    : [
        `    latents = client.encode(${photo}${option})`,
        `    picture = client.reconstruct(${photo}, files="png"${option})`,
      ];
  const standard = [
    ...(hasKey ? ["import os"] : []),
    ...(address ? ["from urllib.request import urlretrieve"] : []),
  ];
  return [
    PYTHON_CLIENT,
    ...(standard.length ? [...standard, ""] : []),
    "from drorae_client import Client",
    "",
    ...(address ? [`urlretrieve(${JSON.stringify(`${url}/${address}`)}, ${photo})`] : []),
    `with Client(${JSON.stringify(url)}${hasKey ? ', api_key=os.environ["DRORAE_API_KEY"]' : ""}) as client:`,
    ...work,
    `picture.pil()[0].save("reconstructed.png")`,
    ...(isLatents ? [] : [`latents.save("latents.safetensors")`, "print(picture.psnr, picture.ssim, latents)"]),
  ];
}

/** As a shell reads it back. */
function shellWord(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;
}
