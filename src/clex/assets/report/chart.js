// A line chart in SVG: drawn at the width it has, read by pointer, touch or arrow keys.

const MARGIN = { top: 12, right: 14, bottom: 40, left: 54 };

class Chart {
  // series: [{name, label, style, points: [{x, y, low, high, more}]}]; x is a key of `ticks`.
  constructor({ title, note, ticks, xLabel, yLabel, xTitle, format, series, hidden, window, zero, log, xLog, clip }) {
    Object.assign(this, { title, ticks, xLabel, yLabel, xTitle, format, series, hidden, window, zero, log, xLog, clip });
    this.at = null;
    this.plot = h("div", { class: "plot" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.spoken = h("span", { class: "note", "aria-live": "polite", style: "position:absolute;clip-path:inset(50%)" });
    this.element = h(
      "figure",
      { tabindex: 0, "aria-label": `${title}. Arrow keys read the values; the table below has them all.` },
      h("figcaption", null, title, note ? h("span", null, note) : null),
      this.plot,
      this.spoken,
    );
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.read(null));
    this.element.addEventListener("blur", () => this.read(null));
    this.element.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => {
      if (this.plot.clientWidth !== this.width) this.draw();
    }).observe(this.plot);
  }

  visible() {
    return this.series.filter((line) => !this.hidden.has(line.name) && line.points.length);
  }

