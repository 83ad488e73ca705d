/* ---- held-out answers, in pairs ---- */
const PAGE = 10, PAIRS_PAGE = 5;
/* Which questions, by their numbers, are answered how in two validations. */
function outcomes(before, after) {
  const found = {fixed: [], broken: [], right: [], wrong: []}, kinds = {"01": "fixed", "10": "broken", "11": "right", "00": "wrong"};
  for (let i = 0; i < before.correct.length; i++) found[kinds[before.correct[i] + after.correct[i]]]?.push(i);
  return found;
}
/* The chance that of so many changed answers, each as likely fixed as broken, at least as many are of one kind. */
function sign_test(fixed, broken) {
  const n = fixed + broken, few = Math.min(fixed, broken);
  let term = n * -Math.LN2, sum = 0;
  for (let k = 0; k <= few; k++) { sum += Math.exp(term); term += Math.log((n - k) / (k + 1)); }
  return Math.min(1, 2 * sum);
}
function marked(text, term) {
  if (!term) return [text];
  const out = [], lower = text.toLowerCase(); let from = 0, at;
  if (lower.length !== text.length) return [text];
  while ((at = lower.indexOf(term, from)) >= 0) { out.push(text.slice(from, at), el("mark", {}, text.slice(at, at + term.length))); from = at + term.length; }
  return [...out, text.slice(from)];
}
const field = (title, text, term, mono) => [el("h4", {}, title), el("div", {class: "text" + (mono ? " mono" : ""), tabindex: 0}, ...marked(text, term))];
function pairs() {
  const list = runs.flatMap((run, r) => run.validations.map(v => ({...v, run, label: (single ? "" : run.name + ", ") + "step " + v.step})));
  byId("pairs-section").hidden = list.length < 2;
  if (list.length < 2) return;
  list.forEach((v, i) => { for (const id of ["before", "after"]) byId(id).append(el("option", {value: i}, v.label)); });
  const lasts = runs.filter(r => r.validations.length).map(r => list.findLastIndex(v => v.run === r));
  byId("before").value = lasts.length > 1 ? lasts[0] : 0;
  byId("after").value = lasts.length > 1 ? lasts[1] : list.length - 1;
  let kind = null, page = 0;
  const titles = {fixed: "fixed", broken: "broken", right: "right both times", wrong: "wrong both times"};
  function show() {
    const before = list[+byId("before").value], after = list[+byId("after").value], found = outcomes(before, after);
    kind ??= found.fixed.length || !found.broken.length ? "fixed" : "broken";
    byId("outcome").replaceChildren(...Object.entries(titles).map(([k, title]) =>
      el("button", {type: "button", "data-kind": k, class: k === "fixed" ? "good" : k === "broken" ? "bad" : "", "aria-pressed": k === kind, onclick: () => { kind = k; page = 0; show(); }}, el("b", {}, grouped.format(found[k].length)), title)));
    const p = sign_test(found.fixed.length, found.broken.length), changed = found.fixed.length + found.broken.length;
    byId("sign-test").textContent = changed ? `Exact sign test on the ${changed} answers that changed: p = ${p < 0.001 ? p.toExponential(1) : p.toFixed(3)}` + (p < 0.05 ? "." : ", so chance may do as much.") : "No answer changed.";
    const term = byId("pair-search").value.toLowerCase();
    const with_text = before.texts && after.texts ? found[kind].filter(i => i < data.questions.length && known(before.texts[i]) && known(after.texts[i])) : [];
    const fits = with_text.filter(i => !term || [data.questions[i].prompt, data.questions[i].answer || "", before.texts[i], after.texts[i]].some(t => t.toLowerCase().includes(term)));
    const pages = Math.max(1, Math.ceil(fits.length / PAIRS_PAGE)); page = Math.min(page, pages - 1);
    byId("pair-count").textContent = before.texts && after.texts ? `${grouped.format(fits.length)} of ${grouped.format(found[kind].length)} ${titles[kind]}` + (pages > 1 ? `, page ${page + 1} of ${pages}` : "")
      : "The page holds texts of a run's first and last validation only.";
    byId("pair-prev").disabled = page === 0; byId("pair-next").disabled = page >= pages - 1;
    const good = {fixed: ["bad", "good"], broken: ["good", "bad"], right: ["good", "good"], wrong: ["bad", "bad"]}[kind];
    byId("pairs").replaceChildren(...fits.slice(page * PAIRS_PAGE, page * PAIRS_PAGE + PAIRS_PAGE).map(i => {
      const q = data.questions[i], left = el("div", {}, ...field("Question", q.prompt, term));
      if (known(q.answer)) left.append(el("div", {style: "margin-top:10px"}, ...field("Reference answer", q.answer, term, true)));
      const side = (v, k) => el("div", {}, el("h4", {}, v.label + " ", el("span", {class: "tag " + good[k]}, good[k] === "good" ? "right" : "wrong")), field("", v.texts[i], term, true)[1]);
      return el("article", {class: "card reply"}, el("div", {class: "cols three", style: "margin-top:0"}, left, side(before, 0), side(after, 1)));
    }));
  }
  for (const id of ["before", "after"]) byId(id).addEventListener("change", () => { kind = null; page = 0; show(); });
  byId("pair-search").addEventListener("input", () => { page = 0; show(); });
  byId("pair-prev").addEventListener("click", () => { page--; show(); });
  byId("pair-next").addEventListener("click", () => { page++; show(); });
  show();
}

