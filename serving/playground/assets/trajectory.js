// One answer and what was decided in it: its tokens by source, its decisions, its counters. The live page and the saved
// file show it with the same code. Texts come from models and are put in as text alone, never as HTML. Nothing here
// knows where a trajectory came from; its JSON form is `SavedTrajectory` in serving/playground/saved.py.

const FINISHES = {
  stop: "finished",
  length: "ended at max tokens",
  stopped: "stopped",
  failed: "failed",
};

let views = 0;

/** An element with a class, text and children. */
export function make(tag, { className = "", text = null, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Whether the chosen token is not the SLM's own first. */
export function isRescue(decision) {
  const { candidates_K, logprobs_K, chosen } = decision;
  if (!candidates_K.length) return false;
  return candidates_K[logprobs_K.indexOf(Math.max(...logprobs_K))] !== chosen;
}

/** A token's text with its spaces and line ends made visible; `otherwise` where it has none. */
function visible(text, otherwise = "(no text)") {
  return text ? text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") : otherwise;
}

function percent(p) {
  if (p === null || p === undefined) return "–";
  return p > 0 && p < 0.001 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;
}

function fixed(value) {
  return value === null || value === undefined ? "–" : value.toFixed(3);
}

function same(a, b) {
  return a !== null && a.length === b.length && a.every((value, k) => value === b[k]);
}

function terms(pairs) {
  const list = make("dl");
  for (const [term, value] of pairs) list.append(make("div", {}, make("dt", { text: term }), make("dd", { text: value })));
  return list;
}

/** What the marks mean. */
export function legend() {
  const entries = [
    ["slm", false, "the SLM wrote it"],
    ["selected", false, "selected, and the SLM’s first"],
    ["selected", true, "selected, a rescue"],
    ["teacher", false, "the teacher wrote it"],
    ["teacher", true, "the teacher wrote it, a rescue"],
  ];
  const list = make("ul", { className: "legend", "aria-label": "What the marks mean" });
  for (const [source, rescue, says] of entries) {
    const mark = make("span", { className: `mark ${source}${rescue ? " rescue" : ""}`, text: "token", "aria-hidden": "true" });
    list.append(make("li", {}, mark, ` ${says}`));
  }
  return list;
}

/** A policy's answer as a card, which grows with `append` and is whole after `finish`. */
export class TrajectoryView {
  /** `trajectory` may be whole, or hold what is known before the first token: policy, prompt and settings. */
  constructor(trajectory) {
    const { tokens = [], decisions = [], ...head } = trajectory;
    this.trajectory = {
      version: 1, finish: null, seconds: null, usage: {}, models: {}, samples: [],
      item: null, verdict: null, extracted: null, gold: null, ...head, tokens: [], decisions: [],
    };
    this.tokens = []; // a span each
    this.decisions = new Map(); // by step: what was decided there
    this.buttons = new Map(); // by step: the decision's button, once its token is there
    this.open = null; // the step whose panel is open
    this.id = `trajectory-${++views}`;
    this.#build();
    this.#say("waiting");
    this.append({ tokens, decisions });
    if (this.trajectory.finish) this.finish({});
  }

  /** More tokens, as [text, source], and decisions, in any order. */
  append({ tokens = [], decisions = [] }) {
    this.trajectory.tokens.push(...tokens);
    this.trajectory.decisions.push(...decisions);
    for (const decision of decisions) this.decisions.set(decision.step, decision);
    for (const [text, source] of tokens) {
      const span = make("span", { className: source === "slm" ? "token" : `token mark ${source}`, text });
      this.tokens.push(span);
      this.text.append(span);
    }
    const first = this.tokens.length - tokens.length;
    const steps = new Set([...decisions.map((decision) => decision.step), ...tokens.map((_, n) => first + n)]);
    for (const step of steps) if (this.decisions.has(step) && this.tokens[step]) this.#dress(step);
    if (tokens.length) this.#say("writing");
    this.#count();
  }

  /** What is known at the end: finish, seconds, seed, usage, models, samples. */
  finish(known) {
    Object.assign(this.trajectory, known);
    this.#say(FINISHES[this.trajectory.finish]);
    this.text.classList.remove("writing");
    this.#count();
    this.#describe();
  }

  /** Show why there is no more, or no answer at all. */
  fail(message) {
    this.alert.textContent = message;
    this.alert.hidden = false;
  }

  /** The seconds so far, while nobody else has said. */
  clock(seconds) {
    this.counters.seconds.textContent = seconds.toFixed(1);
  }

  get counts() {
    const { tokens, decisions, usage, finish } = this.trajectory;
    const teacher = usage.teacher ?? { prefill: 0, decode: 0 };
    const known = (finish === "stop" || finish === "length") && Object.keys(usage).length;
    return {
      tokens: tokens.length,
      triggers: decisions.length,
      rescues: decisions.filter(isRescue).length,
      teacher: known ? teacher.prefill + teacher.decode : null, // read and written, as the tables count them
    };
  }

  #build() {
    const { policy, item, verdict } = this.trajectory;
    this.heading = make("h2", { text: policy, id: `${this.id}-name` });
    this.status = make("span", { className: "status" });
    this.tools = make("span", { className: "tools" });
    const head = make("header", {}, this.heading, this.status);
    if (verdict) head.append(make("span", { className: `verdict ${verdict}`, text: verdict }));
    head.append(this.tools);
    this.alert = make("p", { className: "error", role: "alert" });
    this.alert.hidden = true;
    this.text = make("div", { className: "text writing", role: "group", "aria-label": `Answer of ${policy}` });
    this.text.addEventListener("keydown", (event) => this.#key(event));
    this.panel = make("div", { className: "panel", id: `${this.id}-panel`, role: "group", "aria-labelledby": `${this.id}-decision` });
    this.panel.hidden = true;
    this.panel.addEventListener("keydown", (event) => this.#key(event));
    this.about = make("details", { className: "about" });
    this.about.hidden = true;
    this.element = make(
      "article", { className: "trajectory", "aria-labelledby": this.heading.id },
      head, ...(item ? [make("p", { className: "item", text: item })] : []),
      this.#counterList(), this.alert, this.text, this.panel, this.about,
    );
  }

  #counterList() {
    const names = { tokens: "tokens", triggers: "triggers", rescues: "rescues", teacher: "teacher tokens", seconds: "seconds" };
    this.counters = {};
    const list = make("dl", { className: "counters" });
    for (const [key, name] of Object.entries(names)) {
      this.counters[key] = make("dd", { text: key === "teacher" || key === "seconds" ? "–" : "0", "data-counter": key });
      list.append(make("div", {}, make("dt", { text: name }), this.counters[key]));
    }
    return list;
  }

  #count() {
    for (const [key, value] of Object.entries(this.counts)) this.counters[key].textContent = value ?? "–";
    if (this.trajectory.seconds !== null) this.counters.seconds.textContent = this.trajectory.seconds.toFixed(2);
  }

  #say(status) {
    this.status.textContent = status;
  }

  /** Make the token of a decision a button. Space around it stays text, so that lines break as they would. */
  #dress(step) {
    if (this.buttons.has(step)) return;
    const decision = this.decisions.get(step), span = this.tokens[step];
    const [, before, core, after] = /^(\s*)(.*?)(\s*)$/s.exec(span.textContent);
    const shown = core || visible(span.textContent || decision.chosen_text);
    const rescue = isRescue(decision);
    const button = make("button", {
      type: "button", className: `decision ${span.className}${rescue ? " rescue" : ""}`, text: shown, tabindex: "-1",
      "aria-expanded": "false", "aria-controls": this.panel.id,
      "aria-label": `${shown}, decision at token ${step + 1}, ${rescue ? "rescue" : "no rescue"}`,
    });
    button.addEventListener("click", () => (this.open === step ? this.#close() : this.#show(step)));
    button.addEventListener("focus", () => this.#only(step));
    span.className = "token";
    span.replaceChildren(...(core ? [before, button, after] : [button, before]));
    this.buttons.set(step, button);
    if (this.buttons.size === 1) button.tabIndex = 0;
    if (this.open !== null) this.#fill(); // "3 of 5" has become "3 of 6"
  }

  /** One decision of a text is a stop of the Tab key; arrows lead to the others. */
  #only(step) {
    for (const [at, button] of this.buttons) button.tabIndex = at === step ? 0 : -1;
  }

  #steps() {
    return [...this.buttons.keys()].sort((a, b) => a - b);
  }

  #key(event) {
    if (event.key === "Escape" && this.open !== null) {
      event.preventDefault();
      this.#close();
      return;
    }
    const steps = this.#steps();
    const now = steps.findIndex((step) => this.buttons.get(step) === document.activeElement);
    if (now < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const to = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#go(steps[Math.min(Math.max(to, 0), steps.length - 1)]);
  }

  #go(step) {
    this.buttons.get(step).focus();
    if (this.open !== null) this.#show(step);
  }

  #close() {
    const button = this.buttons.get(this.open), inside = this.panel.contains(document.activeElement);
    button.setAttribute("aria-expanded", "false");
    this.open = null;
    this.panel.hidden = true;
    if (inside) button.focus();
  }

  #show(step) {
    if (this.open !== null) this.buttons.get(this.open).setAttribute("aria-expanded", "false");
    this.open = step;
    const button = this.buttons.get(step);
    button.setAttribute("aria-expanded", "true");
    this.#only(step);
    this.panel.hidden = false;
    this.#fill();
    // Scroll until the panel lies below the text, or over the end of a long one, and the decision is still in sight.
    const rest = this.text.getBoundingClientRect().bottom - button.getBoundingClientRect().bottom;
    const below = Math.min(rest + this.panel.offsetHeight + 40, window.innerHeight - 100);
    button.style.scrollMarginBottom = `${Math.max(below, 0)}px`;
    button.scrollIntoView({ block: "nearest" });
  }

  #fill() {
    const focused = this.panel.contains(document.activeElement) ? document.activeElement.className : null;
    this.panel.replaceChildren(...this.#panelParts(this.open));
    if (focused) (this.panel.querySelector(`.${focused}:not(:disabled)`) ?? this.panel.querySelector("button:not(:disabled)")).focus();
  }

  #panelParts(step) {
    const decision = this.decisions.get(step), steps = this.#steps(), now = steps.indexOf(step);
    const tool = (className, label, text, act) => {
      const button = make("button", { type: "button", className, "aria-label": label, text });
      button.addEventListener("click", act);
      return button;
    };
    const previous = tool("previous", "Previous decision", "‹", () => this.#show(steps[now - 1]));
    const next = tool("next", "Next decision", "›", () => this.#show(steps[now + 1]));
    previous.disabled = now === 0;
    next.disabled = now === steps.length - 1;
    const close = tool("close", "Close the decision", "×", () => this.#close());
    const heading = make("h3", { id: `${this.id}-decision`, text: `Decision ${now + 1} of ${steps.length}` });
    const rescue = isRescue(decision);
    const head = make("div", { className: "panel-head" }, heading);
    if (rescue) head.append(make("span", { className: "badge", text: "rescue" }));
    head.append(make("span", { className: "tools" }, previous, next, close));
    const where = `Token ${step + 1}; trigger value ${fixed(decision.value)}.`;
    const parts = [head, make("p", {}, ...this.#story(decision, step, rescue)), make("p", { className: "small", text: where })];
    if (decision.candidates_K.length) parts.splice(2, 0, candidateTable(decision));
    return parts;
  }

  /** What happened, in a sentence. */
  #story(decision, step, rescue) {
    const code = (text) => make("code", { text: visible(text) });
    const source = this.trajectory.tokens[step][1];
    if (!decision.candidates_K.length) return ["No candidates were compared here: what follows was judged as a whole."];
    const first = code(decision.texts_K[decision.logprobs_K.indexOf(Math.max(...decision.logprobs_K))]);
    if (!rescue) return ["The SLM’s first, ", first, ", was kept."];
    const did = source === "teacher" ? ["; the teacher wrote ", code(decision.chosen_text), "."] : ["; ", code(decision.chosen_text), " was selected."];
    return ["The SLM’s first was ", first, ...did];
  }

  /** The settings and costs of a run that is over. */
  #describe() {
    const { seed, max_tokens, temperature, usage, models, samples, extracted, gold } = this.trajectory;
    const pairs = [];
    if (gold !== null) pairs.push(["answer given", extracted ?? "none"], ["right answer", gold]);
    if (seed !== null && seed !== undefined) pairs.push(["seed", seed]);
    if (max_tokens) pairs.push(["max tokens", max_tokens]);
    pairs.push(["temperature", temperature ?? "the policy’s own"]);
    for (const [engine, { prefill, decode, leaves, forwards }] of Object.entries(usage)) {
      pairs.push([engine, `${prefill} tokens read, ${decode} written, ${leaves} candidates scored, ${forwards} forwards`]);
    }
    for (const [engine, hash] of Object.entries(models)) pairs.push([`weights of ${engine}`, hash]);
    this.about.replaceChildren(make("summary", { text: "About this run" }), terms(pairs));
    if (samples.length) {
      const list = make("ol");
      for (const sample of samples) list.append(make("li", { text: sample }));
      this.about.append(make("h3", { text: `${samples.length} samples, voted over` }), list);
    }
    this.about.hidden = false;
  }
}

/** A decision's candidates, best first in the SLM's order, with what each model made of them. */
function candidateTable(decision) {
  const { candidates_K, texts_K, logprobs_K, scores_K, preferences_K, teacher_K, chosen, argmax } = decision;
  const columns = [["SLM", (k) => (logprobs_K[k] === null ? null : Math.exp(logprobs_K[k])), percent]];
  if (teacher_K !== null) columns.push(["Teacher", (k) => teacher_K[k], percent]);
  if (!same(teacher_K, scores_K)) columns.push(["Score", (k) => scores_K[k], fixed]);
  if (!same(preferences_K, scores_K)) columns.push(["Preference", (k) => preferences_K[k], fixed, false]);
  const body = make("tbody");
  const row = (text, token, cells) => {
    const notes = [];
    if (token === chosen) notes.push("chosen");
    if (token === argmax) notes.push("teacher’s own");
    const name = make("th", { scope: "row" }, make("code", { text: visible(text) }));
    for (const note of notes) name.append(" ", make("span", { className: "note", text: note }));
    body.append(make("tr", { className: token === chosen ? "chosen" : "" }, name, ...cells));
  };
  candidates_K.forEach((token, k) => {
    row(texts_K[k], token, columns.map(([, value, format, share = true]) => {
      const cell = make("td", { text: format(value(k)) });
      if (share) cell.style.setProperty("--share", `${100 * (value(k) ?? 0)}%`);
      return cell;
    }));
  });
  const others = new Map([[chosen, decision.chosen_text], [argmax, decision.argmax_text]]);
  for (const [token, text] of others) {
    if (token !== null && !candidates_K.includes(token)) {
      row(text, token, [make("td", { className: "outside", colspan: String(columns.length), text: "not among the candidates" })]);
    }
  }
  const head = make("tr", {}, make("th", { scope: "col", text: "Candidate" }), ...columns.map(([name]) => make("th", { scope: "col", text: name })));
  const table = make("table", {}, make("caption", { className: "hidden", text: "Candidates of this decision" }), make("thead", {}, head), body);
  return make("div", { className: "scroll", tabindex: "0", role: "group", "aria-label": "Candidates" }, table);
}

/** Show whole trajectories, side by side, below the problem they have in common. */
export function show(trajectories, root) {
  if (trajectories.some(({ version }) => version !== 1)) {
    root.append(make("p", { className: "error", role: "alert", text: "This file holds a version that it cannot show." }));
    return;
  }
  document.title = `${trajectories.map(({ policy }) => policy).join(" and ")}: Select to Think`;
  const prompts = [...new Set(trajectories.map(({ prompt }) => prompt))];
  for (const prompt of prompts) {
    root.append(make("section", { className: "problem" }, make("h2", { text: "Problem" }), make("p", { className: "text", text: prompt })));
  }
  const cards = trajectories.map((trajectory) => new TrajectoryView(trajectory).element);
  root.append(legend(), make("div", { className: "columns" }, ...cards));
}
