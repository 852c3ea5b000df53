// Shows the OpenAPI document in Swagger UI, all of it from here. Where the service has keys, asks for one first.

const DOCUMENT = "openapi.json";
const form = document.getElementById("key-form");
const problem = document.getElementById("problem");

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", paint);
paint();

async function show(key) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(DOCUMENT, { headers }).catch(() => null);
  form.hidden = answer?.status !== 401;
  problem.hidden = Boolean(answer?.ok) || (!form.hidden && !key);
  problem.textContent = answer ? "The service does not know this key." : "The service cannot be reached.";
  if (answer && !answer.ok && answer.status !== 401) problem.textContent = `The service answered ${answer.status}.`;
  if (!answer?.ok) return;
  const ui = window.SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null, // it would ask another host
    onComplete: () => key && ui.preauthorizeApiKey("key", key),
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  show(document.getElementById("key").value.trim());
});
show("");
