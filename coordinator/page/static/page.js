// The page: one stream of what has changed, and who draws which part of it.

import { drawCards } from "./cards.js";
import { drawCurves, drawImportance, redrawPlots } from "./charts.js";
import { byId, bytes, DASH, DOWN, el, fixed, moment, number, say, seconds, show, UP } from "./draw.js";
import { drawEvents, drawPlan, drawSamples } from "./lists.js";
import { drawTimeline } from "./timeline.js";

const known = new Map();
const QUIET_MS = 25000; // the server says something every 10 s
let stream = null, heard = 0, tries = 0, told = 0, hasEnded = false;

// ---- what comes ----

function listen() {
  const run = new URLSearchParams(location.search).get("run");
  stream?.close();
  stream = new EventSource(run ? `events?run=${encodeURIComponent(run)}` : "events");
  heard = Date.now();
  let isFirst = true;
  stream.addEventListener("state", (event) => {
    heard = Date.now();
    tries = 0;
    const { set, gone } = JSON.parse(event.data);
    if (isFirst) { // a stream begins with everything
      known.clear();
      isFirst = false;
    }
    for (const name of gone) known.delete(name);
    for (const [name, value] of Object.entries(set)) known.set(name, value);
    told = Date.now();
    draw(new Set([...Object.keys(set), ...gone]));
  });
  stream.addEventListener("beat", () => { heard = Date.now(); tries = 0; });
  stream.addEventListener("end", () => { hasEnded = true; });
  stream.addEventListener("open", () => { isFirst = true; hasEnded = false; });
  stream.addEventListener("error", () => {
    if (stream.readyState === EventSource.CLOSED) again();
  });
}

// The browser itself tries again where the network failed; here where it has given up.
async function again() {
  stream.close();
  const answer = await fetch("runs", { cache: "no-store" }).catch(() => null);
  if (answer?.status === 401) { location.href = "login"; return; }
  tries += 1;
  setTimeout(listen, Math.min(10000, 1000 * tries));
}

function watch() {
  const isLost = stream.readyState !== EventSource.OPEN || Date.now() - heard > QUIET_MS;
  say(byId("link"), !isLost ? "" : hasEnded ? "this page has ended with its run" : "connection lost, trying again");
  document.body.classList.toggle("lost", isLost && !hasEnded);
  document.body.classList.toggle("ended", isLost && hasEnded);
  if (Date.now() - heard > QUIET_MS && stream.readyState === EventSource.OPEN) listen();
  if (known.has("run")) drawFacts();
}

// ---- what is shown ----

const PARTS = [
  [["run", "totals", "model"], drawHead],
  [["device:", "model", "run"], () => drawCards(devices(), known.get("model"), known.get("run"))],
  [["timeline", "device:"], () => drawTimeline(known.get("timeline"), devices(), known.get("run"))],
  [["curves", "run"], () => drawCurves(known.get("curves"), known.get("run"))],
  [["importance"], () => drawImportance(known.get("importance"))],
  [["plan", "plannings", "run"], () => drawPlan(known.get("plan"), known.get("plannings"))],
  [["events:"], () => drawEvents(pieces("events:"))],
  [["samples"], () => drawSamples(known.get("samples"))],
];

function draw(names) {
  for (const [wants, drawPart] of PARTS) {
    if (![...names].some((name) => wants.some((want) => name === want || (want.endsWith(":") && name.startsWith(want))))) continue;
    try {
      drawPart();
    } catch (error) { // one part that cannot be drawn hides no other
      console.error(error);
    }
  }
}

const devices = () => [...known].filter(([name]) => name.startsWith("device:")).map(([, card]) => card);
const pieces = (start) => [...known].filter(([name]) => name.startsWith(start))
  .sort(([one], [other]) => Number(one.slice(start.length)) - Number(other.slice(start.length)))
  .flatMap(([, rows]) => rows);

function drawHead() {
  const run = known.get("run");
  document.title = `${run.name} ${DASH} ${run.state}`;
  say(byId("run-name"), run.name);
  say(byId("run-state"), run.state);
  byId("run-dot").className = `dot ${run.tone}`;
  const share = run.total_steps ? Math.min(100, (100 * run.step) / run.total_steps) : 0;
  byId("progress-bar").style.width = `${share}%`;
  byId("progress").setAttribute("aria-valuenow", Math.round(share));
  drawFacts();
}

