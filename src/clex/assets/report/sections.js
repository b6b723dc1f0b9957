// The parts of the report, each from its part of the data; a part without data is left out.

const report = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const charts = [];
const methods = new Map(report.methods.map((m, i) => [m.name, { ...m, style: styleOf(i, m.trained) }]));
const TITLES = {
  target: ["Same target tokens", "The same last tokens are scored while the context before them grows. Any rise with length is harm that length does."],
  window: ["First L tokens", "Mean loss over the first L tokens. Falls with L by itself, since later tokens have more before them."],
  longppl: ["Key tokens (LongPPL)", "Only the tokens that an evaluator model predicts well with long context and badly without it."],
  sliding: ["Sliding window", "Every token of a document, read from a window of so many tokens that moves by a stride."],
};
const titleOf = (protocol) => TITLES[protocol] || [protocol, ""];
const native = report.model.native_length;

const chart = (options) => {
  const made = new Chart({ hidden, ...options });
  charts.push(made);
  return made.element;
};
const scroll = (label, content) => h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, content);
const section = (id, title, ...content) => h("section", { id }, h("h2", null, title), content);
const named = (name) => {
  const m = methods.get(name);
  return h("th", { scope: "row", class: "method" }, swatch(m.style), m.label, m.deviates ? h("span", { class: "mark", title: `budget: ${m.deviates}` }, " ≠") : null);
};
const labelOf = (name) => methods.get(name).label;
const unique = (values) => [...new Set(values)];
const cells = (protocol) => report.perplexity.filter((c) => c.protocol === protocol);
const protocols = unique(report.perplexity.map((c) => c.protocol)).sort((a, b) =>
  Object.keys(TITLES).indexOf(a) - Object.keys(TITLES).indexOf(b));

function header() {
  const b = report.budget;
  const facts = [
    ["model", report.model.name],
    ["native window", `${grouped(native)} tokens`],
    ["longest text", `${grouped(Math.round(native * report.model.max_scale))} tokens (t = ${report.model.max_scale})`],
    ["training of each method", `${grouped(b.tokens)} tokens in ${grouped(b.steps)} steps`],
    [report.seeds.length > 1 ? "seeds" : "seed", report.seeds.map((seed) => `no. ${seed}`).join(", ")],
    ["measured on", `${report.text.documents} documents, ${report.text.windows} windows`],
  ];
  return h("header", null,
    h("h1", null, report.title),
    h("p", { class: "soft" }, `Written ${report.written.slice(0, 16).replace("T", " ")} UTC by clex ${report.versions.clex}.`),
    h("ul", { class: "facts" }, facts.map(([name, value]) => h("li", null, h("b", null, value), h("span", null, name)))));
}

function failures() {
  if (!report.failures.length) return null;
  return h("div", { class: "alert", id: "failures", role: "note" },
    h("b", null, `${report.failures.length} failed; the numbers below are without them.`),
    h("ul", null, report.failures.map((f) =>
      h("li", null, `${labelOf(f.method)}, seed ${f.seed}, ${f.what}: `, h("code", null, f.error), f.log ? [" (", h("code", null, f.log), ")"] : null))));
}

function summary() {
  const shown = protocols.filter((p) => report.verdicts.some((v) => v.protocol === p));
  if (!shown.length) return null;
  const lengths = unique(report.verdicts.map((v) => v.length)).sort((a, b) => a - b);
  const cell = (protocol, length) => {
    const v = report.verdicts.find((x) => x.protocol === protocol && x.length === length);
    if (!v) return h("td", null, "–");
    return h("td", null, h("b", null, labelOf(v.best)), ` ${ppl(v.ppl)}`,
      v.ties.length ? [h("br"), h("small", null, `level with it: ${v.ties.map(labelOf).join(", ")}`)] : null);
  };
  return section("summary", "Who is ahead",
    report.sentences.map((text, i) => h("p", { class: i ? null : "lead" }, text)),
    scroll("Best method by length", h("table", null,
      h("thead", null, h("tr", null, h("th", { scope: "col", class: "number" }, "tokens"), shown.map((p) => h("th", { scope: "col", style: "padding-left:20px" }, titleOf(p)[0])))),
      h("tbody", null, lengths.map((n) => h("tr", null, h("th", { scope: "row", class: "number" }, grouped(n)),
        shown.map((p) => { const td = cell(p, n); td.style.paddingLeft = "20px"; return td; })))))),
    h("p", { class: "note" }, report.level_rule));
}

