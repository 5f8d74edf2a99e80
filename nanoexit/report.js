"use strict";
// The page's behaviour. Text from models and prompts enters the document only through textContent.

const root = document.documentElement;
const $ = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- the data: JSON, deflated, in base64 -----------------------------------------------------------------------------

let data;
let prompts = []; // { id, prompt, answer, samples }, in the order of the file

async function load() {
  const bytes = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  data = JSON.parse(await new Response(stream).text());
  const byPrompt = new Map();
  for (const sample of data.samples) {
    const { id, answer } = sample, prompt = string(sample.prompt);
    if (!byPrompt.has(prompt)) byPrompt.set(prompt, { id, prompt, answer, samples: [] });
    byPrompt.get(prompt).samples.push(sample);
    sample.label = sample.step === undefined ? sample.variant : `${sample.variant} · step ${sample.step}`;
    sample.words = sample.tokens.map((token) => string(token.text));
    sample.text = sample.words.join("");
    sample.depth = sample.tokens.map((token) => token.depth);
    sample.exits = list(sample.exit_layers).filter(Number.isInteger);
    sample.ends = []; // blocks run by the time token i is written: in a replay, a token takes time in proportion to its depth
    sample.depth.reduce((sum, depth) => (sample.ends.push(sum + depth), sum + depth), 0);
  }
  prompts = [...byPrompt.values()];
}

function color(depth, { full_depth: full }) { // between five stops, from the first depth to full depth
  const place = full > 1 ? (4 * (depth - 1)) / (full - 1) : 4, left = Math.min(Math.floor(place), 3);
  return `color-mix(in srgb, var(--h${left + 1}) ${100 * (place - left)}%, var(--h${left}))`;
}

const string = (value) => String(value ?? "");
const list = (value) => (Array.isArray(value) ? value : []);
const fixed = (value, digits) => (isNumber(value) ? value.toFixed(digits) : "–");
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const chance = (p) => (p < 0.001 ? "<0.1%" : percent(p));

// ---- state and the prompt picker -------------------------------------------------------------------------------------

const hidden = new Set(); // labels of variants that are switched off
let current = 0, cards = [], clock = Infinity, playing = 0;

function shown(text) { // whitespace that can be seen
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "(empty)";
}

function verdict(sample) {
  if (typeof sample.correct !== "boolean") return ["", ""];
  return sample.correct ? ["✓ right", "right"] : ["✗ wrong", "wrong"];
}

function fillPicker() {
  const wanted = $("search").value.trim().toLowerCase();
  const textsOf = (entry) => [entry.prompt, entry.answer ?? "", entry.id ?? "", ...entry.samples.map((s) => s.text)];
  const found = prompts.map((entry, index) => [entry, index]).filter(([entry]) =>
    textsOf(entry).some((text) => String(text).toLowerCase().includes(wanted)));
  $("picker").replaceChildren(...found.map(([entry, index]) => {
    const marks = entry.samples.map((s) => verdict(s)[0].slice(0, 1)).join(" ");
    const item = el("li", { id: `p${index}`, tabIndex: index === current ? 0 : -1 },
      el("span", { textContent: entry.prompt || "(no prompt)" }),
      el("small", { textContent: [entry.id === entry.prompt ? "" : entry.id, marks].filter(Boolean).join("  ") }));
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", index === current);
    return item;
  }));
  const all = prompts.length;
  $("found").textContent = wanted ? `${found.length} of ${all} prompts` : `${all} prompt${all === 1 ? "" : "s"}`;
  if (!found.some(([, index]) => index === current) && found.length) $("picker").firstElementChild.tabIndex = 0;
}

function choose(index, focus = false) {
  current = index;
  for (const item of $("picker").children) {
    const selected = item.id === `p${index}`;
    item.setAttribute("aria-selected", selected);
    item.tabIndex = selected ? 0 : -1;
    if (selected && focus) item.focus();
  }
  stop();
  clock = Infinity;
  showVariants();
  showPrompt();
}