const FACTS = [
  ["round", (run) => [`${run.round} of ${run.rounds}`, `step ${run.step.toLocaleString("en")} of ${run.total_steps.toLocaleString("en")}`]],
  ["loss", (run) => [fixed(run.loss, 3), run.first_loss === null ? "" : `was ${fixed(run.first_loss, 3)} before`]],
  ["devices", (_run, all) => [`${all.devices}`, `${all.training} training`]],
  ["tokens/s", (run, all) => [number(all.tokens_per_s), run.steps_per_s ? `${number(run.steps_per_s, 2)} steps/s` : ""]],
  ["traffic", (_run, all) => [`${UP} ${bytes(all.bytes_up)}`, `${DOWN} ${bytes(all.bytes_down)}`]],
  ["power", (run, all) => power(run, all)],
  ["time", (run) => left(run)],
  ["method", (run) => [run.preset ?? run.how.aggregation, `${run.model}, labels: ${run.how.labels}`]],
];

function power(run, all) {
  const used = all.energy === null ? DASH : all.energy < 1e4 ? `${number(all.energy)} J` : `${number(all.energy / 1000)} kJ`;
  return run.is_running ? [all.power === null ? DASH : `${number(all.power)} W`, all.energy === null ? "" : `${used} so far`] : [used, all.energy === null ? "" : "all boards that tell"];
}

function left(run) {
  const began = run.began ? moment(run.began) : NaN, end = run.is_running ? Date.now() : moment(run.changed);
  const since = Number.isNaN(began) ? DASH : seconds((end - began) / 1000);
  if (run.run_left_s === null) return [since, run.is_running ? "so far" : "from first to last"];
  const passed = (Date.now() - told) / 1000;
  const round = run.round_left_s === null ? `${since} so far` : `round: ${seconds(Math.max(0, run.round_left_s - passed))}`;
  return [`${seconds(Math.max(0, run.run_left_s - passed))} left`, round];
}

const cells = new Map();

function drawFacts() {
  const run = known.get("run"), all = known.get("totals");
  for (const [name, words] of FACTS) {
    if (!cells.has(name)) {
      const cell = { value: el("strong"), below: el("small") };
      cells.set(name, cell);
      byId("facts").append(el("div", { class: "fact" }, el("span", {}, name), cell.value, cell.below));
    }
    const [value, below] = words(run, all);
    say(cells.get(name).value, value);
    say(cells.get(name).below, below);
  }
}

// ---- several runs, light and dark ----

async function listRuns() {
  const answer = await fetch("runs", { cache: "no-store" }).catch(() => null);
  if (!answer?.ok) return;
  const runs = await answer.json(), choice = byId("runs");
  show(choice, runs.length > 1);
  show(byId("run-name"), runs.length <= 1);
  if (runs.length <= 1 || document.activeElement === choice) return;
  const now = new URLSearchParams(location.search).get("run") ?? runs[0].name;
  choice.replaceChildren(...runs.map((one) => {
    const words = one.round ? `${one.name}: ${one.state}, round ${one.round}/${one.rounds}` : `${one.name}: ${one.state}`;
    return el("option", { value: one.name, selected: one.name === now ? "" : null }, words);
  }));
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say(byId("theme"), theme);
  redraw();
}

function redraw() {
  if (!known.size) return;
  redrawPlots(known.get("curves"), known.get("run"), known.get("importance"));
  drawTimeline(known.get("timeline"), devices(), known.get("run"));
}

byId("theme").addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(byId("theme").textContent) + 1) % THEMES.length];
  try { localStorage.setItem("theme", next); } catch { /* not kept, then */ }
  setTheme(next);
});
byId("runs").addEventListener("change", (event) => {
  location.search = `?run=${encodeURIComponent(event.target.value)}`;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(redraw, 150);
});

let theme = "auto";
try { theme = localStorage.getItem("theme") ?? "auto"; } catch { /* none is kept */ }
setTheme(THEMES.includes(theme) ? theme : "auto");
listen();
listRuns();
setInterval(watch, 1000);
setInterval(listRuns, 10000);
