/* ---- header and big numbers ---- */
const setting = (run, key) => key in run.settings ? JSON.parse(run.settings[key]) : null;
const state = run => run.running ? "running" : known(run.total_steps) && run.last < run.total_steps ? "stopped" : "done";
const STATES = {running: "running", stopped: "stopped before its end", done: "done"};
const progress = run => known(run.total_steps) ? `${grouped.format(run.last)} of ${grouped.format(run.total_steps)}` : grouped.format(run.last);
const seconds = run => values(run, "timing_s/step").reduce((a, b) => a + b, 0);
const hardware = run => run.versions.num_devices ? run.versions.num_devices + " × " + run.versions.device_kinds.join(", ") : null;
function header() {
  const title = single ? runs[0].name : `${runs.length} runs`;
  document.title = title + (single ? " · run report" : " · comparison");
  byId("name").textContent = title;
  byId("what").textContent = single ? "run report" : "comparison of runs";
  if (!single) return;
  const run = runs[0], v = run.versions, now = state(run), facts = [];
  byId("state").hidden = false; byId("state").textContent = STATES[now]; byId("state").classList.add(now);
  if (setting(run, "model.path")) facts.push(["Model", setting(run, "model.path")]);
  if (setting(run, "task")) facts.push(["Task", setting(run, "task")]);
  if (setting(run, "algorithm.adv_estimator")) facts.push(["Algorithm", setting(run, "algorithm.adv_estimator")]);
  if (hardware(run)) facts.push(["Hardware", hardware(run)]);
  facts.push(["Steps", now === "done" ? grouped.format(run.last) : progress(run)]);
  if (seconds(run)) facts.push(["Time", duration(seconds(run))]);
  if (v.started) facts.push(["Started", v.started.replace("T", " ").replace(/\+00:00$/, " UTC")]);
  if (v.git_commit) facts.push(["Commit", v.git_commit.slice(0, 10)]);
  for (const [k, t] of facts) byId("facts").append(el("div", {}, el("dt", {}, k), el("dd", {}, t)));
}
function advice() {
  for (const run of runs) for (const a of [...run.advice].sort((x, y) => (y.kind === "stopped") - (x.kind === "stopped")))
    byId("advice-list").append(el("div", {class: "card " + (a.kind === "stopped" ? "stopped" : "")},
      el("div", {class: "eyebrow"}, (single ? "" : run.name + ", ") + "after step " + a.step), el("div", {class: "text"}, a.text)));
  byId("advice").hidden = !byId("advice-list").children.length;
}
function tile(title, from, to, delta, good, ...notes) {
  const big = el("div", {class: "big"});
  if (known(from)) big.append(el("span", {class: "from"}, from + " → "));
  const [, value, unit] = to.match(/^(.*?)( tok.*)?$/);
  big.append(value, unit ? el("small", {}, unit) : "");
  const mark = known(delta) ? el("span", {class: "delta " + (good > 0 ? "good" : good < 0 ? "bad" : "")}, delta) : null;
  byId("tiles").append(el("div", {class: "card tile"}, el("h3", {}, title), big, mark, ...notes.filter(known).map(n => el("p", {}, n))));
}
/* First and last validation: [row, row]. */
function ends(run) {
  const rows = run.accuracy ? steps.map((_, i) => i).filter(i => known(run.columns[run.accuracy][i])) : [];
  return rows.length ? [rows[0], last(rows)] : null;
}
function interval(run, row) {
  const low = column(run, run.accuracy + "/ci95_low")[row], high = column(run, run.accuracy + "/ci95_high")[row];
  return known(low) ? (100 * low).toFixed(1) + "–" + percent(high) : null;
}
/* Means of the first and the last few steps, and of how many. */
/* Of runs that learn from rows that are there. */
const OF_LOSS = /^(sft|rm|dpo)\/loss$/, OF_HELD_OUT_LOSS = /^val-core\/all\/(sft|rm|dpo)\/loss$/;
function edges(run, name) {
  const v = values(run, name), k = Math.max(1, Math.min(5, Math.floor(v.length / 2)));
  return v.length ? [mean(v.slice(0, k)), mean(v.slice(-k)), k, v.length] : null;
}
const median = list => [...list].sort((x, y) => x - y)[list.length >> 1];
function tiles() {
  byId("tiles").hidden = !single;
  if (!single) return;
  const run = runs[0], found = ends(run);
  if (found) {
    const [a, b] = found, accuracy = run.columns[run.accuracy], change = accuracy[b] - accuracy[a];
    const notes = [interval(run, b) && "95% interval " + interval(run, b), a !== b && interval(run, a) ? "before " + interval(run, a) : null];
    if (a === b) tile("Held-out accuracy, step " + steps[b], null, percent(accuracy[b]), null, 0, ...notes);
    else tile("Held-out accuracy", percent(accuracy[a]), percent(accuracy[b]), signed(100 * change, v => v.toFixed(1).replace("-", "−")) + " points", change, ...notes);
  }
  if (run.validations.length > 1) {
    const c = outcomes(run.validations[0], last(run.validations));
    tile("Held-out questions", null, c.fixed.length + " fixed", c.broken.length + " broken", -c.broken.length, `${c.right.length} right and ${c.wrong.length} wrong both times`);
  }
  const reward = edges(run, "critic/rewards/mean");
  if (reward) { const [a, b, k, n] = reward;
    if (n === 1) tile("Training reward", null, number(b), null, 0);
    else tile("Training reward", number(a), number(b), signed(b - a, number), b - a, k > 1 ? "mean of the first and last " + k + " steps" : "first and last step"); }
  const loss = edges(run, names.find(n => OF_LOSS.test(n))), held = values(run, names.find(n => OF_HELD_OUT_LOSS.test(n)));
  if (loss) tile("Training loss", loss[3] > 1 ? number(loss[0]) : null, number(loss[1]), loss[3] > 1 ? signed(loss[1] - loss[0], number) : null, loss[0] - loss[1], loss[2] > 1 ? "mean of the first and last " + loss[2] + " steps" : null);
  if (held.length) tile("Held-out loss", held.length > 1 ? number(held[0]) : null, number(last(held)), held.length > 1 ? signed(last(held) - held[0], number) : null, held[0] - last(held));
  const length = edges(run, "response_length/mean");
  if (length) { const [a, b, , n] = length, cut = values(run, "response_length/clip_ratio");
    tile("Response length", n > 1 ? number(a) : null, number(b) + " tokens", n > 1 ? signed(100 * (b / a - 1), v => v.toFixed(0).replace("-", "−") + "%") : null, 0,
      cut.length ? percent(last(cut)) + " cut off at the limit" : null); }
  const speed = values(run, "perf/throughput"), mfu = values(run, "perf/mfu/actor");
  if (speed.length) tile("Speed, median step", null, number(median(speed)) + " tok/s", null, 0, "per device, prompts and replies", mfu.length ? "model FLOPs use of updates " + percent(median(mfu)) : null);
  byId("tiles").hidden = !byId("tiles").children.length;
}