function moveInPicker(event) {
  const items = [...$("picker").children], at = items.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1, Enter: at, " ": at }[event.key];
  if (to === undefined || !items[to]) return;
  event.preventDefault();
  choose(Number(items[to].id.slice(1)), true);
}

// ---- one prompt and the responses to it ------------------------------------------------------------------------------

function showPrompt() {
  const entry = prompts[current];
  $("prompt").replaceChildren(entry.prompt);
  if (string(entry.answer)) $("prompt").append(el("small", { textContent: `Answer: ${entry.answer}` }));
  inspect(null);
  const samples = entry.samples.filter((sample) => !hidden.has(sample.label));
  cards = samples.map(makeCard);
  $("cards").replaceChildren(...cards.map((card) => card.node));
  const depths = new Map(samples.map((s) => [`${s.full_depth}/${s.exits.length ? s.exits : ""}`, s]));
  $("legend").replaceChildren(...[...depths.values()].flatMap((sample) => legendOf(sample, depths.size > 1)));
  $("seek").max = longest();
  reveal();
}

function legendOf(sample, named) {
  const depths = [...new Set([...sample.exits, ...sample.depth, sample.full_depth])].sort((a, b) => a - b);
  const texts = depths.map((depth) => (depth === sample.full_depth ? `${depth}, all blocks` : `${depth}`));
  const swatches = depths.map((depth, i) => {
    const swatch = el("i");
    swatch.style.setProperty("--c", color(depth, sample));
    return el("span", {}, swatch, texts[i]);
  });
  return [el("span", { textContent: named ? `Depth, ${sample.label}` : "Depth" }), ...swatches];
}

function makeCard(sample) {
  const spans = sample.words.map((text, index) => {
    const span = el("span", { textContent: text, tabIndex: index ? -1 : 0 });
    if (/^\s*\n\s*$/.test(text)) span.className = "break";
    span.style.setProperty("--c", color(sample.depth[index], sample));
    return span;
  });
  const [words, kind] = verdict(sample), count = spans.length, mean = count ? sample.ends.at(-1) / count : 0;
  const facts = [`mean depth ${mean.toFixed(2)}`, `opaque serial depth ${Math.max(0, ...sample.depth)} of ${sample.full_depth}`];
  if (isNumber(sample.cap)) facts.push(`cap ${sample.cap}`);
  facts.push(`${count} token${count === 1 ? "" : "s"}`);
  if (sample.finish === "length") facts.push("cut off");
  const rewards = Object.entries(sample.rewards ?? {}).map(([part, value]) => `${part} ${fixed(value, 3)}`);
  const text = el("div", { className: "text" }, ...spans);
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `Response of ${sample.label}; arrow keys move from token to token`);
  const node = el("article", { className: "card" },
    el("header", {},
      el("h3", { textContent: sample.label }), el("span", { className: `verdict ${kind}`, textContent: words })),
    el("p", { className: "faint", textContent: facts.join(" · ") }), skyline(sample), text);
  if (rewards.length) node.append(el("p", { className: "faint", textContent: `Reward: ${rewards.join(" · ")}` }));
  const card = { node, sample, spans, written: count };
  text.addEventListener("pointerover", (event) => inspect(card, spans.indexOf(event.target)));
  text.addEventListener("pointerleave", () => inspect(null));
  text.addEventListener("focusin", (event) => inspect(card, spans.indexOf(event.target)));
  text.addEventListener("focusout", () => inspect(null));
  text.addEventListener("keydown", (event) => moveInText(event, card));
  return card;
}

