// Put the parts together.

const parts = [header, failures, summary, curves, perplexityTables, retention, frequencies, maps, tasks, budget, record];
document.getElementById("report").replaceChildren(...parts.map((part) => part()).filter(Boolean));
charts.forEach((c) => c.draw());
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
