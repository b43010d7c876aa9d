"use strict";
// The token inspector. Text is set as text, never as HTML.

const RUNS = JSON.parse(document.getElementById("inspected").textContent);
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const known = (x) => typeof x === "number";
const shown = (x, digits = 3) => (known(x) ? x.toFixed(digits).replace("-", "−") : "not finite");
const signed = (x) => (known(x) && x < 0 ? `(${shown(x)})` : shown(x)); // as a term of a formula
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return `${share < 1e-3 ? share.toExponential(1) : share.toPrecision(3)} %`;
};

// ---------------------------------------------------------------- what is known of a token

// The numbers of token t of a row, each with the formula that leads to it, worked with this token's numbers.
function numbersOf(run, row, t, epoch) {
  const at = (name, place = t) => row[name]?.[place];
  const last = t === row.tokens.length - 1;
  const kl = difference(at("logprobs"), at("ref_logprobs"));
  const found = [
    { key: "logprob", value: at("logprobs"), worked: `log π = ${shown(at("logprobs"))}: a probability of ${percent(at("logprobs"))}` },
    { key: "reference", value: at("ref_logprobs"), worked: `log π_ref = ${shown(at("ref_logprobs"))}: a probability of ${percent(at("ref_logprobs"))}` },
    { key: "kl", value: kl, worked: `log π − log π_ref = ${shown(at("logprobs"))} − ${signed(at("ref_logprobs"))} = ${shown(kl)}` },
    { key: "reward", value: at("rewards"), worked: rewardOf(row, at("rewards"), kl, last) },
    { key: "value", value: at("values"), worked: `V = ${shown(at("values"))}, expected before this token was chosen` },
    { key: "advantage", value: at("advantages"), worked: advantageOf(run, row, t) },
    { key: "return", value: at("returns"), worked: `A + V = ${shown(difference(at("returns"), at("values")))} + ${signed(at("values"))} = ${shown(at("returns"))}` },
    { key: "entropy", value: at("entropy"), worked: `H = ${shown(at("entropy"))} nats: as undecided as among ${shown(Math.exp(at("entropy")), 1)} equal choices` },
  ];
  if (row.new?.[epoch]) found.push(...ratioOf(run, row, t, epoch));
  return found.filter((each) => each.value !== undefined);
}

const difference = (a, b) => (known(a) && known(b) ? a - b : a === undefined || b === undefined ? undefined : null);

function rewardOf(row, reward, kl, last) {
  const penalty = -row.kl_coef * kl;
  const paid = `−β·KL = −${shown(row.kl_coef)}·${signed(kl)} = ${shown(penalty)}`;
  if (!last) return paid;
  const score = reward - penalty;
  const ruled = Math.abs(score - row.score) > 1e-3 ? `, what a response that was cut off is paid (its score: ${shown(row.score)})` : "";
  return `−β·KL + score = −${shown(row.kl_coef)}·${signed(kl)} + ${signed(score)} = ${shown(reward)}${ruled}`;
}

// Of estimators other than GAE: the same for all tokens of a response.
const AGAINST_OTHERS = {
  rloo: "Σ rewards of the response − their mean over the prompt's other responses",
  grpo: "(Σ rewards of the response − their mean over the prompt's responses) / their standard deviation",
};

// A = δ + γλ·A of the next token, before whitening, as it follows from returns and values.
function advantageOf(run, row, t) {
  if (run.advantage !== "gae") return AGAINST_OTHERS[run.advantage] ?? `by ${run.advantage}`;
  if (!row.returns || !row.values) return "";
  const raw = (place) => (place < row.tokens.length ? row.returns[place] - row.values[place] : 0);
  const [now, next] = [raw(t), raw(t + 1)];
  const following = t + 1 < row.tokens.length ? row.values[t + 1] : 0;
  const delta = now - run.gamma * run.lambda * next;
  const reward = delta - run.gamma * following + row.values[t];
  const scaled = Math.abs(reward - row.rewards[t]) > 2e-3 ? " (r scaled by whiten_rewards)" : "";
  const steps =
    `δ = r + γ·V′ − V = ${shown(reward)} + ${run.gamma}·${signed(following)} − ${signed(row.values[t])} = ${shown(delta)}${scaled}\n` +
    `A = δ + γλ·A′ = ${shown(delta)} + ${run.gamma}·${run.lambda}·${signed(next)} = ${shown(now)}`;
  const whitened = row.advantages[t];
  return Math.abs(whitened - now) < 1e-3 ? steps : `${steps}\nwhitened over the rollout: ${shown(whitened)}`;
}

