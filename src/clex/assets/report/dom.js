// Elements, numbers and the marks that stand for methods.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function ppl(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1e6) return value.toExponential(1);
  if (value >= 1000) return grouped(Math.round(value));
  return value.toFixed(value >= 100 ? 1 : 2);
}

function percent(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return `${value < 0 ? "−" : "+"}${grouped(Math.round(size))} %`;
  const text = size.toFixed(digits);
  const sign = Number(text) === 0 ? "" : value < 0 ? "−" : "+";
  return `${sign}${text} %`;
}

const grouped = (value) => value.toLocaleString("en-US");
const interval = (low, high, format) =>
  low === null || low === undefined ? "" : `${format(low)} to ${format(high)}`;

function tokens(value) {
  return value >= 1024 && value % 1024 === 0 ? `${value / 1024}k` : String(value);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 100) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${(minutes / 60).toFixed(1)} h`;
}

// Shapes beside colours: a print or a colour-blind eye must be able to follow a curve.
const SHAPES = [
  (x, y, r) => `M${x - r},${y}a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (x, y, r) => `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (x, y, r) => `M${x},${y - 1.3 * r}l${1.2 * r},${2.2 * r}h${-2.4 * r}z`,
  (x, y, r) => `M${x},${y - 1.4 * r}l${1.4 * r},${1.4 * r}l${-1.4 * r},${1.4 * r}l${-1.4 * r},${-1.4 * r}z`,
  (x, y, r) => `M${x},${y + 1.3 * r}l${1.2 * r},${-2.2 * r}h${-2.4 * r}z`,
];
const COLOURS = 8;

function styleOf(index, trained) {
  const round = Math.floor(index / COLOURS);
  return {
    colour: `var(--m${index % COLOURS})`,
    dash: trained ? (round ? "9 3" : null) : "5 4",
    shape: SHAPES[index % SHAPES.length],
  };
}

function mark(style, x, y, r, attributes) {
  return s("path", { d: style.shape(x, y, r), fill: style.colour, ...attributes });
}

function swatch(style) {
  return s(
    "svg",
    { width: 22, height: 11, viewBox: "0 0 22 11", "aria-hidden": "true" },
    s("line", { x1: 0, x2: 22, y1: 5.5, y2: 5.5, stroke: style.colour, "stroke-width": 2, "stroke-dasharray": style.dash }),
    mark(style, 11, 5.5, 3.6),
  );
}
