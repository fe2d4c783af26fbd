// Devices as cards: blocks, ranks, pace, waiting, link, memory, heat, power.

import { byId, bytes, clock, DOT, DOWN, el, fixed, memory, number, ramp, say, seconds, show, svg, UP } from "./draw.js";

const FEW = 12, MANY = 24, AT_ONCE = 60;
const TONES = ["late", "off", "coming", "ready", "training", "rest", "done"];
const cards = new Map();
let shown = AT_ONCE, drawn = "";

export function drawCards(devices, model, run) {
  show(byId("devices-panel"), devices.length > 0);
  if (!devices.length || !model) return;
  const words = byId("device-filter").value.trim().toLowerCase();
  const found = devices.filter((one) => matches(one, words)).sort(ORDERS[byId("device-order").value]);
  const seen = found.slice(0, shown);
  show(byId("device-filter"), devices.length > FEW);
  show(byId("device-order"), devices.length > FEW);
  byId("cards").classList.toggle("many", devices.length > MANY);
  say(byId("devices-count"), counted(devices, found.length));
  const most = mostRank(model);
  drawLegend(most, model);
  for (const one of seen) {
    if (!cards.has(one.name)) cards.set(one.name, makeCard(one.name));
    fillCard(cards.get(one.name), one, model, most, run);
  }
  const order = seen.map((one) => one.name).join("/");
  if (order !== drawn) {
    byId("cards").replaceChildren(...seen.map((one) => cards.get(one.name).card));
    drawn = order;
  }
  for (const name of cards.keys()) if (!devices.some((one) => one.name === name)) cards.delete(name);
  show(byId("more-cards"), found.length > seen.length);
  say(byId("more-cards"), `show ${found.length - seen.length} more`);
  again = () => drawCards(devices, model, run);
}

let again = () => {};
byId("device-filter").addEventListener("input", () => { shown = AT_ONCE; again(); });
byId("device-order").addEventListener("change", () => again());
byId("more-cards").addEventListener("click", () => { shown += 240; again(); });

const share = (one) => {
  const all = (one.compute_s ?? 0) + (one.wait_s ?? 0);
  return all > 0 ? one.wait_s / all : 0;
};
const byName = (one, other) => one.name.localeCompare(other.name, "en", { numeric: true });
const ORDERS = {
  name: byName,
  tone: (one, other) => TONES.indexOf(one.tone) - TONES.indexOf(other.tone) || byName(one, other),
  tokens_per_s: (one, other) => (other.tokens_per_s ?? -1) - (one.tokens_per_s ?? -1) || byName(one, other),
  wait: (one, other) => share(other) - share(one) || byName(one, other),
};

function matches(one, words) {
  const text = `${one.name} ${one.board.board ?? ""} ${one.doing} ${one.tone}`.toLowerCase();
  return words.split(/\s+/).every((word) => text.includes(word));
}

function counted(devices, found) {
  const counts = TONES.map((tone) => [tone, devices.filter((one) => one.tone === tone).length]);
  const words = counts.filter(([, count]) => count).map(([tone, count]) => `${count} ${TONE_WORDS[tone]}`);
  return (found < devices.length ? [`${found} found`, ...words] : words).join(`  ${DOT}  `);
}

const TONE_WORDS = {
  late: "late", off: "gone", coming: "on the way", ready: "ready", training: "training", rest: "at rest",
  done: "done",
};

// ---- one card ----

function makeCard(name) {
  const parts = {
    dot: el("span", { class: "dot" }), name: el("h3", {}, name), board: el("span", { class: "board" }),
    doing: el("span", { class: "doing" }), pace: el("span", { class: "doing pace" }), blocks: svg("svg", { class: "blocks", role: "img" }),
    plan: el("p", { class: "small muted plan" }), trouble: el("p", { class: "trouble small" }),
    numbers: el("dl", { class: "numbers" }), work: el("div", { class: "bar" }),
    workWords: el("span"), memory: el("div", { class: "bar" }), memoryWords: el("span"), cells: new Map(),
  };
  parts.work.append(el("i", { class: "compute" }), el("i", { class: "wait" }));
  parts.memory.append(el("i", { class: "taken" }));
  parts.card = el("article", { class: "card", tabindex: "0" },
    el("div", { class: "who" }, parts.dot, parts.name, parts.board, parts.doing, parts.pace),
    parts.blocks, parts.plan,
    el("div", { class: "meter work" }, parts.workWords, parts.work),
    el("div", { class: "meter memory" }, parts.memoryWords, parts.memory),
    parts.numbers, parts.trouble);
  parts.card.addEventListener("click", () => parts.card.classList.toggle("open"));
  parts.card.addEventListener("keydown", (event) => {
    if (event.key === "Enter") parts.card.classList.toggle("open");
  });
  return parts;
}