function ratioOf(run, row, t, epoch) {
  const [before, after] = [row.logprobs[t], row.new[epoch][t]];
  const ratio = known(before) && known(after) ? Math.exp(after - before) : null;
  return [
    { key: "ratio", value: ratio, worked: `exp(log π_new − log π_old) = exp(${shown(after)} − ${signed(before)}) = ${shown(ratio)}` },
    { key: "clip", ...clipOf(run, ratio, row.advantages[t]) },
  ];
}

// 1: held, so that it has no gradient; 0: free; ½: beyond ε, but free to move back.
function clipOf(run, ratio, advantage) {
  if (run.clip === null) return { value: 0, text: "off", worked: "this run does not clip" };
  const low = 1 - run.clip, high = 1 + run.clip;
  const clipped = Math.min(Math.max(ratio, low), high);
  const terms = `−A·ρ = ${shown(-advantage * ratio)}, −A·clip(ρ, ${shown(low, 2)}, ${shown(high, 2)}) = ${shown(-advantage * clipped)}`;
  const bound = run.dual_clip;
  if (bound && advantage < 0 && ratio > bound) {
    return { value: 1, text: "held", worked: `${terms}; the dual clip holds the loss at −c·A = ${shown(-bound * advantage)}: no gradient` };
  }
  const outside = ratio < low || ratio > high;
  const held = outside && -advantage * clipped > -advantage * ratio;
  if (held) return { value: 1, text: "held", worked: `${terms}; the clipped one is larger and active: no gradient from here on` };
  const why = outside ? "beyond ε, but against its advantage: its gradient brings it back" : "within ε: its gradient flows";
  return { value: outside ? 0.5 : 0, text: outside ? "free, beyond ε" : "free", worked: `${terms}; ${why}` };
}

// ---------------------------------------------------------------- colours

const QUANTITIES = [
  { key: "logprob", name: "log-probability", scale: "less" },
  { key: "reference", name: "reference log-probability", scale: "less" },
  { key: "kl", name: "KL", scale: "around", zero: 0 },
  { key: "reward", name: "reward", scale: "around", zero: 0 },
  { key: "value", name: "value", scale: "around", zero: 0 },
  { key: "advantage", name: "advantage", scale: "around", zero: 0 },
  { key: "return", name: "return", scale: "around", zero: 0 },
  { key: "ratio", name: "ratio", scale: "around", zero: 1, epochs: true },
  { key: "clip", name: "clipped or not", scale: "held", epochs: true },
  { key: "entropy", name: "entropy", scale: "more" },
];

// How far the colours reach: what 95 % of all values of this view stay within, so that one token does not pale the rest.
function reachOf(quantity, rows, run, epoch) {
  const distances = rows
    .flatMap((row) => (row.tokens ?? []).map((_, t) => valueOf(quantity, run, row, t, epoch)))
    .filter(known)
    .map((value) => Math.abs(value - (quantity.zero ?? 0)))
    .sort((a, b) => a - b);
  return distances[Math.floor(0.95 * (distances.length - 1))] || distances.at(-1) || 1;
}

const valueOf = (quantity, run, row, t, epoch) => numbersOf(run, row, t, epoch).find((each) => each.key === quantity.key)?.value;

function paint(token, quantity, value, reach) {
  const distance = known(value) ? value - (quantity.zero ?? 0) : 0;
  token.style.setProperty("--hue", quantity.scale === "around" && distance > 0 ? "var(--plus)" : "var(--minus)");
  token.style.setProperty("--much", Math.min(1, Math.abs(distance) / (quantity.scale === "held" ? 1 : reach)).toFixed(3));
}

