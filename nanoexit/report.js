"use strict";
// The page's behaviour. Whatever a model or a prompt wrote reaches the document by textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// ---- unpacking: columns of fixed-width base-36 numbers, "z..." where there is none -----------------------------------

const slice = (text, index, width) => text.slice(index * width, (index + 1) * width);
const chance = (text) => (text === "zz" ? null : parseInt(text, 36) / 1000);
const word = (text) => data.words[parseInt(text, 36)];
const percent = (p) => (p === null ? "not asked" : p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(1)} %`);
const color = (depth, sample) => `var(--d${depth}of${sample.full_depth})`;
const KINDS = { r: "reasoning", a: "answer", p: "punctuation" };

function unpack(sample) {
  const length = sample.kinds.length, each = (f) => Array.from({ length }, (_, i) => f(i));
  sample.words = each((i) => word(slice(sample.tokens, i, data.width)));
  sample.depth = each((i) => parseInt(slice(sample.depths, i, 2), 36));
  sample.text = sample.words.join("");
  sample.ends = []; // blocks run when token i is written: replay gives every token the time that its depth costs
  sample.depth.reduce((sum, depth) => (sample.ends.push(sum + depth), sum + depth), 0);
}

function headsOf(sample, index) {
  const row = slice(sample.heads, index, 2 * sample.exit_layers.length);
  return sample.exit_layers.map((depth, i) => [depth, chance(slice(row, i, 2))]);
}

function topOf(sample, index) {
  const one = data.width + 2, row = slice(sample.top, index, 5 * one);
  const pairs = Array.from({ length: 5 }, (_, i) => slice(row, i, one)).filter((text) => text && !text.endsWith("zz"));
  return pairs.map((text) => [word(text.slice(0, data.width)), chance(text.slice(data.width))]);
}

// ---- state and the prompt picker -------------------------------------------------------------------------------------

const hidden = new Set(); // labels of variants that are switched off
let current = 0, cards = [], clock = Infinity, playing = 0;

function shown(text) { // whitespace that can be seen
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "(empty)";
}

function verdict(sample) {
  return sample.correct === null ? ["", ""] : sample.correct ? ["✓ right", "right"] : ["✗ wrong", "wrong"];
}

function fillPicker() {
  const wanted = $("search").value.trim().toLowerCase();
  const textsOf = (entry) => [entry.prompt, entry.answer ?? "", entry.id ?? "", ...entry.samples.map((s) => s.text)];
  const found = data.prompts.map((entry, index) => [entry, index]).filter(([entry]) =>
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
  const all = data.prompts.length;
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
  const entry = data.prompts[current];
  $("prompt").replaceChildren(entry.prompt);
  if (entry.answer !== null) $("prompt").append(el("small", { textContent: `Answer: ${entry.answer}` }));
  inspect(null);
  const samples = entry.samples.filter((sample) => !hidden.has(sample.label));
  cards = samples.map(makeCard);
  $("cards").replaceChildren(...cards.map((card) => card.node));
  const depths = new Map(samples.map((s) => [`${s.full_depth}/${s.exit_layers}`, s]));
  $("legend").replaceChildren(...[...depths.values()].flatMap((sample) => legendOf(sample, depths.size > 1)));
  $("seek").max = longest();
  reveal();
}

function legendOf(sample, named) {
  const exits = sample.exit_layers.length ? sample.exit_layers : sample.depth; // a policy may exit where there is no head
  const depths = [...new Set([...exits, sample.full_depth])].sort((a, b) => a - b);
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
  const facts = [`mean depth ${mean.toFixed(1)} of ${sample.full_depth}`, `${count} tokens`];
  if (sample.finish === "length") facts.push("cut off");
  const rewards = Object.entries(sample.rewards).map(([part, value]) => `${part} ${Number(value.toPrecision(3))}`);
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

function skyline(sample) { // the depths of a response at a glance: a bar a token, or a bar for the mean of several
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

function bars(title, rows) {
  const table = el("table", {}, el("caption", { textContent: title }));
  for (const [name, p, tint, chosen] of rows) {
    const bar = el("div", { className: "bar" });
    bar.style.setProperty("--p", `${100 * (p ?? 0)}%`);
    bar.style.setProperty("--c", tint);
    const className = p === null ? "unasked" : chosen ? "chosen" : "";
    const cells = [el("td", { textContent: name }), el("td", {}, bar), el("td", { textContent: percent(p) })];
    table.append(el("tr", { className }, ...cells));
  }
  return table;
}

function inspect(card, index = -1) {
  const box = $("inspect");
  box.hidden = index < 0;
  if (index < 0) return;
  const { sample, spans } = card, span = spans[index], depth = sample.depth[index];
  const where = [KINDS[sample.kinds[index]], `token ${index + 1} of ${spans.length}`].filter(Boolean).join(", ");
  const title = `depth ${depth} of ${sample.full_depth} · ${where}`, token = sample.words[index];
  box.replaceChildren(el("h4", { textContent: shown(token) }), el("p", { textContent: title }));
  const heads = headsOf(sample, index).map(([d, p]) => [`depth ${d}`, p, color(d, sample), d === depth]);
  const top = topOf(sample, index).map(([text, p]) => [shown(text), p, "var(--soft)", text === token]);
  if (sample.heads && heads.length) box.append(bars("Chance to exit at each head", heads));
  if (top.length) box.append(bars("Most likely tokens", top));
  span.setAttribute("aria-describedby", "inspect");
  const at = span.getClientRects()[0], below = at.bottom + 10 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(12, Math.min(at.left - 8, root.clientWidth - box.offsetWidth - 12))}px`;
  box.style.top = `${below ? at.bottom + 10 : Math.max(12, at.top - 10 - box.offsetHeight)}px`;
}

