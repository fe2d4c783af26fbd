// Losses over rounds, samples, time or bytes, and the heat map of weights: drawn by plotly.

import { byId, el, plain, RAMP_STOPS, say, show, themed } from "./draw.js";

const AXES = {
  round: ["round", "rounds"], samples: ["samples", "samples"],
  seconds: ["time", "seconds of training"], modelled: ["modelled time", "modelled seconds"], up: ["bytes up", "bytes from devices"],
};
const LINES = ["#5b8def", "#e07b39", "#3aa76d", "#b565c9", "#c9a227", "#d1495b", "#2a9d9f", "#8d99ae"];
let plotly = null, axis = "round", latest = {};

// plotly comes once there is something to draw; the rest of the page does not wait for it.
function withPlotly(draw) {
  plotly ??= new Promise((resolve, reject) => {
    const script = el("script", { src: "static/plotly.min.js" });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => { plotly = null; reject(new Error("plotly could not be loaded")); });
    document.head.append(script);
  });
  plotly.then(draw).catch((error) => console.error(error));
}

function layout(more) {
  const text = themed("--muted"), line = themed("--line");
  const lines = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, size: 12, family: themed("--font") },
    margin: { l: 8, r: 8, t: 8, b: 8 }, xaxis: { ...lines, ...more.xaxis }, yaxis: { ...lines, ...more.yaxis },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: more.hovermode ?? "x unified",
    hoverlabel: { bgcolor: themed("--panel"), bordercolor: line, font: { color: themed("--text") } },
    dragmode: false, height: more.height ?? 380, showlegend: more.showlegend ?? true,
  };
}

const SETTINGS = { displayModeBar: false, responsive: true };

export function drawCurves(curves, run) {
  latest = { curves, run };
  const points = curves?.points ?? [];
  show(byId("curves-panel"), points.length > 0);
  if (!points.length) return;
  drawChoice(points);
  const x = points.map((point) => point[axis]);
  const traces = [...deviceTraces(curves, x)];
  const add = (key, name, color, width, dash) => {
    if (points.some((point) => point[key] !== null)) {
      traces.push({ x, y: points.map((point) => point[key]), name, mode: points.length > 60 ? "lines" : "lines+markers",
        line: { color, width, dash }, marker: { size: 6 }, connectgaps: true });
    }
  };
  add("train", "training", themed("--compute"), 2.5);
  add("eval", `evaluation (${curves.eval_on})`, themed("--aggregation"), 3);
  const newest = points.findLast((point) => point.accuracy !== null);
  say(byId("curves-told"), newest ? `Accuracy of single predictions after round ${newest.round}: ${(100 * newest.accuracy).toFixed(1)} %` : "");
  withPlotly((Plotly) => Plotly.react(byId("curves"), traces,
    layout({ xaxis: { title: { text: AXES[axis][1] }, rangemode: "tozero" }, yaxis: { title: { text: "loss" } } }), SETTINGS));
}

// Thin lines of each device, or a band from the lowest to the highest tenth where they are many.
function deviceTraces(curves, x) {
  const own = curves.train;
  if (own.lines) {
    const names = Object.keys(own.lines);
    return names.length < 2 ? [] : names.map((name, n) => ({
      x, y: own.lines[name], name: plain(name), mode: "lines", connectgaps: true, opacity: 0.75,
      line: { color: LINES[n % LINES.length], width: 1.2 },
    }));
  }
  const edge = (n) => own.band.map((tenths) => (tenths ? tenths[n] : null));
  const line = { width: 0 }, hoverinfo = "skip";
  return [
    { x, y: edge(0), mode: "lines", line, hoverinfo, showlegend: false, connectgaps: true },
    { x, y: edge(2), mode: "lines", line, hoverinfo, fill: "tonexty", fillcolor: "rgba(91,141,239,0.22)",
      name: `training, 8 of 10 of ${own.devices} devices`, connectgaps: true },
  ];
}

function drawChoice(points) {
  const known = Object.keys(AXES).filter((key) => points.some((point) => point[key]));
  if (!known.includes(axis)) axis = "round";
  const choice = byId("curve-axis"), key = `${known} ${axis}`;
  if (choice.dataset.key === key) return;
  choice.dataset.key = key;
  choice.replaceChildren(...known.map((name) => {
    const button = el("button", { type: "button", "aria-pressed": name === axis ? "true" : "false" }, AXES[name][0]);
    button.addEventListener("click", () => { axis = name; drawCurves(latest.curves, latest.run); });
    return button;
  }));
}

export function drawImportance(found) {
  const is_there = Boolean(found && found.rounds.length && found.weights.length);
  show(byId("importance-panel"), is_there);
  if (!is_there) return;
  const most = found.rounds.map((_, column) => Math.max(1e-30, ...found.values.map((row) => row[column] ?? 0)));
  const shares = found.values.map((row) => row.map((value, column) => (value === null ? null : value / most[column])));
  const weights = found.weights.map((name) => plain(name.replace(/^(\d+) /, (_, block) => `${Number(block) + 1}  `)));
  const hovertemplate = "block %{y}<br>after round %{x}: %{z:.3f}<extra></extra>";
  const trace = { type: "heatmap", x: found.rounds.map(String), y: weights, z: shares, colorscale: RAMP_STOPS, zmin: 0, zmax: 1,
    hovertemplate, xgap: 1, ygap: weights.length > 40 ? 0 : 1, colorbar: { thickness: 10, len: 1, outlinewidth: 0 } };
  const height = Math.max(260, Math.min(380, 60 + weights.length * 12));
  withPlotly((Plotly) => Plotly.react(byId("importance"), [trace], layout({
    xaxis: { type: "category", title: { text: "rounds" } }, height, hovermode: "closest", showlegend: false,
    yaxis: { autorange: "reversed", tickfont: { size: 10 }, nticks: Math.floor(height / 16), ticks: "" },
  }), SETTINGS));
}

export function redrawPlots(curves, run, importance) {
  drawCurves(curves, run);
  drawImportance(importance);
}