function legend() {
  return h("div", { class: "legend", role: "group", "aria-label": "Methods shown in the charts" },
    [...methods.values()].map((m) => {
      const button = h("button", { type: "button", "aria-pressed": "true", "data-toggle": m.name }, swatch(m.style), m.label);
      button.addEventListener("click", () => {
        const off = !hidden.has(m.name);
        if (off) hidden.add(m.name); else hidden.delete(m.name);
        button.setAttribute("aria-pressed", String(!off));
        charts.forEach((c) => c.draw());
      });
      return button;
    }));
}

function lines(items, y, more = () => ({})) {
  return [...methods.values()].map((m) => ({
    name: m.name, label: m.label, style: m.style,
    points: items.filter((c) => c.method === m.name).map((c) => ({ x: c.length, y: y(c), ...more(c) })).sort((a, b) => a.x - b.x),
  }));
}

function curves() {
  const common = { xLabel: tokens, xTitle: "tokens", xLog: true, window: native };
  const plots = protocols.map((p) => {
    const found = cells(p).filter((c) => c.length >= native || p === "longppl");
    return found.length ? chart({
      ...common, title: titleOf(p)[0], note: `${titleOf(p)[1]} Perplexity, lower is better.`, log: true, clip: 1.7,
      ticks: unique(found.map((c) => c.length)).sort((a, b) => a - b), yLabel: (v) => String(v), format: ppl,
      series: lines(found, (c) => c.ppl, (c) => ({ low: c.low, high: c.high })),
    }) : null;
  });
  const gaps = protocols.map((p) => {
    const found = report.differences.filter((d) => d.protocol === p && d.length >= native);
    return found.length ? chart({
      ...common, title: `${titleOf(p)[0]}: difference to ${labelOf(report.reference)}`,
      note: "Paired by document, in per cent of perplexity; below zero is better. More than 60 % worse: not drawn.", log: false, zero: 0,
      ticks: unique(found.map((c) => c.length)).sort((a, b) => a - b), yLabel: (v, step) => percent(v, step < 1 ? 1 : 0), format: percent,
      series: lines(found.filter((d) => d.percent < 60), (d) => d.percent, (d) => ({ low: d.low, high: d.high })),
    }) : null;
  });
  const bands = report.positions.map((b) => ({ ...b, length: Math.round((b.start + b.stop) / 2) }));
  const byPosition = bands.length ? chart({
    ...common, title: "By position in the longest text", note: "Perplexity in bands of position, all read at one scale.", log: true, clip: 1.7, xLog: false,
    ticks: unique(bands.map((b) => b.length)).sort((a, b) => a - b), yLabel: (v) => String(v), format: ppl, series: lines(bands, (b) => b.ppl),
  }) : null;
  return section("curves", "Perplexity by length",
    h("p", null, "Whiskers: 95 % bootstrap intervals over documents. Those of the curves hold the spread between documents, which all methods share; the paired differences do not. Dashed: no training. Dotted line: the native window."),
    legend(), h("div", { class: "charts" }, plots, byPosition, gaps));
}

