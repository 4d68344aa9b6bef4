// Number of an axis.
window.sluiceShort = (v) =>
  Math.abs(v) >= 1e6 ? +(v / 1e6).toPrecision(3) + "M" : Math.abs(v) >= 1e4 ? +(v / 1e3).toPrecision(3) + "k" : +v.toPrecision(4);

// Item of a custom series [step, low, high].
window.sluiceErrorBar = (params, api) => {
  const [low, high] = [1, 2].map((i) => api.coord([api.value(0), api.value(i)]));
  const style = { stroke: api.visual("color"), lineWidth: 1.2 };
  const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style });
  return { type: "group", children: [line(...low, ...high), ...[low, high].map(([x, y]) => line(x - 4, y, x + 4, y))] };
};

// What the charts of a page share in the browser: one crosshair, one zoom. Drag = zoom in, double click = all of it.
window.sluiceCharts = async (ids) => {
  const { echarts } = await import("nicegui-echart");
  const ready = async (id) => {
    for (let i = 0; i < 200 && !getElement(id)?.chart; i++) await new Promise((done) => setTimeout(done, 50));
    return getElement(id)?.chart;
  };
  const selecting = (chart) =>
    chart.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
  for (const id of ids) {
    const chart = await ready(id);
    if (!chart) continue;
    chart.group = "steps";
    if (matchMedia("(pointer: coarse)").matches) continue; // there a drag scrolls the page
    const set = chart.setOption.bind(chart);
    chart.setOption = (...options) => { set(...options); selecting(chart); };
    selecting(chart);
    chart.getZr().on("dblclick", () => chart.dispatchAction({ type: "dataZoom", dataZoomIndex: 0, start: 0, end: 100 }));
  }
  echarts.connect("steps"); // tooltips of the charts that the pointer is not over are hidden by style.css
};
