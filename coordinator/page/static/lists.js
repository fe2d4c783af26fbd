// Plan, events and texts: tables and lists of words.

import { byId, clock, DASH, el, memory, number, say, seconds, show } from "./draw.js";

// ---- plan ----

export function drawPlan(rows, plannings) {
  show(byId("plan-panel"), Boolean(rows?.length || plannings?.length));
  if (!rows?.length) return;
  const columns = [
    ["device", (row) => row.device], ["blocks", (row) => row.blocks], ["ranks", ranks],
    ["adapters", (row) => row.adapters], ["bound by", (row) => row.bound_by ?? DASH],
    ["needs", (row) => memory(row.needs_bytes)], ["has", (row) => memory(row.budget_bytes)],
    ["wave", (row) => seconds(row.wave_s)],
  ];
  const heads = columns.map(([name]) => el("th", { scope: "col" }, name));
  const body = rows.map((row) => el("tr", {}, ...columns.map(([, cell]) => el("td", {}, String(cell(row) ?? DASH)))));
  byId("plan").replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...body)));
  const last = plannings?.at(-1);
  const waves = plannings?.findLast((one) => one.wave_s !== null && one.wave_s !== undefined);
  say(byId("plan-told"), [last ? `since round ${last.round}` : "", waves ? `a wave takes ${seconds(waves.wave_s)}` : ""].filter(Boolean).join(", "));
  byId("plannings").replaceChildren(...[...(plannings ?? [])].reverse().map(planning));
}

function ranks(row) {
  if (row.most_rank === null) return DASH;
  if (row.least_rank === row.most_rank) return row.most_rank;
  return `${row.least_rank}${DASH}${row.most_rank}, mean ${number(row.mean_rank, 2)}`;
}

function planning(one) {
  const lines = [...one.reasons, ...one.moved, ...Object.entries(one.refused).map(([name, why]) => `${name} refused: ${why}`)];
  return el("li", {}, el("b", {}, `round ${one.round}`), ...lines.map((line) => el("span", {}, line)));
}

// ---- events ----

const TONES = ["all", "trouble", "devices", "run"];
const WANTS = { trouble: "trouble", devices: "device", run: "run" };
let tone = "all", events = [];

export function drawEvents(rows) {
  events = rows;
  show(byId("events-panel"), rows.length > 0);
  const words = byId("event-filter").value.trim().toLowerCase();
  const found = rows.filter((row) => (tone === "all" || row.tone === WANTS[tone])
    && `${row.device ?? ""} ${row.text} ${row.kind}`.toLowerCase().includes(words)).reverse();
  const list = byId("events");
  const items = found.slice(0, 300).map((row) => el("li", { class: row.tone },
    el("time", { title: row.time }, clock(row.time)), el("b", {}, row.device ?? ""), el("span", {}, row.text)));
  if (!items.length) items.push(el("li", { class: "muted" }, el("span", {}, "none")));
  list.replaceChildren(...items);
}

for (const each of TONES) {
  const button = el("button", { type: "button", "aria-pressed": each === tone ? "true" : "false" }, each);
  button.addEventListener("click", () => {
    tone = each;
    for (const other of byId("event-tone").children) other.setAttribute("aria-pressed", String(other === button));
    drawEvents(events);
  });
  byId("event-tone").append(button);
}
byId("event-filter").addEventListener("input", () => drawEvents(events));

// ---- texts ----

function when(round) {
  if (round === null) return "";
  return round === 0 ? "before training" : `after ${round} round${round === 1 ? "" : "s"}`;
}

export function drawSamples(rows) {
  show(byId("samples-panel"), Boolean(rows?.length));
  if (!rows?.length) return;
  const prompts = new Map();
  for (const row of rows) {
    if (!prompts.has(row.prompt)) prompts.set(row.prompt, []);
    prompts.get(row.prompt).unshift(row);
  }
  byId("samples").replaceChildren(...[...prompts].map(([prompt, texts]) => el("article", { class: "sample" },
    el("h3", {}, prompt ?? ""), ...texts.slice(0, 4).map((row) => el("p", {},
      el("b", {}, when(row.round)), el("span", {}, row.text ?? ""))))));
}