/* ---- completions ---- */
const KINDS = {train: "training", greedy: "validation, greedy", sampled: "validation, sampled"};
const COLOURS = {logprob: "log-probability", advantage: "advantage", mismatch: "mismatch"};
/* What a token's colour stands for: its background, and the ends of the scale. */
const SHADES = {
  logprob: {most: () => 5, css: (v, m) => `rgb(var(--tok-hot) / ${(0.75 * Math.min(1, -v / m)).toFixed(2)})`, ends: m => ["sure, 0 nats", `unlikely, −${number(m)} nats or less`], gradient: "transparent, rgb(var(--tok-hot) / .75)"},
  advantage: {most: largest, css: diverging, ends: m => ["−" + number(m) + ", made less likely", "+" + number(m) + ", made more likely"], gradient: "rgb(var(--tok-bad) / .65), transparent, rgb(var(--tok-good) / .65)"},
  mismatch: {most: largest, css: diverging, ends: m => [`trainer lower by ${number(m)} nats`, `higher by ${number(m)}`], gradient: "rgb(var(--tok-bad) / .65), transparent, rgb(var(--tok-good) / .65)"},
};
function largest(list, what) { return list.reduce((m, r) => (r.tokens[what] || []).reduce((n, v) => known(v) ? Math.max(n, Math.abs(v)) : n, m), 0) || 1; }
function diverging(v, m) { return `rgb(var(${v < 0 ? "--tok-bad" : "--tok-good"}) / ${(0.65 * Math.min(1, Math.abs(v) / m)).toFixed(2)})`; }
function browser() {
  const all = runs.flatMap((run, i) => run.completions.map(r => Object.assign(r, {run: i})));
  byId("completions").hidden = !all.length;
  if (!all.length) return;
  byId("run-label").hidden = single;
  runs.forEach((run, i) => { if (run.completions.length) byId("run").append(el("option", {value: i}, run.name)); });
  const colours = Object.keys(COLOURS).filter(k => all.some(r => r.tokens && r.tokens[k]));
  byId("colour").append(el("option", {value: ""}, "nothing"), ...colours.map(k => el("option", {value: k}, COLOURS[k])));
  byId("colour").parentElement.hidden = !colours.length;
  const sum = key => runs.reduce((t, r) => t + r.counts[key], 0);
  byId("thinned").textContent = all.length === sum("read") && sum("files") === sum("files_read") ? `All ${grouped.format(all.length)} completions are here.`
    : `Here are ${grouped.format(all.length)} of the ${grouped.format(sum("read"))} completions in ${sum("files_read")} of ${sum("files")} files, evenly spaced (jaxrl report --completions N takes more); the rest lie in rollouts/ of the run.`;
  const rewards = all.map(r => r.reward), best = rewards.reduce((a, b) => Math.max(a, b)), worst = rewards.reduce((a, b) => Math.min(a, b));
  const tone = r => known(r.correct) ? (r.correct ? "good" : "bad") : best === worst ? "" : r.reward === best ? "good" : r.reward === worst ? "bad" : "";
  let stepsOf = [], page = 0, question = null;
  const of_run = () => all.filter(r => r.run === +byId("run").value);
  function setRun() {
    const kept = byId("kind").value, there = Object.keys(KINDS).filter(k => of_run().some(r => r.kind === k));
    byId("kind").replaceChildren(...there.map(k => el("option", {value: k}, KINDS[k])));
    if (there.includes(kept)) byId("kind").value = kept;
    setKind();
  }
  function setKind() {
    stepsOf = [...new Set(of_run().filter(r => r.kind === byId("kind").value).map(r => r.step))].sort((a, b) => a - b);
    byId("step").max = stepsOf.length - 1; byId("step").value = stepsOf.length - 1;
  }
  /* Lower-cased once, when first searched. */
  const haystack = r => r.haystack ??= [r.prompt, r.completion, r.answer || ""].join("\0").toLowerCase();
  function tokens(r, what, most) {
    const box = el("div", {class: "text mono", tabindex: 0}), readout = el("div", {class: "readout"}, "Point at a token."), t = r.tokens;
    t.text.forEach((text, i) => box.append(el("span", {class: "tok", "data-i": i, style: known(t[what][i]) ? "background:" + SHADES[what].css(t[what][i], most) : "opacity:.6"}, text)));
    if (t.text.length < r.num_tokens) box.append(el("span", {style: "color:var(--soft)"}, ` [${grouped.format(r.num_tokens - t.text.length)} more tokens]`));
    const tell = e => {
      const i = e.target.dataset?.i; if (i === undefined) return;
      const said = [`token ${+i + 1}: ${JSON.stringify(t.text[i])}`];
      if (!known(t.logprob[i]) && !known(t.advantage[i])) said.push("not sampled by the policy");
      if (known(t.logprob[i])) said.push(`log-probability ${number(t.logprob[i])} (${percent(Math.exp(t.logprob[i]))})`);
      if (known(t.advantage[i])) said.push("advantage " + signed(t.advantage[i], number));
      if (known(t.mismatch?.[i])) said.push("mismatch " + signed(t.mismatch[i], number));
      readout.textContent = said.join(" · ");
    };
    box.addEventListener("pointerover", tell); box.addEventListener("click", tell);
    return [box, readout];
  }
  function card(r, term, what, most) {
    const meta = el("div", {class: "meta"}, el("span", {class: "tag " + tone(r)}, "reward " + number(r.reward)));
    const scores = Object.entries(r.scores || {});
    if (scores.length > 1) meta.append(el("span", {}, scores.map(([k, v]) => k + " " + number(v)).join(", ")));
    if (known(r.advantage)) meta.append(el("span", {}, "advantage " + signed(r.advantage, number)));
    meta.append(el("span", {}, number(r.num_tokens) + " tokens" + (r.turns ? `, ${r.turns.filter(t => t.sampled).length} turns, ${r.status.replaceAll("_", " ")}` : r.finish_reason === "length" ? ", cut off" : "")));
    meta.append(el("span", {class: "grow"}), el("span", {}, `step ${r.step} · question ${r.prompt_id}` + (r.kind === "greedy" ? "" : ` · sample ${r.sample}`)));
    if (question === null) meta.append(el("button", {class: "link", type: "button", onclick: () => { question = r.prompt_id; byId("every").value = "1"; byId("sort").value = "step"; page = 0; show(); byId("completions").scrollIntoView(); }}, "at every step"));
    const left = el("div", {}, ...field(r.turns ? "Opening" : "Question", r.turns ? r.opening : r.prompt, term));
    if (known(r.answer)) left.append(el("div", {style: "margin-top:10px"}, ...field("Reference answer", r.answer, term, true)));
    const right = what ? el("div", {}, el("h4", {}, "Reply, token by token"), ...tokens(r, what, most)) : el("div", {}, ...(r.turns ? r.turns.flatMap((t, i) => field(`${i + 1}. ${t.role}` + (t.num_tokens ? ` · ${number(t.num_tokens)} tokens` : "") + (t.new_context ? " · the conversation anew" : "") + (known(t.reward) ? ` · reward ${number(t.reward)}` : ""), t.text, term, t.sampled)) : field("Reply", r.completion, term, true)));
    return el("article", {class: "card reply"}, meta, el("div", {class: "cols"}, left, right));
  }
  function show() {
    const kind = byId("kind").value, step = stepsOf[+byId("step").value], every = byId("every").value, what = byId("colour").value, run = +byId("run").value;
    byId("step-label").textContent = every ? "Step (all are shown)" : "Step " + step; byId("step").disabled = !!every;
    const low = byId("low").value === "" ? -Infinity : +byId("low").value, high = byId("high").value === "" ? Infinity : +byId("high").value;
    const term = byId("search").value.toLowerCase();
    const list = all.filter(r => r.run === run && r.kind === kind && (every || r.step === step) && r.reward >= low && r.reward <= high && (question === null || r.prompt_id === question) &&
      (!what || r.tokens?.[what]) && (!term || haystack(r).includes(term)));
    const by = {order: (a, b) => a.prompt_id - b.prompt_id || a.step - b.step || a.sample - b.sample, high: (a, b) => b.reward - a.reward, low: (a, b) => a.reward - b.reward,
      long: (a, b) => b.num_tokens - a.num_tokens, short: (a, b) => a.num_tokens - b.num_tokens, step: (a, b) => a.step - b.step || a.prompt_id - b.prompt_id};
    list.sort(by[byId("sort").value]);
    const most = what ? SHADES[what].most(list, what) : 0;
    byId("scale").hidden = !what || !list.length;
    if (what) { const [left, right] = SHADES[what].ends(most); byId("scale").replaceChildren(left, el("i", {style: `background:linear-gradient(90deg, ${SHADES[what].gradient})`}), right); }
    const pages = Math.max(1, Math.ceil(list.length / PAGE)); page = Math.min(page, pages - 1);
    byId("count").replaceChildren(`${grouped.format(list.length)} completion${list.length === 1 ? "" : "s"}` + (what ? " whose tokens are known one by one" : "") + (list.length ? `, mean reward ${number(mean(list.map(r => r.reward)))}` : "") + (pages > 1 ? `, page ${page + 1} of ${pages}` : "") + " ");
    if (question !== null) byId("count").append(el("button", {class: "link", type: "button", onclick: () => { question = null; byId("every").value = ""; show(); }}, `question ${question} only: show all questions`));
    byId("prev").disabled = page === 0; byId("next").disabled = page >= pages - 1;
    byId("list").replaceChildren(...list.slice(page * PAGE, page * PAGE + PAGE).map(r => card(r, term, what, most)));
    if (!list.length) byId("list").append(el("p", {class: "note"}, what ? "No such completion has its tokens here one by one: a few responses of each training step have." : "No completion fits. Widen the reward range or clear the search."));
  }
  byId("run").addEventListener("change", () => { setRun(); question = null; page = 0; show(); });
  byId("kind").addEventListener("change", () => { setKind(); if (question !== null) byId("every").value = ""; question = null; page = 0; show(); });
  for (const id of ["step", "every", "low", "high", "search", "sort", "colour"]) byId(id).addEventListener("input", () => { page = 0; show(); });
  byId("prev").addEventListener("click", () => { page--; show(); });
  byId("next").addEventListener("click", () => { page++; show(); });
  byId("reset").addEventListener("click", () => { for (const id of ["low", "high", "search", "every", "colour"]) byId(id).value = ""; byId("sort").value = "order"; question = null; page = 0; setKind(); show(); });
  setRun(); show();
}