function skyline(sample) { // the depths of a response at a glance: one bar per token, or per group of tokens (their mean)
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const size = Math.ceil(sample.depth.length / 160) || 1, count = Math.ceil(sample.depth.length / size);
  svg.setAttribute("viewBox", `0 0 ${Math.max(count, 40)} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  for (let i = 0; i < count; i++) {
    const part = sample.depth.slice(i * size, (i + 1) * size), mean = part.reduce((a, b) => a + b) / part.length;
    const bar = document.createElementNS(svg.namespaceURI, "rect"), tall = mean / sample.full_depth;
    const place = { x: i, y: 1 - tall, width: 0.82, height: tall };
    for (const [key, value] of Object.entries(place)) bar.setAttribute(key, value);
    bar.style.fill = color(Math.max(1, Math.round(mean)), sample);
    svg.append(bar);
  }
  return svg;
}

function moveInText(event, card) {
  const at = card.spans.indexOf(document.activeElement);
  if (event.key === "Escape") return inspect(null);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: card.written - 1 }[event.key];
  if (at < 0 || to === undefined || to < 0 || to >= card.written) return;
  event.preventDefault();
  card.spans[at].tabIndex = -1;
  card.spans[to].tabIndex = 0;
  card.spans[to].focus();
}

// ---- what one token used ---------------------------------------------------------------------------------------------

function bars(title, rows) { // rows of (name, chance, text if there is no chance, colour, chosen)
  const table = el("table", {}, el("caption", { textContent: title }));
  for (const [name, p, without, tint, chosen] of rows) {
    const bar = el("div", { className: "bar" }), known = isNumber(p);
    bar.style.setProperty("--p", `${known ? 100 * p : 0}%`);
    bar.style.setProperty("--c", tint);
    const className = !known ? "unasked" : chosen ? "chosen" : "";
    const value = el("td", { textContent: known ? chance(p) : without });
    table.append(el("tr", { className }, el("td", { textContent: name }), el("td", {}, bar), value));
  }
  return table;
}

function why(sample, depth) {
  if (depth === sample.full_depth) return `ran all ${depth} blocks`;
  return `${depth === sample.cap ? "stopped by the cap" : "exited"} at depth ${depth} of ${sample.full_depth}`;
}

function inspect(card, index = -1) {
  const box = $("inspect");
  box.hidden = index < 0;
  if (index < 0) return;
  const { sample, spans } = card, span = spans[index], token = sample.tokens[index], { depth } = token;
  const word = sample.words[index], where = `token ${index + 1} of ${spans.length}`;
  box.replaceChildren(el("h4", { textContent: shown(word) }), el("p", { textContent: `${why(sample, depth)} · ${where}` }));
  const heads = list(token.exit_probs).slice(0, sample.exits.length).map((p, i) => { // a head beyond the exit was not reached
    const at = sample.exits[i];
    return [`depth ${at}`, p, at > depth ? "not asked" : "–", color(at, sample), at === depth];
  });
  const top = list(token.top).filter(Array.isArray).map(([text, p]) =>
    [shown(string(text)), p, "–", "var(--soft)", text === word]);
  if (heads.length) box.append(bars("Chance to exit at each head", heads));
  if (top.length) box.append(bars("Likeliest tokens", top));
  span.setAttribute("aria-describedby", "inspect");
  const at = span.getClientRects()[0], { offsetHeight: tall, offsetWidth: wide } = box, room = root.clientWidth - wide - 12;
  const below = at.bottom + 10 + tall < innerHeight, above = at.top - 10 - tall > 0, beside = at.right + 14;
  const left = below || above ? at.left - 8 : beside < room ? beside : at.left - 14 - wide; // do not cover the token
  box.style.left = `${Math.max(12, Math.min(left, room))}px`;
  box.style.top = `${below ? at.bottom + 10 : above ? at.top - 10 - tall : Math.max(12, innerHeight - tall - 12)}px`;
}

function followFocus() { // after scrolling, the panel follows a token in focus, and closes for one under the pointer
  const card = cards.find((c) => c.spans.includes(document.activeElement));
  inspect(card ?? null, card ? card.spans.indexOf(document.activeElement) : -1);
}

// ---- replay: one clock for all cards, in blocks run, so that early exits are seen to be quicker -----------------------

const longest = () => Math.max(0, ...cards.map((card) => card.sample.ends.at(-1) ?? 0));

function reveal() {
  for (const card of cards) {
    const { ends } = card.sample;
    while (card.written && ends[card.written - 1] > clock) card.spans[--card.written].classList.add("later");
    while (card.written < ends.length && ends[card.written] <= clock) card.spans[card.written++].classList.remove("later");
  }
  $("seek").value = Math.min(clock, longest());
  const written = cards.map((card) => `${card.sample.label}: ${card.written} of ${card.spans.length} tokens`);
  $("seek").setAttribute("aria-valuetext", written.join("; "));
}

function stop() {
  cancelAnimationFrame(playing);
  playing = 0;
  $("play").textContent = "Play";
}

function play() {
  if (playing) return stop();
  if (clock >= longest()) clock = 0;
  inspect(null);
  $("play").textContent = "Pause";
  reveal();
  let before = performance.now();
  const full = Math.max(1, ...cards.map((card) => card.sample.full_depth));
  const frame = (now) => { // at speed 1, a token of full depth takes an eighth of a second
    clock += ((now - before) / 125) * full * Number($("speed").value);
    before = now;
    reveal();
    if (clock < longest()) playing = requestAnimationFrame(frame);
    else stop();
  };
  playing = requestAnimationFrame(frame);
}

// ---- figures: a cross-hair that reads the curves ---------------------------------------------------------------------

function readCurves(figure) {
  const plot = figure.querySelector("g[data-x]"), lines = plot ? [...plot.querySelectorAll("polyline[points*=',']")] : [];
  if (!lines.length) return;
  const axis = (text) => { // where a value is drawn -> the value, as a label
    const [low, high, start, end] = text.split(" ").map(Number);
    const value = (at) => low + ((at - start) / (end - start)) * (high - low);
    return { start, end, label: (at) => String(Number(value(at).toPrecision(4))) };
  };
  const x = axis(plot.dataset.x), y = axis(plot.dataset.y);
  const curves = lines.map((line) => [line.dataset.name, [...line.points].map((p) => [p.x, p.y])]);
  const cross = document.createElementNS(plot.namespaceURI, "path"), box = el("div", { className: "readout", hidden: true });
  const svg = plot.ownerSVGElement;
  cross.setAttribute("class", "cross");
  plot.append(cross);
  figure.append(box);
  svg.addEventListener("pointermove", (event) => {
    const here = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - here.x) < Math.abs(a[0] - here.x) ? b : a));
    const near = curves.map(([name, points]) => [name, nearest(points)]), at = near[0][1][0];
    cross.setAttribute("d", `M${at} ${y.end}V${y.start}`);
    box.replaceChildren(el("div", { className: "faint", textContent: `at ${x.label(at)}` }),
      ...near.map(([name, point]) => el("div", { textContent: `${name}  ${y.label(point[1])}` })));
    box.hidden = false;
    const frame = svg.getBoundingClientRect(), before = at < (x.start + x.end) / 2;
    box.style.left = before ? `${event.clientX - frame.left + 14}px` : "auto";
    box.style.right = before ? "auto" : `${frame.right - event.clientX + 14}px`;
  });
  svg.addEventListener("pointerleave", () => { box.hidden = true; cross.removeAttribute("d"); });
}

// ---- the figures of the runs, as evaluate.py writes them --------------------------------------------------------------

const TILES = ["accuracy", "mean depth of", "opaque serial depth", "blocks run", "KL to the", "tokens written", "steps written"];

function showTiles() { // for a single run: the first lines of its table in large type, the first student above the base
  const [[head, ...lines]] = data.table, tile = (title, figure, below) => el("div", {}, el("dt", { textContent: title }),
    el("dd", { textContent: figure }), el("dd", { className: "faint", textContent: below }));
  const found = TILES.map((title) => lines.find((line) => line[0].startsWith(title))).filter(Boolean);
  const tiles = found.map(([title, base, student]) => tile(title.split(",")[0], student, `base ${base}`));
  if (head.length > 2) $("summary").append(el("h3", { textContent: head[2] }), el("dl", { className: "tiles" }, ...tiles));
}

function tableOf([corner, ...names], lines) {
  const top = el("tr", {}, el("td", { textContent: corner }), ...names.map((name) => el("th", { scope: "col", textContent: name })));
  const body = lines.map(([title, ...cells]) => el("tr", {}, el("th", { scope: "row", textContent: title }),
    ...cells.map((text) => el("td", { textContent: text }))));
  return el("table", {}, el("thead", {}, top), el("tbody", {}, ...body));
}

function showTable() { // one row per figure, one column per variant; below, the reasons for dashes
  const [[head, ...lines], reasons] = data.table, first = lines.findIndex((line) => line[0].startsWith("steps written")) + 1;
  const [headlines, details] = first ? [lines.slice(0, first), lines.slice(first)] : [lines, []], box = $("table").querySelector("div");
  box.append(tableOf(head, headlines));
  if (details.length) box.append(el("details", {}, el("summary", { textContent: "All figures" }), tableOf(head, details)));
  $("table").querySelector("ul").append(...reasons.map((textContent) => el("li", { textContent })));
  $("table").hidden = false;
}

// ---- settings, kept from visit to visit where the browser allows it --------------------------------------------------

function remember(key, value) {
  try { localStorage.setItem(`nanoexit-${key}`, value); } catch { /* a file: page may have no storage */ }
}

function recall(key) {
  try { return localStorage.getItem(`nanoexit-${key}`); } catch { return null; }
}

function setScale(scale) {
  $("scale").value = root.dataset.scale = scale;
  remember("scale", scale);
}

function isDark() {
  return (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

function setTheme(theme) {
  if (theme) { root.dataset.theme = theme; remember("theme", theme); }
  $("theme").textContent = isDark() ? "Light" : "Dark";
}

function showVariants() { // those of this prompt: a run may keep one rollout per step, each for a different prompt
  const labels = [...new Set(prompts[current].samples.map((sample) => sample.label))];
  $("variants").replaceChildren(...(labels.length < 2 ? [] : labels).map((label) => {
    const chip = el("button", { type: "button", textContent: label });
    chip.setAttribute("aria-pressed", !hidden.has(label));
    chip.addEventListener("click", () => {
      hidden.has(label) ? hidden.delete(label) : hidden.add(label);
      chip.setAttribute("aria-pressed", !hidden.has(label));
      showPrompt();
    });
    return chip;
  }));
}

function showResponses() {
  $("responses").hidden = false;
  root.classList.toggle("single", prompts.length === 1); // one prompt needs no picker
  fillPicker();
  choose(0);
  $("search").addEventListener("input", fillPicker);
  $("picker").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) choose(Number(item.id.slice(1)), true);
  });
  $("picker").addEventListener("keydown", moveInPicker);
  $("play").addEventListener("click", play);
  $("seek").addEventListener("input", () => {
    stop();
    clock = Number($("seek").value);
    reveal();
  });
}

setTheme(recall("theme"));
$("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme());
document.querySelectorAll(".figure").forEach(readCurves);
addEventListener("scroll", followFocus, { passive: true });
load().then(() => {
  setScale(recall("scale") === "safe" ? "safe" : "heat");
  $("scale").addEventListener("change", () => setScale($("scale").value));
  if (data.table && data.single) showTiles();
  if (data.table) showTable();
  if (prompts.length) showResponses();
  root.dataset.ready = "";
}).catch((error) => {
  $("broken").hidden = false;
  $("broken").textContent = `This page's data cannot be read: ${error.message}. It needs a browser from 2023 or later.`;
});
