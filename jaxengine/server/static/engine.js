// The engine's view: what /metrics says, once a second, as small charts of the last two minutes.

import { request, samples } from "./api.js";

const HISTORY = 120;

const rate = (name) => (now, before, seconds) => (now[name] - before[name]) / seconds;
/** Mean of a histogram's new observations, in milliseconds; NaN without any. */
const mean = (name) => (now, before) =>
  (1000 * (now[`${name}_sum`] - before[`${name}_sum`])) / (now[`${name}_count`] - before[`${name}_count`]);

const CHARTS = [
  ["Requests running", (now) => now["vllm:num_requests_running"], ""],
  ["Requests waiting", (now) => now["vllm:num_requests_waiting"], ""],
  ["Generated tokens", rate("vllm:generation_tokens_total"), "/s"],
  ["Prompt tokens", rate("vllm:prompt_tokens_total"), "/s"],
  ["KV cache in use", (now) => 100 * now["vllm:kv_cache_usage_perc"], "%"],
  ["Prefix cache hits", (now, before) => {
    const queries = now["vllm:prefix_cache_queries_total"] - before["vllm:prefix_cache_queries_total"];
    return (100 * (now["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"])) / queries;
  }, "%"],
  ["To the first token", mean("vllm:time_to_first_token_seconds"), "ms"],
  ["Between tokens", mean("vllm:inter_token_latency_seconds"), "ms"],
];

const SVG = "http://www.w3.org/2000/svg";

class Chart {
  constructor(title, read, unit) {
    Object.assign(this, { read, unit, values: [] });
    this.figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    this.now = document.createElement("b");
    this.now.textContent = "–";
    caption.append(title, this.now);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${HISTORY - 1} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${title} over the last two minutes`);
    this.path = document.createElementNS(SVG, "path");
    svg.append(this.path);
    this.figure.append(caption, svg);
  }

  add(value) {
    this.values = [...this.values, value].slice(-HISTORY);
    const known = Number.isFinite(value);
    const digits = known && Math.abs(value) < 10 && value % 1 ? 1 : 0;
    this.now.textContent = known ? `${value.toFixed(digits)} ${this.unit}` : "–";
    const top = Math.max(1e-9, ...this.values.filter(Number.isFinite)) * 1.1;
    const first = HISTORY - this.values.length;
    let pen = "M";
    this.path.setAttribute("d", this.values.map((v, i) => {
      if (!Number.isFinite(v)) { pen = "M"; return ""; }
      const point = `${pen}${first + i} ${(100 - (100 * v) / top).toFixed(1)}`;
      pen = "L";
      return point;
    }).join(" "));
  }
}

/** Show the charts in a node; returns a function that takes a look. */
export function engineView(node, note) {
  const charts = CHARTS.map((row) => new Chart(...row));
  node.append(...charts.map((chart) => chart.figure));
  let before = null;
  return async () => {
    try {
      const now = samples(await (await request("metrics")).text());
      now.time = performance.now() / 1000;
      if (before) charts.forEach((c) => c.add(c.read(now, before, now.time - before.time)));
      before = now;
      note.textContent = "";
    } catch (error) {
      before = null;
      note.textContent = `The engine's metrics cannot be read: ${error.message}`;
    }
  };
}