function perplexityTables() {
  const many = report.seeds.length > 1;
  return section("tables", "All numbers",
    h("p", { class: "note" }, "Small: 95 % interval over documents", many ? "; in brackets the range over seeds. " : ". ",
      h("span", { class: "key" }, "Shaded"), ": the best of a column (bold) and those level with it."),
    protocols.map((p) => {
      const found = cells(p), lengths = unique(found.map((c) => c.length)).sort((a, b) => a - b);
      return [h("h3", null, `${titleOf(p)[0]}: perplexity`), scroll(`${titleOf(p)[0]}: perplexity`, h("table", null,
        h("thead", null, h("tr", null, h("th", { scope: "col" }, "method"), lengths.map((n) => h("th", { scope: "col", class: "number" }, grouped(n))))),
        h("tbody", null, [...methods.keys()].filter((m) => found.some((c) => c.method === m)).map((m) => h("tr", null, named(m),
          lengths.map((n) => {
            const c = found.find((x) => x.method === m && x.length === n);
            if (!c) return h("td", { class: "number" }, "–");
            return h("td", { class: `number ${c.rank || ""}` }, ppl(c.ppl),
              h("small", null, interval(c.low, c.high, ppl)),
              many && c.seeds.length > 1 ? h("small", null, `[${interval(c.min, c.max, ppl)}]`) : null);
          }))))))];
    }), details("Next-token accuracy and bits per byte", protocols.map((p) => {
      const found = cells(p), lengths = unique(found.map((c) => c.length)).sort((a, b) => a - b);
      return [h("h3", null, titleOf(p)[0]), grid(titleOf(p)[0], "method", lengths.map(grouped), found, (m) => lengths.map((n) => {
        const c = found.find((x) => x.method === m && x.length === n);
        return c ? [`${(100 * c.accuracy).toFixed(1)} %`, c.bits_per_byte === null ? null : h("small", null, `${c.bits_per_byte.toFixed(3)} bits`)] : "–";
      }))];
    })));
}

const details = (title, ...content) => h("details", null, h("summary", null, title), content);

// Methods by columns; `cellsOf` gives a method's cells.
function grid(label, first, columns, found, cellsOf) {
  return scroll(label, h("table", null,
    h("thead", null, h("tr", null, h("th", { scope: "col" }, first), columns.map((n) => h("th", { scope: "col", class: "number" }, n)))),
    h("tbody", null, [...methods.keys()].filter((m) => found.some((c) => c.method === m)).map((m) =>
      h("tr", null, named(m), cellsOf(m).map((content) => h("td", { class: "number" }, content)))))));
}

function retention() {
  const found = report.retention;
  if (!found.length) return null;
  const lengths = unique(found.map((c) => c.length)).sort((a, b) => a - b);
  return section("retention", "What it cost at short lengths",
    h("p", null, "Perplexity of the first L tokens, L up to the native window, and its change from the model as it was before. A training-free method must show 0 here: at t = 1 the model is bit-equal."),
    grid("Short-context retention", "method", lengths.map(grouped), found, (m) => lengths.map((n) => {
      const c = found.find((x) => x.method === m && x.length === n);
      if (!c) return "–";
      return [ppl(c.ppl), m === "base" ? null : h("small", null, percent(c.percent, 2)),
        m === "base" || c.low === null ? null : h("small", null, interval(c.low, c.high, (v) => percent(v, 2)))];
    })));
}