/* ---- several runs: what they are, and what tells them apart ---- */
function swatch(i) { return el("span", {class: "swatch", style: "background:" + runColor(i)}); }
function table_of_runs() {
  byId("runs-section").hidden = single;
  if (single) return;
  const numbers = ["Steps", "Accuracy before", "after", "95% interval", "Reward, last steps", "Length, last steps", "tok/s per device", "Time"];
  byId("runs").append(el("tr", {}, el("th", {}, "Run"), el("th", {}, "State"), ...numbers.map(t => el("th", {class: "n"}, t))));
  runs.forEach((run, i) => {
    const found = ends(run), accuracy = found && run.columns[run.accuracy], speed = values(run, "perf/throughput");
    const cells = [progress(run), found ? percent(accuracy[found[0]]) : "–", found && found[0] !== found[1] ? percent(accuracy[found[1]]) : "–", found && interval(run, found[1]) || "–",
      number(edges(run, "critic/rewards/mean")?.[1]), number(edges(run, "response_length/mean")?.[1]), speed.length ? number(median(speed)) : "–", seconds(run) ? duration(seconds(run)) : "–"];
    byId("runs").append(el("tr", {}, el("td", {class: "name"}, swatch(i), run.name), el("td", {}, state(run)), ...cells.map(c => el("td", {class: "n"}, c))));
  });
  const all = [...new Set(runs.flatMap(r => Object.keys(r.settings)))].filter(k => k !== "output_dir" && new Set(runs.map(r => r.settings[k] ?? "")).size > 1);
  byId("differs").append(el("tr", {}, el("th", {}, "Setting"), ...runs.map((r, i) => el("th", {}, swatch(i), r.name))));
  for (const key of all) byId("differs").append(el("tr", {}, el("td", {class: "name"}, key), ...runs.map(r => el("td", {}, r.settings[key] ?? "–"))));
  byId("differs-card").hidden = !all.length; byId("differs-card").open = all.length <= 12;
}

