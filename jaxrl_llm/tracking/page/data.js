/* What the page shows, and the only ways by which text and numbers enter it. */
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, single = runs.length === 1;
const byId = id => document.getElementById(id);
const known = v => v !== null && v !== undefined;
const mean = a => a.reduce((x, y) => x + y, 0) / a.length;
const last = a => a[a.length - 1];

/* Every column of every run is over the steps that any run has. */
const steps = [...new Set(runs.flatMap(r => r.columns.step))].sort((a, b) => a - b);
for (const run of runs) {
  const row = new Map(run.columns.step.map((s, i) => [s, i]));
  run.last = run.columns.step.length ? last(run.columns.step) : 0;
  for (const name of Object.keys(run.columns)) {
    const own = run.columns[name];
    run.columns[name] = steps.map(s => row.has(s) ? own[row.get(s)] : null);
  }
}
const names = [...new Set(runs.flatMap(r => Object.keys(r.columns)))].filter(n => n !== "step");
const column = (run, name) => run.columns[name] || steps.map(() => null);
const values = (run, name) => column(run, name).filter(known);
const has = name => runs.some(r => r.columns[name] && r.columns[name].some(known));

/* Text only ever enters the page through here: as text nodes and attributes. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (known(value)) node.setAttribute(key, value);
  }
  node.append(...children.filter(known));
  return node;
}
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const grouped = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
function number(v) {
  if (!known(v)) return "–";
  const a = Math.abs(v);
  if (a >= 1000) return grouped.format(v).replace("-", "−");
  if (a !== 0 && a < 1e-3) return v.toExponential(2).replace("e-", "e−").replace("-", "−");
  return String(Number(v.toPrecision(3))).replace("-", "−");
}
const percent = v => known(v) ? (100 * v).toFixed(1).replace("-", "−") + "%" : "–";
const signed = (v, f) => (v > 0 ? "+" : "") + f(v);
function duration(s) {
  if (s < 1) return Math.round(1000 * s) + " ms";
  if (s < 60) return s.toFixed(1) + " s";
  const m = Math.floor(s / 60);
  return m < 60 ? m + " min " + Math.round(s % 60) + " s" : Math.floor(m / 60) + " h " + m % 60 + " min";
}
const runColor = i => `var(--c${[0, 1, 2, 3, 6, 7, 5, 4][i % 8]})`;