function frequencies() {
  const found = report.frequencies;
  if (!found.length) return null;
  const scales = unique(found.flatMap((f) => f.scales.map((x) => x.scale))).sort((a, b) => a - b);
  const layers = unique(found.map((f) => f.layer_type));
  const holder = h("div", { class: "charts" });
  const buttons = scales.map((t) => h("button", { type: "button", "aria-pressed": "false", onclick: () => show(t) }, `t = ${Number(t.toFixed(2))}`));
  const firstSeed = (name, layer) => found.find((f) => f.method === name && f.layer_type === layer);
  let made = [];
  function show(t) {
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(scales[i] === t)));
    made.forEach((c) => charts.splice(charts.indexOf(c), 1));
    const before = charts.length;
    holder.replaceChildren(...layers.map((layer) => {
      const some = found.find((f) => f.layer_type === layer);
      return chart({
        title: `Frequency ratio at t = ${Number(t.toFixed(2))}` + (layers.length > 1 ? `, ${layer}` : ""),
        note: "f(t) / f(1) of each rotary dimension, fastest first. 1: as trained; 1/t: fully interpolated.",
        ticks: some.inv_freq.map((_, i) => i), xLabel: String, xTitle: "dimension", yLabel: (v) => String(v), log: true, zero: 1,
        format: (v) => v.toFixed(3),
        series: [...methods.values()].map((m) => {
          const f = firstSeed(m.name, layer), at = f && f.scales.find((x) => x.scale === t);
          return { name: m.name, label: m.label, style: m.style, points: at ? at.ratio.map((y, x) => ({ x, y })).filter((p) => p.y > 0) : [] };
        }),
      });
    }));
    made = charts.slice(before);
    made.forEach((c) => c.draw());
  }
  requestAnimationFrame(() => show(scales[scales.length - 1]));
  return section("frequencies", "Frequencies",
    h("div", { class: "choice", role: "group", "aria-label": "Length scale" }, buttons), holder,
    h("h3", null, "Factor on cos and sin"),
    grid("Attention factor by scale", "method", scales.map((t) => `t = ${Number(t.toFixed(2))}`), found, (m) =>
      firstSeed(m, layers[0]).scales.map((x) => x.attention_factor.toFixed(4))),
    report.seeds.length > 1 ? h("p", { class: "note" }, `Learned frequencies: those of seed ${report.seeds[0]}.`) : null);
}

const SCORE_NAMES = {
  exact: ["written out", "Greedy generation writes the answer."],
  choice: ["most likely", "The right answer is likelier than every wrong one of the same form."],
  gain: ["gained most", "The right answer is the one that the hidden statement made likelier by most."],
};

function maps() {
  if (!report.maps.length) return null;
  return section("retrieval", "Retrieval by length and depth", unique(report.maps.map((m) => m.task)).map(retrieval));
}

function retrieval(task) {
  const found = report.maps.filter((m) => m.task === task);
  const scores = unique(found.map((m) => m.score));
  const holder = h("div");
  const buttons = scores.map((score) => h("button", { type: "button", "aria-pressed": "false", onclick: () => show(score) }, SCORE_NAMES[score][0]));
  function show(score) {
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(scores[i] === score)));
    const own = found.filter((m) => m.score === score);
    const rows = report.retrieval.filter((r) => r.task === task && r.score === score);
    const lengths = unique(rows.map((r) => r.length)).sort((a, b) => a - b);
    holder.replaceChildren(
      h("p", { class: "note" }, `${SCORE_NAMES[score][1]} Chance: ${own[0].chance.toFixed(2)}. Rows: depth of the statement; columns: tokens; cells: share found.`),
      h("div", { class: "maps" }, own.map(heat)),
      grid(`${own[0].title}, ${SCORE_NAMES[score][0]}`, "share found over all depths", lengths.map(grouped), rows, (m) => lengths.map((n) => {
        const r = rows.find((x) => x.method === m && x.length === n);
        return r ? [r.mean.toFixed(2), h("small", null, interval(r.low, r.high, (v) => v.toFixed(2)))] : "–";
      })));
  }
  // What sets the methods apart: generation, where any of them can do it at all.
  const able = found.some((m) => m.score === "exact" && m.values.flat().some((v) => v > 0));
  show(able || !scores.includes("gain") ? scores[0] : "gain");
  return [h("h3", null, found[0].title), h("div", { class: "choice", role: "group", "aria-label": "Score" }, buttons), holder];
}

