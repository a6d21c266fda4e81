// Draws the figures that the page holds as JSON, and fits them to the sheet while it is printed.
const plots = [...document.querySelectorAll(".plot .canvas")];
const options = { displayModeBar: false, displaylogo: false, responsive: true };
for (const plot of plots) {
  const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  Plotly.newPlot(plot, figure.data, figure.layout, options);
}
const SHEET = 680; // CSS pixels between the margins of an A4 sheet
addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.relayout(plot, { autosize: false, width: SHEET })));
addEventListener("afterprint", () =>
  plots.forEach((plot) => Plotly.relayout(plot, { autosize: true, width: null }))
);
