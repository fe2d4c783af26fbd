// Elements and words. All text goes through textContent: names and reasons come from others.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// Make an element; children are elements or text, attributes are set as they are.
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  return fill(made, attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// Set a text only where it differs: what stands still can be read and copied.
export function say(element, text) {
  const words = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== words) element.textContent = words;
}

export function show(element, is_there) {
  element.hidden = !is_there;
}

// ---- words ----

export const DASH = "\u2013", UP = "\u2191", DOWN = "\u2193", DOT = "\u00b7";
const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

export function bytes(value) {
  if (!isKnown(value)) return DASH;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${value >= 99.5 || unit === 0 ? Math.round(value) : value.toPrecision(2)} ${units[unit]}`;
}

export function memory(value) {
  return isKnown(value) ? `${Math.round(value / 2 ** 20).toLocaleString("en")} MiB` : DASH;
}

export function number(value, digits = 3) {
  if (!isKnown(value)) return DASH;
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

export function fixed(value, digits) {
  return isKnown(value) ? value.toFixed(digits) : DASH;
}

export function seconds(value) {
  if (!isKnown(value)) return DASH;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 90) return `${Math.round(value)} s`;
  if (value < 5400) return `${Math.round(value / 60)} min`;
  const hours = Math.floor(value / 3600), minutes = Math.round((value % 3600) / 60);
  return value < 172800 ? `${hours} h ${minutes} min` : `${Math.round(value / 86400)} days`;
}

// A clock time of the run's files, as 2026-11-29T10:02:11+0000, in milliseconds.
export function moment(time) {
  return Date.parse(String(time).replace(/([+-]\d\d)(\d\d)$/, "$1:$2"));
}

export function clock(time) {
  const at = new Date(moment(time));
  return Number.isNaN(at.getTime()) ? String(time) : at.toLocaleTimeString("en-GB");
}

// ---- colours ----

const RAMP = [[68, 58, 131], [49, 104, 142], [33, 145, 140], [94, 190, 98], [244, 210, 60]];

// A colour for a share of 0..1, the same by day and by night.
export function ramp(share) {
  const place = Math.max(0, Math.min(1, share)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(place)), part = place - low;
  const mixed = RAMP[low].map((from, n) => Math.round(from + part * (RAMP[low + 1][n] - from)));
  return `rgb(${mixed.join(" ")})`;
}

export const RAMP_STOPS = [0, 0.25, 0.5, 0.75, 1].map((at) => [at, ramp(at).replaceAll(" ", ", ")]);

export const themed = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// For plotly, which reads tags in its texts.
export const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
