(() => {
  "use strict";
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const places = [...document.querySelectorAll(".plot[data-figure]")];
  const figures = places.map((place) => read(`figure-${place.dataset.figure}`));
  const scales = read("scales");
  const darkPage = window.matchMedia("(prefers-color-scheme: dark)");
  const config = {
    displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "pan2d", "zoom2d"],
    toImageButtonOptions: { format: "png", scale: 2 },
  };
  let printing = false;

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // Panels stand side by side; where the page is narrow, two in a row.
  function arrange(layout, width) {
    const { panels, plot } = layout.meta || {};
    if (!panels || panels < 3 || width >= 620) return;
    const rows = Math.ceil(panels / 2);
    const gap = 78;
    const inner = rows * plot + (rows - 1) * gap;
    for (let i = 0; i < panels; i += 1) {
      const key = i ? String(i + 1) : "";
      const row = Math.floor(i / 2);
      const top = 1 - (row * (plot + gap)) / inner;
      layout[`xaxis${key}`].domain = i % 2 ? [0.56, 1] : [0, 0.44];
      layout[`yaxis${key}`].domain = [Math.max(0, top - plot / inner), top];
      layout[`yaxis${key}`].showticklabels = true;
      layout[`yaxis${key}`].title = { text: i % 2 ? "" : "layer" };
    }
    layout.height = inner + 84;
  }

  function styled(figure, width) {
    const layout = structuredClone(figure.layout);
    const dark = darkPage.matches && !printing;
    const ink = color("ink");
    arrange(layout, width);
    layout.width = width;
    layout.font = { family: color("sans"), size: 12, color: ink };
    layout.hoverlabel = { bgcolor: color("raised"), bordercolor: color("rule"), font: { color: ink, family: color("sans"), size: 12 }, align: "left" };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: ink };
    for (const [key, axis] of Object.entries(layout)) {
      if (!/^[xy]axis/.test(key)) continue;
      Object.assign(axis, { gridcolor: color("grid"), linecolor: color("rule"), tickcolor: color("rule"), zerolinecolor: color("rule") });
      axis.tickfont = { color: color("muted"), size: 11 };
      axis.title = { ...axis.title, font: { color: color("muted"), size: 12 } };
    }
    const scale = layout.meta && scales[layout.meta.scale];
    if (scale && layout.coloraxis) {
      const colors = dark ? scale.dark : scale.light;
      layout.coloraxis.colorscale = colors.map((one, i) => [i / (colors.length - 1), one]);
      layout.coloraxis.colorbar.tickfont = { color: color("muted"), size: 11 };
      layout.coloraxis.colorbar.title.font = { color: color("muted"), size: 12 };
    }
    return layout;
  }

  async function draw() {
    let drawn = 0;
    for (const [i, place] of places.entries()) {
      const layout = styled(figures[i], place.clientWidth);
      place.style.minHeight = `${layout.height}px`;
      await Plotly.react(place, structuredClone(figures[i].data), layout, config);
      drawn += 1;
    }
    document.documentElement.dataset.drawn = String(drawn);
  }

  // One drawing at a time; a wish that comes meanwhile is granted afterwards.
  let running = null;
  let again = false;
  function redraw() {
    if (running) {
      again = true;
      return running;
    }
    running = draw().finally(() => {
      running = null;
      if (again) {
        again = false;
        redraw();
      }
    });
    return running;
  }

  function follow() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
    const seen = new Set();
    const watcher = new IntersectionObserver((entries) => {
      for (const entry of entries) seen[entry.isIntersecting ? "add" : "delete"](entry.target.id);
      const here = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) link.classList.toggle("here", id === here);
    }, { rootMargin: "-10% 0px -60% 0px" });
    document.querySelectorAll("main > section").forEach((section) => watcher.observe(section));
  }

  let width = window.innerWidth;
  let timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 150);
  });
  darkPage.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => { printing = true; redraw(); });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
  follow();
  redraw();
})();