function fillCard(parts, one, model, most, run) {
  parts.card.dataset.tone = one.tone;
  parts.dot.className = `dot ${one.tone}`;
  say(parts.board, [one.board.board, one.board.power_mode].filter(Boolean).join(", "));
  say(parts.doing, one.doing || TONE_WORDS[one.tone]);
  parts.doing.title = one.doing;
  say(parts.pace, one.tone === "training" && one.tokens_per_s !== null ? `${number(one.tokens_per_s)} t/s` : "");
  drawBlocks(parts.blocks, one, model, most);
  say(parts.plan, planWords(one, model));
  drawWork(parts, one);
  drawMemory(parts, one);
  for (const [name, value, isWide] of NUMBERS) {
    if (!parts.cells.has(name)) {
      const cell = el("dd");
      parts.cells.set(name, { row: el("div", { class: isWide ? "line" : null }, el("dt", {}, name), cell), cell });
      parts.numbers.append(parts.cells.get(name).row);
    }
    const text = value(one, run), { row, cell } = parts.cells.get(name);
    show(row, text !== null);
    say(cell, text ?? "");
  }
  parts.cells.get("temperature").row.classList.toggle("hot", one.throttled === 1 || one.temperature > 85);
  show(parts.trouble, Boolean(one.trouble));
  say(parts.trouble, one.trouble ? `${clock(one.trouble_time)}  ${one.trouble}` : "");
}

const rate = (value) => (value === null || value === undefined ? null : `${bytes(value)}/s`);
const NUMBERS = [
  ["step", (one) => (one.step === null ? null : one.step.toLocaleString("en"))],
  ["loss", (one) => (one.loss === null ? null : fixed(one.loss, 3))],
  ["tokens/s", (one) => (one.tokens_per_s === null ? null : number(one.tokens_per_s))],
  ["temperature", (one) => (one.temperature === null || one.temperature === undefined ? null
    : `${Math.round(one.temperature)} \u00b0C${one.throttled === 1 ? ", throttled" : ""}`)],
  ["power", (one) => (one.power === null || one.power === undefined ? null : `${number(one.power)} W`)],
  ["energy", (one) => (one.energy === null || one.energy === undefined ? null : `${number(one.energy)} J`)],
  ["link now", (one) => (rate(one.up_bytes_per_s) === null ? null
    : `${UP} ${rate(one.up_bytes_per_s)}  ${DOWN} ${rate(one.down_bytes_per_s)}`), true],
  ["link offers", (one) => (rate(one.board.up_bytes_per_s) === null ? null
    : `${UP} ${rate(one.board.up_bytes_per_s)}  ${DOWN} ${rate(one.board.down_bytes_per_s)}`), true],
  ["in the run", (one) => `${UP} ${bytes(one.bytes_up)}  ${DOWN} ${bytes(one.bytes_down)}`, true],
];

function drawWork(parts, one) {
  const isKnown = typeof one.compute_s === "number" && typeof one.wait_s === "number" && one.compute_s + one.wait_s > 0;
  show(parts.work.parentElement, isKnown);
  if (!isKnown) return;
  const part = share(one);
  parts.work.children[0].style.width = `${100 * (1 - part)}%`;
  parts.work.children[1].style.width = `${100 * part}%`;
  say(parts.workWords, `last ${one.is_round ? "round" : "step"}: computed ${seconds(one.compute_s)}, waited ${seconds(one.wait_s)}`);
}

