// The latest seconds: steps of devices, and what the coordinator computes, on one time axis.

import { byId, el, fixed, say, seconds, show, themed } from "./draw.js";

const ROW = 18, GAP = 4, FEW_ROWS = 16, LONGEST_S = 60;
const KINDS = {
  wave: "--server", forward: "--server", backward: "--server-2", adapters: "--server-3",
  evaluation: "--evaluation", aggregation: "--aggregation", checkpoint: "--server-3",
};
const WORDS = {
  wave: "forward and backward for", forward: "forward for", backward: "backward for",
  adapters: "its own adapters", evaluation: "evaluation for", aggregation: "aggregation", checkpoint: "checkpoint",
};
let spans = [], isWhole = false, last = null;

export function drawTimeline(timeline, devices, run) {
  last = [timeline, devices, run];
  const isThere = Boolean(timeline && (timeline.steps.length || timeline.computed.length));
  show(byId("timeline-panel"), isThere);
  if (!isThere) return;
  const names = devices.map((one) => one.name).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const rows = ["coordinator", ...(isWhole ? names : names.slice(0, FEW_ROWS))];
  show(byId("more-rows"), names.length > FEW_ROWS);
  say(byId("more-rows"), isWhole ? "show fewer" : `show all ${names.length}`);
  const [from, to] = stretch(timeline);
  paint(timeline, rows, from, to);
  drawLegend();
  const when = (run?.is_running ? "" : " The last ones of this run.") + (run?.is_simulated ? " In seconds of this machine, not modelled ones." : "");
  byId("timeline-told").dataset.plain = `Each bar of a device is a step: what it computed, then what it waited, each summed.${when}`;
  if (!byId("timeline").matches(":hover")) say(byId("timeline-told"), byId("timeline-told").dataset.plain);
}

// As far back as both steps and computations are known, a minute at most.
function stretch({ now_s, steps, computed }) {
  const ends = [...steps, ...computed].map((row) => row[1]);
  const to = Math.max(...ends);
  const firsts = [steps, computed].filter((rows) => rows.length).map((rows) => rows[0][1] - (rows === steps ? rows[0][2] + rows[0][3] : rows[0][2]));
  const from = Math.max(...firsts.map((first) => Math.min(first, to - 1)), to - LONGEST_S);
  return [from, Math.max(to, Math.min(now_s, to + 2))];
}

function paint({ steps, computed }, rows, from, to) {
  const canvas = byId("timeline"), ratio = devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth - 32, height = rows.length * (ROW + GAP) + 22;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
  const label = Math.min(width * 0.28, 8 + Math.max(...rows.map((name) => pen.measureText(name).width)));
  const scale = (width - label) / (to - from), place = new Map(rows.map((name, n) => [name, n * (ROW + GAP)]));
  spans = [];
  paintGrid(pen, { rows, label, width, height, from, to, scale });
  const bar = (name, begin, end, colour, words) => {
    const y = place.get(name), x = label + Math.max(0, begin - from) * scale, x2 = label + (end - from) * scale;
    if (y === undefined || end < from) return;
    pen.fillStyle = themed(colour);
    pen.fillRect(x, y + 2, Math.max(0.75, x2 - x - 0.5), ROW - 4);
    spans.push({ x, x2: Math.max(x2, x + 2), y, words });
  };
  for (const [name, end, compute, wait, step, loss] of steps) {
    const begin = end - compute - wait;
    const words = `${name}, step ${step}: computed ${seconds(compute)}, waited ${seconds(wait)}, loss ${fixed(loss, 3)}`;
    bar(name, begin, begin + compute, "--compute", words);
    bar(name, begin + compute, end, "--wait", words);
  }
  for (const [what, end, took, names] of computed) {
    const whose = names.length > 6 ? `${names.length} devices` : names.join(", ");
    bar("coordinator", end - took, end, KINDS[what] ?? "--server-3", `coordinator: ${WORDS[what] ?? what} ${whose}, ${seconds(took)}`);
  }
}

function paintGrid(pen, { rows, label, width, height, from, to, scale }) {
  pen.fillStyle = themed("--text");
  pen.textBaseline = "middle";
  rows.forEach((name, n) => {
    const y = n * (ROW + GAP);
    pen.fillStyle = themed("--row");
    pen.fillRect(label, y + 2, width - label, ROW - 4);
    pen.fillStyle = themed(n ? "--text" : "--accent");
    pen.fillText(fitted(pen, name, label - 8), 0, y + ROW / 2);
  });
  const wished = (to - from) / Math.max(2, (width - label) / 90);
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60].find((each) => each >= wished) ?? 60;
  pen.fillStyle = themed("--muted");
  pen.textAlign = "center";
  for (let back = 0; back <= to - from; back += step) {
    const x = label + (to - back - from) * scale;
    pen.fillRect(x, 0, 0.5, height - 18);
    const words = back === 0 ? "last" : `-${Number(back.toFixed(1))} s`;
    pen.fillText(words, Math.max(label + 16, Math.min(width - 14, x)), height - 8);
  }
  pen.textAlign = "left";
}

function fitted(pen, text, width) {
  let short = text;
  while (short.length > 3 && pen.measureText(short).width > width) short = `${short.slice(0, -2)}\u2026`;
  return short;
}

function drawLegend() {
  const legend = byId("timeline-legend");
  if (legend.childElementCount) return;
  const keys = [["compute", "computes"], ["wait", "waits"], ["server", "forward"], ["server-2", "backward"],
    ["server-3", "adapters, checkpoint"], ["evaluation", "evaluation"], ["aggregation", "aggregation"]];
  legend.append(...keys.map(([colour, words]) => el("span", { class: "pair" }, el("i", { class: `key ${colour}` }), words)));
}

byId("timeline").addEventListener("pointermove", (event) => {
  const { offsetX: x, offsetY: y } = event;
  const found = spans.findLast((span) => x >= span.x && x <= span.x2 && y >= span.y && y <= span.y + ROW);
  say(byId("timeline-told"), found?.words ?? byId("timeline-told").dataset.plain);
});
byId("timeline").addEventListener("pointerleave", () => say(byId("timeline-told"), byId("timeline-told").dataset.plain));
byId("more-rows").addEventListener("click", () => { isWhole = !isWhole; drawTimeline(...last); });