/* ---- panels ---- */
const folded = [];
/* list: [label, metric, metrics of the ends of its interval]. Of several runs, each metric has a panel of its own. */
function panel(title, list, more = {}) {
  list = list.filter(([, name]) => has(name));
  if (!list.length) return;
  const band = (run, ends) => ends && has(ends[0]) ? ends.map(n => column(run, n)) : undefined;
  if (single) return place({title, series: list.map(([label, name, ends]) => ({label, values: runs[0].columns[name], band: band(runs[0], ends)})), ...more});
  for (const [label, name, ends] of list) {
    const series = runs.map((run, i) => ({label: run.name, values: column(run, name), band: band(run, ends), color: runColor(i)}));
    place({title: list.length > 1 ? `${title}: ${label}` : title, series: series.filter(s => s.values.some(known)), ...more});
  }
}
/* What stays the same over three steps or more is folded away. */
function place(spec) {
  const kept = spec.series.map(s => s.values.filter(known));
  const constant = kept.every(v => v.every(x => x === v[0])) && Math.max(...kept.map(v => v.length)) >= 3;
  if (constant) folded.push(spec); else chart(byId("charts"), spec);
}
function unfold() {
  if (!folded.length) return;
  const what = folded.map(spec => { const show = spec.share ? percent : number, found = [...new Set(spec.series.map(s => show(s.values.find(known))))]; return [spec.title, found.join(", ")]; });
  const inside = el("div", {class: "charts"});
  const summary = el("summary", {}, folded.length === 1 ? "One panel does not change: " : `${folded.length} panels do not change: `);
  what.forEach(([title, value], i) => summary.append((i ? " · " : "") + title + " ", el("b", {}, value)));
  const card = el("details", {class: "card wide folded", id: "folded", ontoggle: () => { if (card.open && !inside.children.length) for (const spec of folded) chart(inside, spec); }}, summary, inside);
  byId("charts").append(card);
}
function training() {
  const some = pattern => names.filter(n => pattern.test(n) && has(n));
  const short = n => last(n.split("/")).replaceAll("_", " ");
  panel("Loss", [...some(OF_LOSS).map(n => ["training", n]), ...some(OF_HELD_OUT_LOSS).map(n => ["held-out rows", n])]);
  panel("Pairs told right", [["training", "rm/accuracy"], ["training", "rewards/accuracies"], ["held-out pairs", "val-core/all/rm/accuracy"], ["held-out pairs", "val-core/all/rewards/accuracies"]], {share: true});
  panel("Chosen less rejected score", [["training", "rm/margin"], ["held-out pairs", "val-core/all/rm/margin"]]);
  panel("Rewards of the policy's own", [["chosen", "rewards/chosen"], ["rejected", "rewards/rejected"], ["margin", "rewards/margins"]]);
  panel("Share of tokens that are the likeliest", [["training", "sft/mean_token_accuracy"], ["held-out rows", "val-core/all/sft/mean_token_accuracy"]], {share: true});
  panel("Distance from the teacher, nats per token", [["loss", "distillation/loss"], ["reverse KL", "distillation/reverse_kl"]]);
  panel("Probability of the teacher's likeliest tokens", [["policy", "distillation/student_mass"], ["teacher", "distillation/teacher_mass"]], {share: true});
  panel("Training reward", [["mean of the batch", "critic/rewards/mean"]], {smooth: 6});
  const accuracies = some(/^val-core\/.+\/acc\/(greedy|mean@\d+)$/);
  const sources = new Set(accuracies.map(n => n.slice(9, n.lastIndexOf("/acc/"))));
  const shown = runs.map(r => r.accuracy);
  accuracies.sort((a, b) => shown.includes(b) - shown.includes(a));
  panel("Held-out accuracy, 95% interval", accuracies.slice(0, 4).map(n =>
    [(sources.size > 1 ? n.slice(9, n.lastIndexOf("/acc/")) + " " : "") + short(n), n, [n + "/ci95_low", n + "/ci95_high"]]), {share: true});
  panel("Response length, tokens", [["mean", "response_length/mean"], ["longest", "response_length/max"], ["shortest", "response_length/min"]].slice(0, single ? 3 : 1));
  panel("Shares of the batch", [["replies cut off", "response_length/clip_ratio"], ["groups without signal", "training/groups_all_equal"], ["tokens clipped", "actor/pg_clipfrac"]], {share: true});
  panel("Entropy, nats per token", [["policy", "actor/entropy"], ["teacher", "distillation/teacher_entropy"], ...some(/^(sft|dpo)\/entropy$/).map(n => ["model", n]), ...some(/^val-core\/all\/(sft|dpo)\/entropy$/).map(n => ["held-out rows", n])]);
  /* The reference is the initial policy unless it is taken anew. */
  const initial = runs.every(r => !setting(r, "actor.ref_refresh_steps"));
  panel(initial ? "KL to the initial policy" : "KL to the reference", [["in the loss", "actor/kl_loss"], ["in the reward", "actor/reward_kl_penalty"]]);
  panel("KL of the old policy to the new", [["nats per token", "actor/ppo_kl"]]);
  panel("Critic", [["variance explained", "critic/vf_explained_var"], ["mean value", "critic/values/mean"], ["mean return", "critic/returns/mean"]]);
  panel("Value loss", [["critic", "critic/vf_loss"]]);
  panel("Groups generated for a step", [["groups", "training/groups_generated"]]);
  panel("Sampler against trainer", some(/mismatch|rollout_probs_diff|rollout_corr/).slice(0, 4).map(n => [short(n), n]));
  panel("Gradient norm, before clipping", [["policy", "actor/grad_norm"], ["critic", "critic/grad_norm"], ...some(/^(sft|rm|dpo)\/grad_norm$/).map(n => ["model", n])]);
  panel("Learning rate", [["policy", "actor/lr"], ["critic", "critic/lr"], ...some(/^(sft|rm|dpo)\/lr$/).map(n => ["model", n])]);
  const rewards = some(/^reward\/.+\/mean$/);
  if (rewards.length > 1) panel("Reward functions, unweighted", rewards.slice(0, 8).map(n => [n.slice(7, -5), n]));
  panel("Throughput, tokens/s per device", [["prompts and replies", "perf/throughput"]]);
  panel("Model FLOPs utilization", [["update", "perf/mfu/actor"]], {share: true});
  unfold();
  if (!byId("charts").children.length) byId("charts").append(el("p", {class: "note"}, "No training steps were written yet."));
}
function distributions() {
  const titles = {reward: "Reward", advantage: "Advantage", length: "Response length, tokens"}, shown = runs.slice(0, 4);
  for (const [name, title] of Object.entries(titles)) {
    const all = shown.flatMap(r => r.distributions[name].values.flat());
    if (!all.length) continue;
    const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    const distinct = new Set(all), levels = distinct.size <= 8 ? [...distinct].sort((a, b) => a - b) : null;
    if (low === high && name !== "reward") continue;
    for (const run of shown) {
      const of = run.distributions[name], rows = of.steps.map((_, i) => i).filter(i => of.values[i].length);
      if (rows.length) heatmap(byId("distributions"), {title: single ? title : `${title}: ${run.name}`, steps: rows.map(i => of.steps[i]), samples: rows.map(i => of.values[i]), range: [low, high], levels});
    }
  }
  byId("distributions-section").hidden = !byId("distributions").children.length;
}