function drawScale(quantity, reach) {
  const ramp = (colours) => make("i", { className: "ramp", style: `background: linear-gradient(to right, ${colours})` });
  const full = (hue) => `color-mix(in srgb, var(${hue}) 58%, transparent)`;
  const parts = {
    around: () => [shown((quantity.zero ?? 0) - reach, 2), ramp(`${full("--minus")}, transparent, ${full("--plus")}`), shown((quantity.zero ?? 0) + reach, 2)],
    less: () => [shown(-reach, 2), ramp(`${full("--minus")}, transparent`), "0"],
    more: () => ["0", ramp(`transparent, ${full("--minus")}`), shown(reach, 2)],
    held: () => [swatch("58%"), "held: no gradient", swatch("29%"), "beyond ε, free to come back", swatch("0%"), "free"],
  };
  const swatch = (much) => make("i", { className: "swatch", style: `background: color-mix(in srgb, var(--minus) ${much}, transparent)` });
  $("scale").replaceChildren(...parts[quantity.scale]().map((part) => (part instanceof Node ? part : make("span", {}, part))));
  $("scale").setAttribute("aria-label", `The scale of colours for ${quantity.name}`);
}

// ---------------------------------------------------------------- tokens as text

const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\u{e0000}-\u{e007f}]/gu;
const named = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const visible = (text) => text.replace(INVISIBLE, (character) => `[${named(character)}]`);
const fragmentAt = (row, t) => (row.fragments ?? []).find(([first, size]) => first <= t && t < first + size);

// A token as [text, whether it is a mark]: marks stand for what would be invisible, and for the later pieces of a
// character that needs several tokens.
function textOf(row, t) {
  const fragment = fragmentAt(row, t);
  if (fragment) return t === fragment[0] ? [[visible(fragment[2]), false]] : [["▹", true]];
  const token = row.tokens[t];
  if (token === "") return [["∅", true]];
  if (/^ +$/.test(token)) return [["␣".repeat(token.length), true]];
  return token
    .split(/(\n|\t)/)
    .filter((part) => part)
    .map((part) => (part === "\n" ? ["↵\n", true] : part === "\t" ? ["⇥\t", true] : [visible(part), false]));
}

// What the card and a screen reader call a token, and a remark about it.
function nameOf(row, t) {
  const fragment = fragmentAt(row, t);
  if (fragment) return [`“${visible(fragment[2])}”`, `piece ${t - fragment[0] + 1} of ${fragment[1]}: a character of several tokens`];
  const token = row.tokens[t];
  if (token.includes("\ufffd")) return [`“${visible(token)}”`, "bytes that are no whole character"];
  if (token === "") return ["∅", "a token without text"];
  return [`“${visible(token).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣")}”`, ""];
}

// ---------------------------------------------------------------- the inspector

const state = { run: 0, kind: "held_out", prompt: 0, step: 0, quantity: "kl", epoch: 0, chosen: null };

const run = () => RUNS[state.run];
const rowsOfKind = () => run()[state.kind];
const steps = () => [...new Set(rowsOfKind().map((row) => row.step))].sort((a, b) => a - b);
const quantity = () => QUANTITIES.find((each) => each.key === state.quantity);

// The rows that the slider moves through: the same prompt's at each evaluation, or the nth of each rollout.
function rowsInView() {
  const byStep = new Map();
  for (const row of rowsOfKind()) byStep.set(row.step, [...(byStep.get(row.step) ?? []), row]);
  const prompt = state.kind === "held_out" ? prompts()[state.prompt] : null;
  const pick = (rows) => (prompt === null ? rows[Math.min(state.prompt, rows.length - 1)] : rows.find((row) => row.prompt === prompt));
  return steps().map((step) => pick(byStep.get(step))).filter(Boolean);
}

const prompts = () => [...new Set(rowsOfKind().map((row) => row.prompt))];

function fill(select, options, value) {
  select.replaceChildren(...options.map(([id, text, disabled]) => make("option", { value: id, disabled: Boolean(disabled) }, text)));
  select.value = value;
}