function followFocus() { // the page scrolled: the panel goes with a token in focus, and away from one under the pointer
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
  const svg = figure.querySelector("svg[data-x]"), lines = svg ? [...svg.querySelectorAll("polyline")] : [];
  if (!lines.length) return;
  const [x0, x1, left, right] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1, bottom, top] = svg.dataset.y.split(" ").map(Number);
  const curves = lines.map((line) => [line.dataset.name, [...line.points].map((p) => [p.x, p.y])]);
  const cross = document.createElementNS(svg.namespaceURI, "path"), box = el("div", { className: "readout", hidden: true });
  cross.setAttribute("class", "cross");
  svg.append(cross);
  figure.append(box);
  const round = (v) => Number(v.toPrecision(4));
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    const nearest = (points) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    const near = curves.map(([name, points]) => [name, nearest(points)]), at = near[0][1][0];
    const value = (y) => round(y0 + ((y - bottom) / (top - bottom)) * (y1 - y0));
    cross.setAttribute("d", `M${at} ${top}V${bottom}`);
    const place = round(x0 + ((at - left) / (right - left)) * (x1 - x0));
    box.replaceChildren(el("div", { className: "faint", textContent: `at ${place}` }),
      ...near.map(([name, [, y]]) => el("div", { textContent: `${name}  ${value(y)}` })));
    box.hidden = false;
    const before = at < (left + right) / 2;
    box.style.left = before ? `${event.clientX - frame.left + 14}px` : "auto";
    box.style.right = before ? "auto" : `${frame.right - event.clientX + 14}px`;
  });
  svg.addEventListener("pointerleave", () => { box.hidden = true; cross.removeAttribute("d"); });
}

// ---- settings, kept from visit to visit where the browser allows it --------------------------------------------------

function remember(key, value) {
  try { localStorage.setItem(`nanoexit-${key}`, value); } catch { /* a file: page may have no storage */ }
}

function recall(key) {
  try { return localStorage.getItem(`nanoexit-${key}`); } catch { return null; }
}

function setScale(scale) {
  root.dataset.scale = $("scale").value = scale;
  remember("scale", scale);
}

function isDark() {
  return (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
}

function setTheme(theme) {
  if (theme) { root.dataset.theme = theme; remember("theme", theme); }
  $("theme").textContent = isDark() ? "Light" : "Dark";
}

function showVariants() { // those that this prompt has: a run may keep one rollout a step, each of another prompt
  const labels = [...new Set(data.prompts[current].samples.map((sample) => sample.label))];
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

function showLeftOut() {
  const names = { top: "the likeliest tokens of the last", heads: "the chances of heads of the last", responses: "the last" };
  const parts = Object.entries(data.left_out).map(([key, count]) => `${names[key]} ${count} responses`);
  if (parts.length) $("left-out").textContent = `Left out, to keep this page light: ${parts.join("; ")}.`;
}

setScale(recall("scale") === "safe" ? "safe" : "heat");
setTheme(recall("theme"));
$("scale").addEventListener("change", () => setScale($("scale").value));
$("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme());
document.querySelectorAll(".figure").forEach(readCurves);
addEventListener("scroll", followFocus, { passive: true });

if (data.prompts.length) {
  $("responses").hidden = false;
  data.prompts.forEach((entry) => entry.samples.forEach(unpack));
  root.classList.toggle("single", data.prompts.length === 1); // one prompt needs no picker
  showLeftOut();
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