/* ---- time ---- */
const PHASES = {gen: "generation", reward: "rewards", adv: "advantages", old_log_prob: "log-probs of old policy, reference", values: "values", update_critic: "critic update", update_actor: "update", update_weights: "weight sync", testing: "validation", save_checkpoint: "checkpoint"};
function timing() {
  const found = names.filter(n => n.startsWith("timing_s/") && n !== "timing_s/step" && has(n));
  byId("time-section").hidden = !found.length;
  if (!found.length) return;
  if (!single) {
    const parts = [...found, "timing_s/step"].filter(has), label = n => n === "timing_s/step" ? "whole step" : PHASES[n.slice(9)] || n.slice(9).replaceAll("_", " ");
    const table = el("table", {}, el("tr", {}, el("th", {}, "Seconds per step, median"), ...runs.map((r, i) => el("th", {class: "n"}, swatch(i), r.name))));
    for (const n of parts) table.append(el("tr", {}, el("td", {}, label(n)), ...runs.map(r => { const v = values(r, n); return el("td", {class: "n"}, v.length ? duration(median(v)) : "–"); })));
    byId("time").append(el("div", {class: "card wide scroll"}, table));
    return;
  }
  const columns = runs[0].columns;
  const order = Object.keys(PHASES), rank = n => (order.indexOf(n.slice(9)) + order.length + 1) % (order.length + 1);
  found.sort((a, b) => rank(a) - rank(b));
  let series = found.map(n => ({label: PHASES[n.slice(9)] || n.slice(9).replaceAll("_", " "), values: columns[n]}));
  if (has("timing_s/step")) {
    const other = columns["timing_s/step"].map((t, i) => known(t) ? Math.max(0, t - series.reduce((s, p) => s + (p.values[i] || 0), 0)) : null);
    series.push({label: "everything else", values: other, color: "var(--c4)"});
  }
  series.forEach((s, i) => { s.color ??= `var(--c${[0, 1, 2, 3, 5, 6, 7][i % 7]})`; s.total = s.values.filter(known).reduce((a, b) => a + b, 0); });
  const whole = series.reduce((t, s) => t + s.total, 0), count = steps.filter((_, i) => series.some(s => known(s.values[i]))).length;
  let at = steps, bars = series;
  const bin = Math.ceil(steps.length / 160);
  if (bin > 1) {
    const starts = steps.map((_, i) => i).filter(i => i % bin === 0);
    at = starts.map(i => steps[i]);
    bars = series.map(s => ({...s, values: starts.map(i => { const v = s.values.slice(i, i + bin).filter(known); return v.length ? v.reduce((a, b) => a + b, 0) / Math.min(bin, steps.length - i) : null; })}));
  }
  chart(byId("time"), {title: bin > 1 ? `Seconds per step, mean of ${bin} steps a bar` : "Seconds per step", series: bars, steps: at, bars: true, wide: true, seconds: true});
  const table = el("table", {}, el("tr", {}, el("th", {}, "Phase"), el("th", {class: "n"}, "Total"), el("th", {class: "n"}, "Per step"), el("th", {class: "n"}, "Share"), el("th", {style: "width:35%"}, "")));
  for (const s of series) table.append(el("tr", {}, el("td", {}, el("span", {class: "swatch", style: `background:${s.color}`}), s.label), el("td", {class: "n"}, duration(s.total)),
    el("td", {class: "n"}, duration(s.total / count)), el("td", {class: "n"}, percent(s.total / whole)), el("td", {}, el("div", {class: "bar", style: `background:${s.color};width:${100 * s.total / whole}%`}))));
  table.append(el("tr", {}, el("td", {}, el("b", {}, "All")), el("td", {class: "n"}, el("b", {}, duration(whole))), el("td", {class: "n"}, duration(whole / count)), el("td"), el("td")));
  byId("time").append(el("div", {class: "card wide scroll"}, table));
}