function refreshControls() {
  fill($("run"), RUNS.map((each, place) => [place, each.name]), state.run);
  $("run").parentElement.hidden = RUNS.length < 2;
  for (const option of $("kind").options) option.disabled = !run()[option.value].length;
  if (!rowsOfKind().length) state.kind = state.kind === "held_out" ? "rollouts" : "held_out";
  $("kind").value = state.kind;
  const count = Math.max(...steps().map((step) => rowsOfKind().filter((row) => row.step === step).length));
  const choices = state.kind === "held_out" ? prompts().map(visible) : Array.from({ length: count }, (_, n) => `response ${n + 1} of each rollout`);
  state.prompt = Math.min(state.prompt, choices.length - 1);
  fill($("prompt"), choices.map((text, place) => [place, text]), state.prompt);

  const rows = rowsInView();
  const epochs = Math.max(0, ...rows.map((row) => row.new?.length ?? 0));
  const disabled = (each) => (each.epochs && !epochs) || !rows.some((row) => row.tokens && numbersOf(run(), row, 0, 0).some((x) => x.key === each.key));
  if (disabled(quantity())) state.quantity = (QUANTITIES.find((each) => !disabled(each)) ?? QUANTITIES[0]).key;
  fill($("quantity"), QUANTITIES.map((each) => [each.key, each.name, disabled(each)]), state.quantity);
  state.epoch = Math.max(0, Math.min(state.epoch, epochs - 1));
  fill($("epoch"), Array.from({ length: epochs }, (_, n) => [n, `${n + 1} of ${epochs}`]), state.epoch);
  $("epoch-choice").hidden = !(epochs && quantity().epochs);

  $("step").max = Math.max(0, rows.length - 1);
  state.step = Math.min(state.step, rows.length - 1);
  $("step").value = state.step;
  $("steps").replaceChildren(...rows.map((_, place) => make("option", { value: place })));
  $("unknown").hidden = rows.every((row) => row.tokens);
  $("unknown").textContent = "Of some of these responses the run kept the text alone: it was made by an older version.";
}

function draw() {
  refreshControls();
  const rows = rowsInView();
  const reach = reachOf(quantity(), rows, run(), state.epoch);
  drawScale(quantity(), reach);
  const places = [...new Set([0, state.step, rows.length - 1])].sort((a, b) => a - b);
  const now = rows[state.step];
  $("step-shown").textContent = now.step;
  $("step").setAttribute("aria-valuetext", `step ${now.step}`);
  $("panels").replaceChildren(...places.map((place) => panelOf(rows[place], titleOf(place, rows), place === state.step, reach)));
  choose(stillChosen(places.map((place) => rows[place]), now));
}

// The chosen token, or the one at its place in the slider's row where it is no longer on the screen.
function stillChosen(rows, now) {
  if (state.chosen && rows.includes(state.chosen.row)) return state.chosen;
  const row = now.tokens ? now : rows.find((each) => each.tokens);
  return row ? { row, t: Math.min(state.chosen?.t ?? 0, row.tokens.length - 1) } : null;
}

function titleOf(place, rows) {
  if (place === 0) return state.kind === "held_out" ? "Before" : "Early";
  if (place === rows.length - 1) return state.kind === "held_out" ? "After" : "Late";
  return "On the way";
}

function panelOf(row, title, chosen, reach) {
  const numbers = [`score ${shown(row.score, 2)}`];
  if ("gold_score" in row) numbers.push(`gold ${shown(row.gold_score, 2)}`);
  if ("kl" in row) numbers.push(`KL ${shown(row.kl, 2)} nats`);
  numbers.push(row.finished ? "stopped by itself" : "cut off");
  const heading = make("h3", {}, title, make("small", {}, `step ${row.step}`));
  const head = [heading, make("p", { className: "numbers" }, numbers.join(" · ")), make("p", { className: "prompt", dir: "auto" }, visible(row.prompt))];
  const body = row.tokens ? tokensOf(row, title, reach) : make("div", { className: "tokens", dir: "auto" }, visible(row.response));
  return make("article", { className: chosen ? "panel chosen" : "panel" }, ...head, body);
}