  range() {
    const lines = this.visible();
    const values = lines.flatMap((line) => line.points.map((p) => p.y)).filter(Number.isFinite);
    if (!values.length) return this.log ? [1, 10] : [-1, 1];
    let low = Math.min(...values), high = Math.max(...values);
    if (this.clip) {
      // A model that has broken down reaches thousands; the picture is about the others.
      const best = this.ticks.map((x) =>
        Math.min(...lines.flatMap((line) => line.points.filter((p) => p.x === x).map((p) => p.y))));
      high = Math.min(high, this.clip * Math.max(...best.filter(Number.isFinite)));
    }
    for (const p of lines.flatMap((line) => line.points)) {
      if (p.low > 0 || !this.log) low = Math.min(low, p.low ?? low);
      if (p.y <= high) high = Math.max(high, Math.min(p.high ?? high, this.clip ? high * 1.15 : Infinity));
    }
    if (this.zero !== undefined) { low = Math.min(low, this.zero); high = Math.max(high, this.zero); }
    if (this.log) return [low / 1.04, high * 1.04];
    const room = 0.06 * (high - low || 1);
    return [low - room, high + room];
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    this.height = Math.round(Math.max(230, Math.min(340, this.width * 0.62)));
    const [low, high] = this.range();
    const f = this.log ? Math.log : (v) => v;
    const right = this.width - MARGIN.right, bottom = this.height - MARGIN.bottom;
    const inset = this.ticks.length > 12 ? 2 : 16;
    const g = this.xLog ? Math.log : (v) => v;
    const first = g(this.ticks[0]), across = g(this.ticks[this.ticks.length - 1]) - first || 1;
    this.x = (value) => {
      const share = this.ticks.length > 1 ? (g(value) - first) / across : 0.5;
      return MARGIN.left + inset + share * (right - MARGIN.left - 2 * inset);
    };
    this.y = (value) => bottom - ((f(value) - f(low)) / (f(high) - f(low))) * (bottom - MARGIN.top);
    this.span = [low, high];

    const grid = this.yTicks(low, high).map((value) => [
      s("line", { class: "axis", x1: MARGIN.left, x2: right, y1: this.y(value), y2: this.y(value) }),
      s("text", { x: MARGIN.left - 8, y: this.y(value) + 4, "text-anchor": "end" }, this.yLabel(value, this.step)),
    ]);
    const every = Math.ceil(this.ticks.length / Math.max(2, Math.floor((right - MARGIN.left) / 52)));
    const below = this.ticks.filter((_, i) => i % every === 0).map((value) =>
      s("text", { x: this.x(value), y: bottom + 18, "text-anchor": "middle" }, this.xLabel(value)));
    const edge = this.window !== undefined && this.ticks.includes(this.window) ? [
      s("line", { class: "window", x1: this.x(this.window), x2: this.x(this.window), y1: MARGIN.top, y2: bottom }),
    ] : [];
    const zero = this.zero === undefined ? [] : [
      s("line", { stroke: "var(--soft)", x1: MARGIN.left, x2: right, y1: this.y(this.zero), y2: this.y(this.zero) }),
    ];
    const id = `clip${Chart.count = (Chart.count || 0) + 1}`;
    const shown = this.visible();
    const lines = shown.map((line, i) => this.line(line, (i - (shown.length - 1) / 2) * (inset > 2 ? 3 : 0)));
    this.cursor = s("line", { class: "cursor", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
    this.plot.replaceChildren(
      s(
        "svg",
        { viewBox: `0 0 ${this.width} ${this.height}`, width: this.width, height: this.height, role: "img", "aria-label": this.title },
        s("clipPath", { id }, s("rect", { x: MARGIN.left, y: MARGIN.top - 6, width: right - MARGIN.left, height: bottom - MARGIN.top + 6 })),
        grid, below, edge, zero,
        s("text", { x: (MARGIN.left + right) / 2, y: this.height - 4, "text-anchor": "middle" }, this.xTitle),
        this.cursor,
        s("g", { "clip-path": `url(#${id})` }, lines.map((part) => part.inside)),
        lines.map((part) => part.above),
      ),
      this.tip,
    );
    this.read(this.at);
  }

  line(line, shift) {
    const { style, name } = line;
    const points = line.points.filter((p) => Number.isFinite(p.y));
    const path = points.map((p, i) => `${i ? "L" : "M"}${this.x(p.x)},${this.y(p.y)}`).join("");
    const many = points.length > 12;
    const whiskers = points.filter((p) => Number.isFinite(p.low)).map((p) =>
      s("line", { class: "whisker", stroke: style.colour, x1: this.x(p.x) + shift, x2: this.x(p.x) + shift, y1: this.y(p.low), y2: this.y(p.high) }));
    const marks = many ? [] : points.map((p) => mark(style, this.x(p.x), this.y(p.y), 3.6, { "data-point": name }));
    const off = points.filter((p) => p.y > this.span[1]).map((p) =>
      s("path", { d: `M${this.x(p.x) + shift},${MARGIN.top - 8}l4,7h-8z`, fill: style.colour }));
    return {
      inside: [
        s("path", { class: "line", d: path, stroke: style.colour, "stroke-dasharray": style.dash, "data-method": name }),
        whiskers, marks,
      ],
      above: off,
    };
  }

  yTicks(low, high) {
    if (!this.log) return this.evenTicks(low, high);
    const nice = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    let ticks = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
      ticks.push(...nice.map((k) => Number((k * power).toPrecision(3))));
    }
    ticks = ticks.filter((value) => value >= low && value <= high);
    if (ticks.length < 3) return this.evenTicks(low, high);
    const gap = Math.log(high / low) / 7;
    const kept = [];
    for (const value of ticks) {
      if (!kept.length || Math.log(value / kept[kept.length - 1]) >= gap) kept.push(value);
    }
    return kept;
  }

  evenTicks(low, high) {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    this.step = [1, 2, 5, 10].map((k) => k * power).find((value) => value >= rough);
    const first = Math.ceil(low / this.step);
    return Array.from({ length: Math.floor(high / this.step) - first + 1 }, (_, i) => Number(((first + i) * this.step).toPrecision(6)));
  }

  point(event) {
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    const nearest = this.ticks.reduce((a, b) => (Math.abs(this.x(b) - x) < Math.abs(this.x(a) - x) ? b : a));
    this.read(nearest);
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.read(null);
    if (!move) return;
    event.preventDefault();
    const now = this.at === null ? (move > 0 ? -1 : this.ticks.length) : this.ticks.indexOf(this.at);
    this.read(this.ticks[Math.max(0, Math.min(this.ticks.length - 1, now + move))]);
    this.spoken.textContent = this.tip.innerText;
  }

  // Show what all visible lines have at `x`; null hides it.
  read(x) {
    this.at = x;
    this.tip.hidden = x === null;
    this.cursor.setAttribute("visibility", x === null ? "hidden" : "visible");
    if (x === null) return;
    this.cursor.setAttribute("x1", this.x(x));
    this.cursor.setAttribute("x2", this.x(x));
    const found = this.visible()
      .map((line) => ({ line, p: line.points.find((p) => p.x === x) }))
      .filter(({ p }) => p && Number.isFinite(p.y))
      .sort((a, b) => a.p.y - b.p.y);
    this.tip.replaceChildren(
      h("b", null, `${this.xTitle}: ${grouped(x)}`),
      h("table", null, found.map(({ line, p }) =>
        h("tr", null,
          h("td", null, swatch(line.style), line.label),
          h("td", null, h("b", null, this.format(p.y))),
          h("td", null, interval(p.low, p.high, this.format))))),
    );
    const left = this.x(x) + 14, room = this.width - this.tip.offsetWidth;
    const other = this.x(x) - 14 - this.tip.offsetWidth;
    this.tip.style.transform =
      `translate(${left <= room ? left : other >= 0 ? other : Math.max(0, room)}px, ${MARGIN.top}px)`;
  }
}
