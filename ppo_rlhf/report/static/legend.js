"use strict";
// The legend shows and hides a run in all charts.
document.querySelector(".legend")?.addEventListener("change", ({ target }) => {
  for (const chart of window.Bokeh.documents) {
    for (const model of chart.all_models) if (model.name === target.value) model.visible = target.checked;
  }
});

// Bokeh takes the colours of axes from the style sheet when it draws, so it draws again when light turns dark.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const view of window.Bokeh.index.roots) view.rerender();
});
