// The playground: asks the endpoint it was loaded from, two policies at once, and shows both as they write.

import { events, problem } from "./stream.js";
import { TrajectoryView, legend, make } from "./trajectory.js";

const api = new URL("v1/", document.baseURI); // beside the page, so below a route prefix too
const assets = new URL("playground/", document.baseURI);
const at = (id) => document.getElementById(id);
const form = at("ask"), question = at("question"), example = at("example"), policies = [at("left"), at("right")];
const run = at("run"), stop = at("stop"), save = at("save"), announce = at("announce"), trouble = at("trouble");
const columns = at("columns");
const saved = fetch(new URL("saved.html", assets)).then((response) => (response.ok ? response.text() : Promise.reject()));
saved.catch(() => {}); // told when somebody saves

let running = null; // an AbortController
let views = [];

function key() {
  const given = at("key").value.trim();
  return given ? { Authorization: `Bearer ${given}` } : {};
}

function complain(message) {
  trouble.textContent = message;
  trouble.hidden = !message;
}

async function loadPolicies() {
  let list;
  try {
    const response = await fetch(new URL("models", api), { headers: key() });
    if (!response.ok) {
      complain(`The policies cannot be listed: ${await problem(response)}`);
      if (response.status === 401) at("key").focus();
      return;
    }
    list = await response.json();
  } catch {
    complain("The endpoint does not answer; load the page again once it runs.");
    return;
  }
  complain("");
  const names = list.data.map((model) => model.id);
  const wanted = ["greedy", ["s2t-local", "s2t"].find((name) => names.includes(name)) ?? names[1] ?? names[0]];
  policies.forEach((select, side) => {
    select.replaceChildren(...names.map((name) => make("option", { text: name, value: name })));
    select.value = names.includes(wanted[side]) ? wanted[side] : names[0];
  });
  run.disabled = false;
  const refused = Object.entries(list.unavailable ?? {});
  at("unavailable").hidden = !refused.length;
  at("reasons").replaceChildren(...refused.map(([name, why]) => make("li", { text: why.includes(name) ? why : `${name}: ${why}` })));
}

async function loadExamples() {
  const response = await fetch(new URL("problems.json", assets));
  if (!response.ok) return; // problems can still be typed
  const problems = await response.json();
  for (const [name, text] of Object.entries(problems)) example.append(make("option", { text: name, value: text }));
  example.selectedIndex = 1;
  question.value = example.value;
}

function number(id) {
  return at(id).value === "" ? undefined : at(id).valueAsNumber;
}

function request(model) {
  return {
    model,
    messages: [{ role: "user", content: question.value }],
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
    s2t: { decisions: true },
  };
}

/** One policy's answer, from the question to its end. Failures are shown in its column. */
async function answer(view, body, signal) {
  const began = performance.now();
  const clock = setInterval(() => view.clock((performance.now() - began) / 1000), 100);
  let finish = null, known = {};
  try {
    const response = await fetch(new URL("chat/completions", api), {
      method: "POST", signal, headers: { "Content-Type": "application/json", ...key() }, body: JSON.stringify(body),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      finish = event.choices[0]?.finish_reason ?? finish;
      const { tokens, decisions, usage, seed, seconds, models = {}, samples = [] } = event.s2t ?? {};
      view.append({ tokens, decisions });
      if (usage) known = { usage, seed, seconds, models, samples };
    }
  } catch (error) {
    finish = signal.aborted ? "stopped" : "failed";
    const lost = error instanceof TypeError ? "The endpoint does not answer." : error.message;
    if (finish === "failed") view.fail(lost);
  } finally {
    clearInterval(clock);
  }
  view.finish({ seconds: (performance.now() - began) / 1000, ...known, finish: finish ?? "stop" });
}

async function ask() {
  if (running || run.disabled || !form.reportValidity()) return;
  running = new AbortController();
  const bodies = policies.map((select) => request(select.value));
  views = bodies.map(({ model, max_tokens = null, temperature = null, seed = null }) => (
    new TrajectoryView({ policy: model, prompt: question.value, max_tokens, temperature, seed })
  ));
  columns.replaceChildren(...views.map((view) => view.element));
  run.setAttribute("aria-disabled", "true");
  stop.disabled = false;
  save.disabled = true;
  announce.textContent = `${bodies.map(({ model }) => model).join(" and ")} are writing.`;
  await Promise.all(views.map((view, side) => answer(view, bodies[side], running.signal).then(() => ended(view))));
  running = null;
  run.removeAttribute("aria-disabled");
  if (document.activeElement === stop) run.focus();
  stop.disabled = true;
  save.disabled = views.some((view) => !view.trajectory.tokens.length);
  announce.textContent = views.map(summary).join(" ");
}

function summary(view) {
  const { tokens, triggers, rescues } = view.counts;
  return `${view.trajectory.policy} ${view.status.textContent}: ${tokens} tokens, ${triggers} triggers, ${rescues} rescues.`;
}

function ended(view) {
  if (!view.trajectory.tokens.length) return;
  const button = make("button", { type: "button", text: "Save", "aria-label": `Save the answer of ${view.trajectory.policy}` });
  button.addEventListener("click", () => keep([view]));
  view.tools.append(button);
}

/** Trajectories as one file that needs nothing else. */
async function keep(chosen) {
  let page;
  try {
    page = await saved;
  } catch {
    complain("It cannot be saved: the page's own files are missing. Load the page again.");
    return;
  }
  const trajectories = chosen.map((view) => view.trajectory);
  // "<" as an escape: a text that holds "</script>" must not end the data.
  const data = JSON.stringify(trajectories).replaceAll("<", "\\u003c");
  const file = new Blob([page.replace("[/*trajectories*/]", () => data)], { type: "text/html" });
  const name = trajectories.map(({ policy }) => policy.replaceAll(/[^\w.-]+/g, "_")).join("-");
  const link = make("a", { href: URL.createObjectURL(file), download: `s2t-${name}.html` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
question.addEventListener("input", () => (example.selectedIndex = 0));
example.addEventListener("change", () => {
  if (example.selectedIndex) question.value = example.value;
});
stop.addEventListener("click", () => running?.abort());
save.addEventListener("click", () => keep(views));
at("key").addEventListener("change", loadPolicies);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.defaultPrevented) running?.abort();
});

at("legend").append(legend());
loadPolicies();
loadExamples();