function heat(map) {
  const shade = (v) => `color-mix(in oklab, var(--high) ${Math.round(100 * v)}%, var(--low))`;
  return h("figure", null,
    h("figcaption", null, swatch(methods.get(map.method).style), ` ${labelOf(map.method)}`),
    h("table", { class: "heat" },
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "depth"), map.lengths.map((n) => h("th", { scope: "col" }, tokens(n))))),
      h("tbody", null, map.depths.map((d, i) => h("tr", null, h("th", { scope: "row" }, `${Math.round(100 * d)} %`),
        map.lengths.map((n, j) => {
          const v = map.values[i][j];
          return v === null ? h("td", null, "–")
            : h("td", { style: `background:${shade(v)}`, class: v > 0.55 ? "dark" : null, title: `${grouped(n)} tokens, depth ${Math.round(100 * d)} %: ${v.toFixed(2)}` }, v.toFixed(2).replace(/^0\./, "."));
        }))))));
}

function tasks() {
  if (!report.tasks.length) return null;
  const names = unique(report.tasks.map((t) => `${t.task}\n${t.metric}`));
  const head = names.map((n) => { const [task, metric] = n.split("\n"); return [task, h("br"), h("small", null, metric)]; });
  return section("tasks", "Tasks of the evaluation harness",
    grid("Task scores", "method", head, report.tasks, (m) => names.map((n) => {
      const t = report.tasks.find((x) => x.method === m && `${x.task}\n${x.metric}` === n);
      return t ? [t.value.toPrecision(4), h("small", null, interval(t.low, t.high, (v) => v.toPrecision(3))), h("small", null, `${t.items} items${t.cut ? `, ${t.cut} cut` : ""}`)] : "–";
    })),
    h("p", { class: "note" }, "Small: 95 % bootstrap interval over items."));
}

function budget() {
  return section("methods", "Methods and what they were given",
    h("p", null, `Equal for all trained methods: ${Object.entries(report.budget.settings).map(([k, v]) => `${k.replaceAll("_", " ")} ${v}`).join(", ")}; the same windows of text in the same order for the same seed. `,
      report.methods.some((m) => m.deviates) ? h("span", null, h("span", { class: "mark" }, "≠"), " marks a method that deviates.") : null),
    scroll("Methods", h("table", null,
      h("thead", null, h("tr", null, ["method", "how", "training tokens", "training time", "measuring time", "budget", "state"].map((n, i) => h("th", { scope: "col", class: i > 1 && i < 5 ? "number" : null, style: i >= 5 ? "padding-left:16px" : null }, n)))),
      h("tbody", null, report.methods.map((m) => h("tr", null, named(m.name),
        h("td", null, m.how),
        h("td", { class: "number" }, m.tokens ? (m.tokens_before ? `${grouped(m.tokens_before)} + ` : "") + grouped(m.tokens) : "–"),
        h("td", { class: "number" }, duration(m.train_seconds)),
        h("td", { class: "number" }, duration(m.measure_seconds)),
        h("td", { style: "padding-left:16px" }, m.deviates ? [h("span", { class: "mark" }, "deviates: "), m.deviates] : m.trained && !m.weights ? "equal" : "–"),
        h("td", { style: "padding-left:16px" }, m.state)))))),
    h("p", { class: "note" }, "Times are means over seeds, of one attempt; a resumed training counts from its last start."));
}

function record() {
  return section("record", "How to run it again",
    h("h3", null, "Commands"), h("pre", { tabindex: 0 }, unique(report.commands.map((c) => c.command)).join("\n")),
    h("h3", null, "Versions"), h("p", null, Object.entries(report.versions).map(([k, v]) => `${k} ${v}`).join(", ")),
    h("details", { open: true }, h("summary", null, "Recipe"), h("pre", { tabindex: 0 }, report.recipe)),
    h("details", null, h("summary", null, "Settings of each method"),
      report.methods.map((m) => [h("h3", null, m.label), h("pre", { tabindex: 0 }, JSON.stringify({ clex: m.clex, training: m.training }, null, 2))])));
}