function tokensOf(row, title, reach) {
  const list = make("div", { className: "tokens", dir: "auto", role: "listbox", "aria-orientation": "horizontal" });
  list.setAttribute("aria-label", `Tokens of the response, ${title}, step ${row.step}`);
  row.tokens.forEach((_, t) => {
    const value = valueOf(quantity(), run(), row, t, state.epoch);
    const parts = textOf(row, t).map(([text, sign]) => (sign ? make("span", { className: "sign" }, text) : text));
    const token = make("span", { className: "token", role: "option", tabIndex: t ? -1 : 0 }, ...parts);
    token.setAttribute("aria-selected", "false");
    token.setAttribute("aria-label", `${nameOf(row, t)[0]}, ${quantity().name} ${shown(value)}`);
    paint(token, quantity(), value, reach);
    token.seen = { row, t };
    list.append(token);
  });
  return list;
}

function choose(seen) {
  state.chosen = seen;
  for (const token of $("panels").querySelectorAll(".token")) {
    const same = seen !== null && token.seen.row === seen.row && token.seen.t === seen.t;
    token.setAttribute("aria-selected", String(same));
    if (seen !== null && token.seen.row === seen.row) token.tabIndex = same ? 0 : -1;
  }
  $("card").replaceChildren(...(seen ? cardOf(seen.row, seen.t) : []));
}

function cardOf(row, t) {
  const [name, remark] = nameOf(row, t);
  const place = `token ${t + 1} of ${row.tokens.length} · step ${row.step}`;
  const epochs = row.new?.length ? ` · ratio after epoch ${state.epoch + 1}` : "";
  const entries = numbersOf(run(), row, t, state.epoch).map((each) => {
    const { name: label } = QUANTITIES.find((other) => other.key === each.key);
    const link = make("a", { href: `#guide-${each.key}` }, label);
    const term = make("dt", {}, link, make("b", {}, each.text ?? shown(each.value)));
    const lines = each.worked.split("\n").map((line) => make("dd", { className: "worked" }, line));
    return make("div", { className: each.key === state.quantity ? "active" : "" }, term, ...lines);
  });
  const more = [];
  if (!row.new) {
    const why = state.kind === "held_out" ? "Held-out responses are not trained on: they have no ratio, and their advantages are not whitened." : "This run kept no ratios.";
    more.push(make("p", { className: "more" }, why));
  }
  return [make("h3", {}, make("bdi", {}, name)), make("p", { className: "where" }, place + epochs + (remark ? ` · ${remark}` : "")), make("dl", {}, ...entries), ...more];
}

// ---------------------------------------------------------------- what the reader does

function begin() {
  if (!$("inspector")) return;
  $("no-tokens").hidden = RUNS.length > 0;
  $("inspector").hidden = RUNS.length === 0;
  if (!RUNS.length) return;
  if (!RUNS[0].held_out.some((row) => row.tokens) && RUNS[0].rollouts.length) state.kind = "rollouts";
  state.step = Math.floor((steps().length - 1) / 2);
  const numeric = new Set(["run", "prompt", "step", "epoch"]);
  for (const id of ["run", "kind", "prompt", "quantity", "epoch", "step"]) {
    $(id).addEventListener("input", (event) => {
      state[id] = numeric.has(id) ? Number(event.target.value) : event.target.value;
      if (id === "run" || id === "kind") Object.assign(state, { prompt: 0, step: Math.floor((steps().length - 1) / 2) });
      draw();
    });
  }
  const panels = $("panels");
  for (const kind of ["pointerover", "focusin", "click"]) {
    panels.addEventListener(kind, (event) => {
      const token = event.target.closest(".token");
      if (token) choose(token.seen);
    });
  }
  panels.addEventListener("keydown", (event) => {
    const token = event.target.closest(".token");
    const list = token?.parentElement.children;
    const places = { ArrowRight: token?.seen.t + 1, ArrowLeft: token?.seen.t - 1, Home: 0, End: list?.length - 1 };
    if (!token || !(event.key in places)) return;
    event.preventDefault();
    list[places[event.key]]?.focus();
  });
  draw();
}

begin();