function drawMemory(parts, one) {
  const total = one.memory_total, isBoard = typeof total === "number" && typeof one.memory_available === "number";
  show(parts.memory.parentElement, isBoard || one.peak_bytes !== null);
  const taken = isBoard ? total - one.memory_available : null;
  show(parts.memory, isBoard);
  if (isBoard) {
    parts.memory.children[0].style.width = `${(100 * taken) / total}%`;
    parts.memory.classList.toggle("full", taken / total > 0.92);
  }
  const program = one.peak_bytes === null ? "" : `program ${memory(one.peak_bytes)}`;
  const board = isBoard ? `board ${memory(taken)} of ${memory(total)}` : "";
  say(parts.memoryWords, [board, program].filter(Boolean).join(", "));
}

// ---- blocks and ranks ----

function planWords(one, model) {
  if (one.split === null) return "no plan yet";
  const of = model.blocks === null ? "" : ` of ${model.blocks}`;
  const ranks = one.ranks === "0" ? "frozen" : one.ranks ? `rank ${one.ranks}` : "";
  return [`${one.split}${of} blocks`, ranks, one.codec].filter(Boolean).join(`  ${DOT}  `);
}

function mostRank(model) {
  let most = 1;
  for (const strip of Object.values(model.strips)) for (const block of strip) for (const rank of block) most = Math.max(most, rank);
  return most;
}

// A column for each block of the model: cells for its adapters where the device holds it.
function drawBlocks(picture, one, model, most) {
  const columns = model.blocks ?? Math.max(model.deepest, one.split ?? 0), strip = model.strips[one.name] ?? [];
  const key = JSON.stringify([columns, model.kinds.length, most, strip]);
  if (picture.dataset.key === key) return;
  picture.dataset.key = key;
  const rows = Math.max(1, model.kinds.length), gap = columns > 48 ? 1 : 2;
  const tall = 50, each = tall / rows;
  picture.setAttribute("viewBox", `0 0 ${columns * 10} ${tall + 6}`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-label", `${one.split ?? 0} of ${columns} blocks on the device`);
  const drawnParts = [];
  for (let block = 0; block < columns; block += 1) {
    const x = block * 10 + gap / 2, width = 10 - gap, isHere = block < strip.length;
    drawnParts.push(svg("rect", { x, width, y: 0, height: tall, class: isHere ? "here" : "there" }));
    if (!isHere) continue;
    strip[block].forEach((rank, row) => {
      const kind = model.kinds[row] ?? "";
      const words = rank < 0 ? "no adapter" : rank === 0 ? "frozen" : `rank ${rank}`;
      const cell = svg("rect", { x, width, y: row * each, height: 0.94 * each, class: rank > 0 ? "rank" : "none",
        fill: rank > 0 ? ramp(most > 1 ? (rank - 1) / (most - 1) : 1) : null },
        svg("title", {}, `block ${block + 1}, ${kind}: ${words}`));
      drawnParts.push(cell);
    });
  }
  const split = one.split ?? 0;
  drawnParts.push(svg("rect", { x: 0, width: split * 10, y: tall + 2, height: 4, class: "device-line" }));
  drawnParts.push(svg("rect", { x: split * 10, width: Math.max(0, (columns - split) * 10), y: tall + 2, height: 4, class: "server-line" }));
  picture.replaceChildren(...drawnParts);
}

function drawLegend(most, model) {
  const key = `${most} ${model.kinds.length}`, legend = byId("rank-legend");
  if (legend.dataset.key === key) return;
  legend.dataset.key = key;
  const scale = svg("svg", { class: "scale", viewBox: "0 0 100 10", preserveAspectRatio: "none" },
    ...Array.from({ length: 20 }, (_, n) => svg("rect", { x: n * 5, width: 5.2, y: 0, height: 10, fill: ramp(n / 19) })));
  const pair = (key, ...words) => el("span", { class: "pair" }, key, ...words);
  legend.replaceChildren(pair(el("i", { class: "key device-line" }), "on the device"),
    pair(el("i", { class: "key server-line" }), "on the coordinator"),
    ...(most > 1 ? [pair("rank 1", scale, `${most}`)] : []));
}
